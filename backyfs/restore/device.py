"""Restoring to a block device, opened exclusively: nobody may have it mounted or in use.

Holes are made to read as zeros by the cheapest call that promises it: deallocation
(FALLOC_FL_PUNCH_HOLE, which a device without a zeroing deallocation refuses), then BLKZEROOUT,
then written zeros. BLKDISCARD promises nothing and is not used.

The first bytes go in last, so that an interrupted restore leaves no partition table and no
superblock behind. What the device has beyond the image stays as it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from backyfs.errors import TargetError
from backyfs.model import Extent
from backyfs.restore.direct import DirectFile
from backyfs.restore.regular import HEAD_BYTES
from backyfs.restore.target import BATCH_BYTES, WRITERS, pwrite_zeros, using
from backyfs.store.fs import SYSTEM, read_exactly

_BLKZEROOUT = 0x127F
_BLKSSZGET = 0x1268
_BLKROGET = 0x125E
_ZERO_BYTES_MAX = 64 << 20  # per call, so that a restore can be interrupted


class Device:
    """A block device as a target; `device_size` is its own size in bytes.

    Opening it takes its head away, unless `keep`: then what it holds stays where it is not
    written, and can be read.
    """

    in_order = False
    writers = WRITERS
    batch_bytes = BATCH_BYTES
    holes_are_zero = False
    head_bytes = HEAD_BYTES

    def __init__(self, path: Path, size: int, *, keep: bool = False) -> None:
        self.name = str(path)
        self._size = size
        self._fd = _open_exclusively(path, os.O_RDWR)
        try:
            self.device_size = _size_for(self._fd, path, size)
            self._sector = _sector_bytes(self._fd)
            self._zeroing: list[Callable[[int, int], None]] = [self._punch, self._zero_out]
            if not keep:
                with using(self.name):
                    pwrite_zeros(self._fd, 0, min(HEAD_BYTES, size))
                    os.fsync(self._fd)
        except BaseException:
            os.close(self._fd)
            raise
        self._bytes = DirectFile(self._fd)
        self._open = True

    def reserve(self, extents: Iterable[Extent]) -> None:
        """Nothing to do: a device has its size."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write `data` at byte `offset`."""
        with using(self.name):  # a thin volume's pool may be full
            self._bytes.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros: whole sectors by the device, the rest by writing."""
        end = offset + length
        first = -(-offset // self._sector) * self._sector
        last = end // self._sector * self._sector
        with using(self.name):
            if first >= last:
                pwrite_zeros(self._fd, offset, length)
                return
            pwrite_zeros(self._fd, offset, first - offset)
            for start in range(first, last, _ZERO_BYTES_MAX):
                self._zero_sectors(start, min(_ZERO_BYTES_MAX, last - start))
            pwrite_zeros(self._fd, last, end - last)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of what the device holds now."""
        with using(self.name, "read"):
            return read_exactly(self._fd, length, offset)

    def data(self) -> Iterator[Extent]:
        """All of it: a device does not tell where it has data."""
        return iter([Extent(0, self._size)] if self._size else [])

    def _zero_sectors(self, offset: int, length: int) -> None:
        for method in list(self._zeroing):
            try:
                return method(offset, length)
            except OSError as exc:
                if exc.errno in (errno.ENOSPC, errno.EIO):
                    raise
                with contextlib.suppress(ValueError):  # another thread may have been first
                    self._zeroing.remove(method)
        return pwrite_zeros(self._fd, offset, length)

    def _punch(self, offset: int, length: int) -> None:
        SYSTEM.punch(self._fd, offset, length, self.name)

    def _zero_out(self, offset: int, length: int) -> None:
        fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("QQ", offset, length))

    def settle(self) -> None:
        """Flush the device."""
        with using(self.name):
            os.fsync(self._fd)

    def finish(self) -> None:
        """Flush the device and give it back."""
        self.settle()
        self.abandon()

    def abandon(self) -> None:
        """Give the device back; without its first bytes it shows no partitions."""
        if self._open:
            self._open = False
            self._bytes.close()
            os.close(self._fd)


def check(path: Path, size: int) -> None:
    """Raise what keeps the device from being a target for `size` bytes; it is only looked at."""
    fd = _open_exclusively(path, os.O_RDONLY)
    try:
        _size_for(fd, path, size)
    finally:
        os.close(fd)


def _size_for(fd: int, path: Path, size: int) -> int:
    """The device's own size, if an image of `size` bytes may be written to it and fits."""
    if _is_read_only(fd):
        raise _read_only(path)
    found = os.lseek(fd, 0, os.SEEK_END)
    if found < size:
        raise TargetError(
            f"{path} has {found} bytes, the image {size}", hint="restore to a larger device"
        )
    return found


def _open_exclusively(path: Path, mode: int) -> int:
    try:
        return os.open(path, mode | os.O_EXCL | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno == errno.EROFS:  # a disk with a write-protect switch; a loop device opens
            raise _read_only(path) from exc
        if exc.errno != errno.EBUSY:
            raise
        raise TargetError(
            f"{path} is in use: mounted, swap, or part of LVM, RAID or another device",
            hint="see what uses it with: lsblk",
        ) from exc


def _read_only(path: Path) -> TargetError:
    return TargetError(
        f"{path} is read-only", hint=f"blockdev --setrw {path}, or attach it writable"
    )


def _is_read_only(fd: int) -> bool:
    return _asked(fd, _BLKROGET) != 0


def _sector_bytes(fd: int) -> int:
    """The logical block size of a device."""
    return _asked(fd, _BLKSSZGET)


def _asked(fd: int, request: int) -> int:
    """What a device answers to a request for a number."""
    answer = bytearray(4)
    fcntl.ioctl(fd, request, answer)
    return int(struct.unpack("i", answer)[0])


def openers(path: Path) -> Iterator[int]:
    """Process ids, other than ours, that have the device open (those we may look into)."""
    wanted = os.path.realpath(path)
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):
                if any(os.readlink(fd) == wanted for fd in (process / "fd").iterdir()):
                    yield int(process.name)


def loops(path: Path) -> Iterator[str]:
    """Loop devices on the device: the kernel does not open it exclusively for them."""
    wanted = os.stat(path).st_rdev
    for attached in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            backing = attached.read_text(errors="surrogateescape").removesuffix("\n")
            # Only among the devices: to look at a file may mean to wait for its server.
            if backing.startswith("/dev/") and os.stat(backing).st_rdev == wanted:
                yield f"/dev/{attached.parts[3]}"
