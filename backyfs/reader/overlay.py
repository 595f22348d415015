"""Overlays: throw-away writable views over images, which themselves never change.

What is written goes, in blocks of 4 KiB, into an unnamed file in a directory of the operator's
choice; the rest shows through from the image. The file is sparse, and the kernel frees it when the
overlay is closed or the process ends, however that happens.

Synchronous and safe from many threads. Readers take no lock: a block's bytes are in the file
before the block is marked as written. One thread writes to an overlay at a time, so writers that
share a block lose nothing.

Memory of an overlay: at most 4.5 KiB for each 128 MiB of the disk that has been written to (36 MiB
for a disk of 1 TiB), and as much again where it was zeroed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path

from backyfs.errors import TargetError
from backyfs.model import Extent
from backyfs.reader.blocks import BlockSet
from backyfs.reader.images import ReadableImage
from backyfs.store.contract import Buffer
from backyfs.store.fs import SYSTEM
from backyfs.store.repository import is_repository

BLOCK = 4096
"""Bytes of a block: what an overlay keeps is a multiple of it."""


class Origin(Enum):
    """Where the bytes of a part of an overlay come from."""

    IMAGE = "image"
    """Never written: they are the image's."""
    OVERLAY = "overlay"
    """Written: the overlay keeps them."""
    ZERO = "zero"
    """Zeroed: nobody keeps them."""


