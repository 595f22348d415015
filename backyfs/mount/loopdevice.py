"""Loop devices that go away by themselves: a block device of a file, for as long as it is used.

The kernel detaches such a device (LO_FLAGS_AUTOCLEAR) when the last one closes it: whoever made it,
or the file system that was mounted from it. So nothing is left, however our process ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backyfs.errors import TargetError

_LOOP_CONFIGURE = 0x4C0A
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_CTL_GET_FREE = 0x4C82
_READ_ONLY, _AUTOCLEAR, _DIRECT_IO = 1, 4, 16
_SECTOR = 512
_NAME_BYTES_MAX = 63
_TRIES = 64
# struct loop_info64: device and inode of the file, rdev, offset, size limit; number, two of
# encryption, flags; name, two of encryption, two unused
_INFO = struct.Struct("=5Q4I64s64s32s2Q")
_CONFIG = struct.Struct(f"=2I{_INFO.size}s64x")


@dataclass(frozen=True, slots=True)
class Backing:
    """What the kernel knows of a loop device's file: `device` ("major:minor") of the file system it
    is on, and the `name` given when it was attached.

    Of a file whose server has died it may know no more than its path: then that is the `name`, and
    `device` is "".
    """

    device: str
    name: str


@contextmanager
def attached(
    fd: int, *, name: str, writable: bool, offset: int = 0, length: int = 0
) -> Iterator[Path]:
    """A loop device of the file open at `fd`, bytes [offset, offset + length) (0: to its end).

    Reads and writes go past the page cache to the file. The device stays attached while entered,
    and after that as long as somebody has it open or mounted. `name` is noted in it. TargetError.
    """
    flags = _AUTOCLEAR | _DIRECT_IO | (0 if writable else _READ_ONLY)
    noted = name.encode()[:_NAME_BYTES_MAX]
    info = _INFO.pack(0, 0, 0, offset, length, 0, 0, 0, flags, noted, b"", b"", 0, 0)
    config = _CONFIG.pack(fd, _SECTOR, info)
    try:
        path, device = _configured(config, os.O_RDWR if writable else os.O_RDONLY)
    except OSError as exc:
        raise TargetError(
            f"no loop device can be made: {exc.strerror}",
            hint="loop devices need root and the kernel's module loop (Linux 5.8 or newer)",
        ) from exc
    try:
        yield path
    finally:
        os.close(device)


def _configured(config: bytes, mode: int) -> tuple[Path, int]:
    """A free device, configured and open; others may be looking for one, too."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            path = Path(f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}")
            device = os.open(path, mode | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
                return path, device
            except BaseException as exc:
                os.close(device)
                if not (isinstance(exc, OSError) and exc.errno == errno.EBUSY):
                    raise
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "others take every free one")


def backing(path: Path) -> Backing | None:
    """The file of a loop device; None when it has none, or `path` is no loop device. OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_INFO.size))
    except OSError as exc:
        if exc.errno in (errno.ENXIO, errno.ENOTTY, errno.EINVAL):
            return None
        if exc.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            return _of_the_dead(path)
        raise
    finally:
        os.close(fd)
    fields = _INFO.unpack(data)
    device, name = fields[0], fields[9].partition(b"\0")[0]
    return Backing(f"{os.major(device)}:{os.minor(device)}", name.decode(errors="replace"))


def _of_the_dead(path: Path) -> Backing | None:
    """The kernel asks the file's server for its attributes before it answers; its path it knows."""
    try:
        return Backing("", Path(f"/sys/block/{path.name}/loop/backing_file").read_text().strip())
    except FileNotFoundError:  # it was just detached
        return None
