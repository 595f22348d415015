"""A disk of a revision: a sparse raw file, and the table that proves its bytes.

Invariants: what `read` of a checked image returns has the recorded hash; an unchecked image hands
out what the file system returns. Where only the table's frame hashes are hit, they are computed
again from the image and count when level 1 confirms them: then the data is proven, too.

Safe from many threads. Whoever finds a bad frame records it in the quarantine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backyfs.errors import BackyfsError, Busy, Corrupt, NoRevision
from backyfs.model import FRAME, Extent, merged, whole_frames
from backyfs.store import lock
from backyfs.store.contract import StoredImage
from backyfs.store.cow import damage
from backyfs.store.cow.blocks import different, frame_hashes, runs
from backyfs.store.cow.fiemap import apart
from backyfs.store.cow.reflink import data_extents
from backyfs.store.cow.table import (
    Table,
    group_frames,
    hash_at,
    nonzero_frames,
    unit_of,
)
from backyfs.store.digest import FAN_OUT, HASH, ZERO_HASH, digest, frame_count, node
from backyfs.store.format import Place
from backyfs.store.fs import forget_pages, read_exactly
from backyfs.store.record import DiskRecord

log = logging.getLogger(__name__)

BATCH_FRAMES = 16
"""Frames read at a time where many are read: 1 MiB."""

_COLUMNS = 64  # cached groups of frame hashes: 2 MiB at most
_LOCK_PATIENCE_S = 2.0
_LOCK_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Files:
    """The two files of a disk, as its record names them."""

    image: Path
    table: Path
    checksum: str

    @classmethod
    def of(cls, place: Place, disk: DiskRecord) -> Files:
        """Where the files lie. Corrupt when the record does not name exactly two."""
        images = [name for name in disk.files if name.endswith(".img")]
        tables = [name for name in disk.files if name.endswith(".sum")]
        if len(images) != 1 or len(tables) != 1 or len(disk.files) != 2:
            raise Corrupt(f"the record names no image and table for disk {disk.name}")
        directory = place.layout.revisions
        return cls(directory / images[0], directory / tables[0], disk.files[tables[0]])


class CowImage:
    """StoredImage over the two files of a disk."""

    def __init__(
        self, place: Place, revision: str, disk: DiskRecord, files: Files, check: bool
    ) -> None:
        self._place, self._revision, self._check = place, revision, check
        self.disk = disk
        self._columns: dict[int, bytes] = {}
        self._hopeless: set[int] = set()
        self._cache = threading.Lock()
        self.files = files
        self.fd = -1
        self.table: Table

    @classmethod
    def open(
        cls,
        place: Place,
        revision: str,
        disk: DiskRecord,
        *,
        check: bool,
        published: bool = True,
    ) -> CowImage:
        """Open a disk. Corrupt, NoRevision, Unsupported.

        `published`: as a reader, with its lock; else as somebody who knows that nobody removes
        the files, or does not care.
        """
        try:
            image = cls(place, revision, disk, Files.of(place, disk), check)
            try:
                image._open(published)
            except BaseException:
                image.close()
                raise
        except Corrupt as exc:
            raise Corrupt(exc.reason, vm=place.name, revision=revision, disk=disk.name) from exc
        return image

    def _open(self, published: bool) -> None:
        self.fd = self._open_file(self.files.image, published)
        if published:
            self._lock()
        status = os.fstat(self.fd)
        if published and status.st_nlink == 0:
            raise self._gone()
        if status.st_size != self.size:
            raise Corrupt(f"{self.files.image.name} has {status.st_size} bytes, not {self.size}")
        table_fd = self._open_file(self.files.table, published)
        try:
            self.table = Table.load(table_fd, self.size, self.files.checksum, self.files.table.name)
        except BaseException:
            os.close(table_fd)
            raise
        if digest(self.size, self.table.level1) != self.disk.digest:
            raise Corrupt(f"{self.files.table.name} does not have the digest of the record")

    def _open_file(self, path: Path, published: bool) -> int:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as exc:
            if published and not self._place.layout.record(self._revision).exists():
                raise self._gone() from exc
            raise Corrupt(f"revisions/{path.name} is missing") from exc

    def _gone(self) -> NoRevision:
        return NoRevision(
            f"{self._place.name}: revision {self._revision} was removed meanwhile",
            hint="see what there is with: backyfs status",
        )

    def _lock(self) -> None:
        # A remover asks for the exclusive lock for an instant, to see whether there are readers.
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                lock.share(self.fd)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Busy(
                        f"{self._place.name}/{self._revision}: another process keeps the image"
                        " locked",
                        hint="try again later",
                    ) from None
            time.sleep(_LOCK_POLL_S)

    def close(self) -> None:
        for fd in (self.fd, self.table.fd if hasattr(self, "table") else -1):
            if fd >= 0:
                os.close(fd)
        self.fd = -1
        if hasattr(self, "table"):
            self.table.fd = -1

    # What the image is

    @property
    def size(self) -> int:
        return self.disk.size

    @property
    def digest(self) -> str:
        return self.disk.digest

    @property
    def unit(self) -> str:
        """The quarantine's name of this image."""
        return unit_of(self.files.image)

    def groups(self) -> bytes:
        return self.table.level1

    def raw_fd(self) -> int | None:
        # Bytes read from a descriptor go past the check.
        return None if self._check else self.fd

    def shared_with(self, other: StoredImage) -> bool:
        return isinstance(other, CowImage) and os.path.samestat(
            os.fstat(self.fd), os.fstat(other.fd)
        )

    def unshared(self, other: StoredImage) -> Iterator[Extent]:
        if not isinstance(other, CowImage):
            return self.extents()
        if self.shared_with(other):
            return iter(())
        return whole_frames(self._apart(other), self.size)

    def _apart(self, other: CowImage) -> Iterator[Extent]:
        """Data in another place than `other`'s, and frames of another content."""
        yield from (e for e in apart(self.fd, other.fd, self.size) if e.offset < self.size)
        common = min(frame_count(self.size), frame_count(other.size))
        for group in range(-(-common // FAN_OUT)):
            if self.table.recorded(group) != other.table.recorded(group):
                yield from self._of_other_content(other, group, common)

    def _of_other_content(self, other: CowImage, group: int, common: int) -> Iterator[Extent]:
        first, end = group * FAN_OUT, min((group + 1) * FAN_OUT, common)
        try:
            mine, theirs = self.hashes(first, end - first), other.hashes(first, end - first)
        except Corrupt:
            yield Extent(first * FRAME, (end - first) * FRAME)
            return
        for number in different(mine, theirs):
            if not mine.startswith(ZERO_HASH, number * HASH):
                yield Extent((first + number) * FRAME, FRAME)

    # Reading

    def read(self, offset: int, length: int) -> bytes:
        self._require_range(offset, length)
        if not length:
            return b""
        if not self._check:
            return self._bytes(offset, length)
        first, end = offset // FRAME, -(-(offset + length) // FRAME)
        data = self._checked_frames(first, end)
        at = offset - first * FRAME
        return data if len(data) == length else data[at : at + length]

    def pieces(self, offset: int, length: int) -> list[bytes]:
        return [self.read(offset, length)]

    def try_read(self, offset: int, length: int) -> bytes | None:
        self._require_range(offset, length)
        if self._check or not length:
            return None if length else b""
        buffer = bytearray(length)
        try:
            done = os.preadv(self.fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError:  # would block, or the file system cannot tell: `read` will know
            return None
        return bytes(buffer) if done == length else None

    def _require_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(
                f"[{offset}, +{length}) is not within the {self.size} bytes of the disk"
            )

    def _bytes(self, offset: int, length: int) -> bytes:
        try:
            return read_exactly(self.fd, length, offset)
        except (OSError, EOFError) as exc:
            first, end = offset // FRAME, -(-(offset + length) // FRAME)
            bad = [frame for frame in range(first, end) if self.frame(frame) is None]
            if not bad:  # it reads well now
                return read_exactly(self.fd, length, offset)
            raise self._bad(bad, f"cannot be read: {exc}") from exc

    def _checked_frames(self, first: int, end: int) -> bytes:
        expected = self.hashes(first, end - first)
        data = self._bytes(first * FRAME, min(end * FRAME, self.size) - first * FRAME)
        wrong = different(frame_hashes(data), expected)
        if not wrong:
            return data
        # Once more, from the medium: healing may be writing this very frame.
        forget_pages(self.fd, first * FRAME, len(data))
        data = self._bytes(first * FRAME, len(data))
        wrong = different(frame_hashes(data), expected)
        if wrong:
            raise self._bad([first + number for number in wrong], "fails its checksum")
        return data

    def frame(self, number: int) -> bytes | None:
        """The stored bytes of a frame as they are, None when they cannot be read."""
        offset = number * FRAME
        try:
            return read_exactly(self.fd, min(FRAME, self.size - offset), offset)
        except (OSError, EOFError):
            return None

    def _bad(self, frames: list[int], reason: str) -> Corrupt:
        """Record bad frames; the error for the first run of them."""
        for number in frames:
            self._report(number, reason)
        first, end = next(runs(frames))
        offset = first * FRAME
        return self._corrupt(reason, offset, min(end * FRAME, self.size) - offset)

    def _corrupt(self, reason: str, offset: int, length: int) -> Corrupt:
        return Corrupt(
            reason,
            vm=self._place.name,
            revision=self._revision,
            disk=self.disk.name,
            offset=offset,
            length=length,
        )

    def _report(self, number: int, reason: str) -> None:
        # A reader of a store it may not write to, or a full one, can only say so.
        with contextlib.suppress(OSError, BackyfsError):
            damage.report(self._place, self, number, reason, self._revision, self.disk.name)

    # Holes

    def extents(self) -> Iterator[Extent]:
        data = data_extents(self.fd, 0, self.size)
        return merged(self._checked_extents(data)) if self._check else data

    def _checked_extents(self, data: Iterator[Extent]) -> Iterator[Extent]:
        """Whole frames, because a check reads these; also those that should not be holes.

        Reading such a frame is an error; left out, it would pass for zeros.
        """
        position = 0
        for extent in whole_frames(data, self.size):
            yield from self._lost(position // FRAME, extent.offset // FRAME)
            yield extent
            position = extent.end
        yield from self._lost(frame_count(position), frame_count(self.size))

    def _lost(self, first: int, end: int) -> Iterator[Extent]:
        for start, stop in nonzero_frames(self.table.fd, first, end):
            yield Extent(start * FRAME, min(stop * FRAME, self.size) - start * FRAME)

    # Hashes

    def hashes(self, first: int, count: int) -> bytes:
        if first < 0 or count < 0 or first + count > frame_count(self.size):
            raise ValueError(f"frames [{first}, +{count}) are not all in the disk")
        if not count:
            return b""
        groups = range(first // FAN_OUT, (first + count - 1) // FAN_OUT + 1)
        column = b"".join(self.column(group) for group in groups)
        at = (first - groups[0] * FAN_OUT) * HASH
        return column[at : at + count * HASH]

    def column(self, group: int) -> bytes:
        """The frame hashes of a group, proven by level 1. Corrupt when they cannot be."""
        with self._cache:
            found = self._columns.get(group)
        if found is not None:
            return found
        column = self.table.checked_column(group)
        if column is None:
            column = self._recomputed(group)
        with self._cache:
            while len(self._columns) >= _COLUMNS:
                del self._columns[next(iter(self._columns))]
            self._columns[group] = column
        return column

    def _recomputed(self, group: int) -> bytes:
        first, end = group_frames(group, self.size)
        if group not in self._hopeless:
            column = self._computed(first, end)
            if node(column) == self.table.recorded(group):
                return column
            self._hopeless.add(group)
        offset = first * FRAME
        raise self._corrupt(
            "the frame hashes fail their checksum", offset, min(end * FRAME, self.size) - offset
        )

    def _computed(self, first: int, end: int) -> bytes:
        parts = []
        for start, stop in batches(first, end):
            frames = self.batch(start, stop)
            parts.append(b"".join(frame_hashes(frame or b"\0") for frame in frames))
        return b"".join(parts)

    def batch(self, first: int, end: int) -> list[bytes | None]:
        """Frames as stored, None where one cannot be read."""
        offset = first * FRAME
        try:
            data = read_exactly(self.fd, min(end * FRAME, self.size) - offset, offset)
        except (OSError, EOFError):
            return [self.frame(number) for number in range(first, end)]
        return [data[at : at + FRAME] for at in range(0, len(data), FRAME)]

    # Checking

    def check(self, first: int, count: int) -> list[int]:
        if first < 0 or count < 0 or first + count > frame_count(self.size):
            raise ValueError(f"frames [{first}, +{count}) are not all in the disk")
        end = first + count
        bad: list[int] = []
        for group in range(first // FAN_OUT, -(-end // FAN_OUT)):
            start, stop = group_frames(group, self.size)
            forget_pages(self.table.fd, hash_at(start), (stop - start) * HASH)
            bad += self._check_group(group, max(first, start), min(end, stop))
        self._remember(first, end, bad)
        return bad

    def _check_group(self, group: int, first: int, end: int) -> list[int]:
        column = self.table.checked_column(group)
        sound_table = column is not None
        if column is None:
            try:
                column = self.column(group)
            except Corrupt:
                return list(range(first, end))
        base = group * FAN_OUT
        bad = set() if sound_table else self._wrong_entries(group, column)
        for start, stop in runs(self._stored_frames(column, base, first, end)):
            for low, high in batches(start, stop):
                bad.update(self._check_batch(column, base, low, high))
        return sorted(number for number in bad if first <= number < end)

    def _wrong_entries(self, group: int, proven: bytes) -> set[int]:
        try:
            wrong = different(self.table.column(group), proven)
        except (OSError, EOFError):
            return set(range(*group_frames(group, self.size)))
        return {group * FAN_OUT + number for number in wrong}

    def _stored_frames(self, column: bytes, base: int, first: int, end: int) -> list[int]:
        """Frames that should not be zero, or that are no holes."""
        found = {
            number
            for number in range(first, end)
            if not column.startswith(ZERO_HASH, (number - base) * HASH)
        }
        for extent in data_extents(self.fd, first * FRAME, min(end * FRAME, self.size)):
            found.update(range(extent.offset // FRAME, -(-extent.end // FRAME)))
        return sorted(found)

    def _check_batch(self, column: bytes, base: int, first: int, end: int) -> list[int]:
        offset, length = first * FRAME, min(end * FRAME, self.size) - first * FRAME
        forget_pages(self.fd, offset, length)
        bad = []
        for number, data in enumerate(self.batch(first, end), first):
            at = (number - base) * HASH
            if data is None or frame_hashes(data) != column[at : at + HASH]:
                bad.append(number)
        forget_pages(self.fd, offset, length)
        return bad

    def _remember(self, first: int, end: int, bad: list[int]) -> None:
        """Record bad frames; forget records of frames that read well."""
        for number in bad:
            self._report(number, "fails its checksum")
        listed = damage.frames_of(self._place, self.unit)
        for number in sorted(listed - set(bad)):
            if first <= number < end:
                with contextlib.suppress(OSError, BackyfsError):
                    damage.clear(self._place, self.unit, number)


def batches(first: int, end: int) -> Iterator[tuple[int, int]]:
    """Frames [first, end) in pieces worth one read."""
    for start in range(first, end, BATCH_FRAMES):
        yield start, min(start + BATCH_FRAMES, end)