class Scratch:
    """The directory in which a process keeps its overlays, and how much they may take together.

    `bytes_max` bounds the bytes all overlays keep (None: only the file system does). Raises
    TargetError for a directory that cannot be used, or that lies in a repository or in `base`.
    """

    def __init__(
        self, directory: Path, bytes_max: int | None = None, *, base: Path | None = None
    ) -> None:
        self.directory, self.bytes_max = directory.resolve(), bytes_max
        self._used = 0
        self._lock = threading.Lock()
        _refuse_inside_store(self.directory, base.resolve() if base is not None else None)
        try:
            # Held open: what is mounted over it later must not come between.
            self._fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            os.close(self._unnamed_file())
        except OSError as exc:
            raise TargetError(
                f"overlays cannot be kept in {directory}: {exc.strerror}",
                hint="name a directory that exists, that you may write to",
            ) from exc

    @property
    def used_bytes(self) -> int:
        """Bytes that all overlays keep."""
        return self._used

    def overlay(self, image: ReadableImage) -> Overlay:
        """A new overlay over `image`, which must stay open as long as it. OSError."""
        return Overlay(self, image, self._unnamed_file())

    def reserve(self, count: int) -> None:
        """Count bytes that are about to be kept. OSError ENOSPC (overlays call this)."""
        with self._lock:
            if self.bytes_max is not None and self._used + count > self.bytes_max and count:
                raise OSError(
                    errno.ENOSPC,
                    f"overlays keep {self._used} of {self.bytes_max} bytes they may take",
                    str(self.directory),
                )
            self._used += count

    def release(self, count: int) -> None:
        """Count bytes that are no longer kept (overlays call this)."""
        with self._lock:
            self._used -= count

    def close(self) -> None:
        """Let go of the directory; overlays that are open stay usable."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _unnamed_file(self) -> int:
        """A descriptor of a new file without a name (or, on some file systems, soon without)."""
        with tempfile.TemporaryFile(dir=f"/proc/self/fd/{self._fd}", buffering=0) as file:
            return os.dup(file.fileno())


def _refuse_inside_store(directory: Path, base: Path | None) -> None:
    for place in (directory, *directory.parents):
        if place == base or is_repository(place):
            raise TargetError(
                f"{directory} lies inside the store {place}",
                hint="choose a directory for overlays outside of it, such as /var/tmp",
            )


class Overlay:
    """A writable view of an image, which stays open longer; what was written is gone when closed.

    `changed_ns`: when it was last written to (Unix time; 0 = never).

    Methods that take a range raise ValueError when it lies outside the image; those that read
    raise what the image raises; those that write raise OSError ENOSPC when the quota or the file
    system is full: `write` with nothing written, `zero` perhaps with a part zeroed.
    """

    def __init__(self, scratch: Scratch, image: ReadableImage, fd: int) -> None:
        self._scratch, self._image, self._fd, self._size = scratch, image, fd, image.size
        self._lock = threading.Lock()
        self._written = BlockSet()
        self._zeroed = BlockSet()  # of those written: what is zero, and not in the file
        self._used = 0
        self.changed_ns = 0

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._size

    @property
    def used_bytes(self) -> int:
        """Bytes this overlay keeps: whole blocks."""
        return self._used

    def raw_fd(self) -> int | None:
        """None: the bytes lie in two places."""
        return None

    # Reading

    def pieces(self, offset: int, length: int) -> Iterator[tuple[Extent, Origin]]:
        """A range cut by where its bytes come from; neighbours differ. For NBD's block status."""
        self._check(offset, length)
        end = offset + length
        for first, stop, origin in self._origins(offset // BLOCK, -(-end // BLOCK)):
            start = max(first * BLOCK, offset)
            yield Extent(start, min(stop * BLOCK, end) - start), origin

    def _origins(self, first: int, stop: int) -> Iterator[tuple[int, int, Origin]]:
        for start, end, written in self._written.runs(first, stop):
            if not written:
                yield start, end, Origin.IMAGE
                continue
            for zero_start, zero_end, zero in self._zeroed.runs(start, end):
                yield zero_start, zero_end, Origin.ZERO if zero else Origin.OVERLAY

    def read(self, offset: int, length: int) -> Buffer:
        """Exactly `length` bytes."""
        parts = [self._read(*piece) for piece in self.pieces(offset, length)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read(self, extent: Extent, origin: Origin) -> Buffer:
        if origin is Origin.IMAGE:
            return self._image.read(extent.offset, extent.length)
        if origin is Origin.ZERO:
            return bytes(extent.length)
        data = os.pread(self._fd, extent.length, extent.offset)
        if len(data) != extent.length:
            raise OSError(errno.EIO, "an overlay's file is shorter than it was")
        return data

    def try_read(self, offset: int, length: int) -> Buffer | None:
        """The bytes when they are in memory, else None; never blocks."""
        return self._unless_none(self._try_read, offset, length)

    def _try_read(self, extent: Extent, origin: Origin) -> Buffer | None:
        if origin is Origin.IMAGE:
            return self._image.try_read(extent.offset, extent.length)
        if origin is Origin.ZERO:
            return bytes(extent.length)
        data = bytearray(extent.length)
        try:
            count = os.preadv(self._fd, [data], extent.offset, os.RWF_NOWAIT)
        except OSError:  # not cached, or a file system that cannot tell
            return None
        return data if count == extent.length else None

    def read_unless_reserved(self, offset: int, length: int) -> Buffer | None:
        """As `read`; None where it would wait for a thread that decodes the same bytes."""
        return self._unless_none(self._read_unless_reserved, offset, length)

    def _read_unless_reserved(self, extent: Extent, origin: Origin) -> Buffer | None:
        if origin is Origin.IMAGE:
            return self._image.read_unless_reserved(extent.offset, extent.length)
        return self._read(extent, origin)

    def _unless_none(
        self, read: Callable[[Extent, Origin], Buffer | None], offset: int, length: int
    ) -> Buffer | None:
        parts = []
        for piece in self.pieces(offset, length):
            part = read(*piece)
            if part is None:
                return None
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def prefetch(self, extent: Extent) -> None:
        """Make a later `read` of the extent cheap; reports no damage."""
        for piece, origin in self.pieces(extent.offset, extent.length):
            if origin is Origin.IMAGE:
                self._image.prefetch(piece)

    # Writing

    def write(self, offset: int, data: Buffer) -> None:
        """Replace the bytes at `offset`."""
        self._check(offset, len(data))
        if len(data):
            with self._lock:
                self._write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros; its whole blocks are no longer kept."""
        self._check(offset, length)
        end = offset + length
        first, stop = self._whole_blocks(offset, end)
        with self._lock:
            if first >= stop:
                self._write(offset, bytes(length))
                return
            self._zero(first, stop)  # first, for it makes room
            self._write(offset, bytes(first * BLOCK - offset))
            self._write(stop * BLOCK, bytes(max(0, end - stop * BLOCK)))

    def trim(self, offset: int, length: int) -> None:
        """Stop keeping the whole blocks of a range, whose content nobody needs: they are zeroed."""
        self._check(offset, length)
        first, stop = self._whole_blocks(offset, offset + length)
        if first < stop:
            with self._lock:
                self._zero(first, stop)

    def flush(self) -> None:
        """Have the file system write all back, to learn of its errors; nothing outlives a crash."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Drop what was written. Harmless when repeated."""
        with self._lock:
            if self._fd < 0:
                return
            os.close(self._fd)
            self._fd = -1
            self._scratch.release(self._used)
            self._used = 0

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self._size:
            raise ValueError(f"bytes {offset}+{length} lie outside the disk's {self._size}")

    def _whole_blocks(self, offset: int, end: int) -> tuple[int, int]:
        """The blocks [first, stop) that lie in a range; the disk's last one may be short."""
        stop = -(-end // BLOCK) if end == self._size else end // BLOCK
        return -(-offset // BLOCK), stop

    # Under the lock

    def _write(self, offset: int, data: Buffer) -> None:
        if not len(data):
            return
        start, whole = self._widened(offset, data)
        first, stop = self._whole_blocks(start, start + len(whole))
        fresh = [(a, b) for a, b, origin in self._origins(first, stop) if origin != Origin.OVERLAY]
        count = sum(b - a for a, b in fresh) * BLOCK
        self._scratch.reserve(count)
        try:
            if fresh:  # so that a full file system is noticed before anything is written
                os.posix_fallocate(self._fd, start, len(whole))
            _write_all(self._fd, whole, start)
        except BaseException:
            self._scratch.release(count)
            with contextlib.suppress(OSError):
                for a, b in fresh:
                    self._punch(a, b)
            raise
        self._used += count
        self._written.add(first, stop)
        self._zeroed.remove(first, stop)
        self.changed_ns = time.time_ns()

    def _widened(self, offset: int, data: Buffer) -> tuple[int, Buffer]:
        """What is to be written, filled up to whole blocks with what is there."""
        end = offset + len(data)
        start = offset // BLOCK * BLOCK
        stop = min(-(-end // BLOCK) * BLOCK, self._size)
        if start == offset and stop == end:
            return offset, data
        before, behind = self.read(start, offset - start), self.read(end, stop - end)
        return start, b"".join((before, data, behind))

    def _zero(self, first: int, stop: int) -> None:
        for start, end, origin in list(self._origins(first, stop)):
            if origin is Origin.OVERLAY:
                if not self._punch(start, end):
                    self._write(start * BLOCK, bytes(self._end(end) - start * BLOCK))
                    continue
                self._used -= (end - start) * BLOCK
                self._scratch.release((end - start) * BLOCK)
            # In this order: a block that is marked as written must never look as if in the file.
            self._zeroed.add(start, end)
            self._written.add(start, end)
        self.changed_ns = time.time_ns()

    def _punch(self, first: int, stop: int) -> bool:
        """Give blocks back to the file system; whether it can."""
        try:
            SYSTEM.punch(self._fd, first * BLOCK, (stop - first) * BLOCK, self._scratch.directory)
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            return False
        return True

    def _end(self, block: int) -> int:
        return min(block * BLOCK, self._size)


def _write_all(fd: int, data: Buffer, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
