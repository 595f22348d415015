"""What `cow` asks of a file system: shared blocks and holes, by ioctl and lseek.

Reading questions go to the kernel directly; whatever changes something goes through `Fs` (its
`call` hook at least), so that tests can fail it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from backyfs.errors import UsageError
from backyfs.model import Extent
from backyfs.store.cow.blocks import BLOCK, ZERO_BLOCK
from backyfs.store.fs import Fs, temporary
from backyfs.store.layout import Layout

_BTRFS_MAGIC = 0x9123683E
_XFS_MAGIC = 0x58465342
_FS_IOC_FSGETXATTR = 0x801C581F
_FS_IOC_FSSETXATTR = 0x401C5820
_XFLAG_COWEXTSIZE = 0x00010000
_FSXATTR = struct.Struct("=IIIII8x")  # xflags, extsize, nextents, project, cowextsize

_CANNOT = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS)

_libc = ctypes.CDLL(None, use_errno=True)


def _magic(path: Path) -> int:
    """The file system's magic number, 0 when there is no such path."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), buffer):
        return 0
    return int(ctypes.c_long.from_buffer(buffer).value) & 0xFFFFFFFF


def is_btrfs(path: Path) -> bool:
    """Whether `path` exists and lies on btrfs."""
    return _magic(path) == _BTRFS_MAGIC


def prepare_directory(layout: Layout, fs: Fs) -> None:
    """Make revisions/ fit for images that share blocks; UsageError where that cannot work."""
    if _magic(layout.revisions) == _XFS_MAGIC:
        _set_cow_extent_size(layout.revisions, fs)
    _try_clone(layout.revisions, fs)


def _set_cow_extent_size(directory: Path, fs: Fs) -> None:
    # XFS preallocates 128 KiB around each write into a shared file: a random 4 KiB increment
    # would take twenty times its size until the file system reclaims it. New files inherit this.
    unit = max(BLOCK, os.statvfs(directory).f_bsize)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        now = fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size))
        flags, extsize, extents, project, _ = _FSXATTR.unpack(now)
        wanted = _FSXATTR.pack(flags | _XFLAG_COWEXTSIZE, extsize, extents, project, unit)
        fs.call("cowextsize")
        fcntl.ioctl(fd, _FS_IOC_FSSETXATTR, wanted)
    except OSError as exc:
        if exc.errno not in _CANNOT:  # an XFS without reflink: the trial says so better
            raise
    finally:
        os.close(fd)


def cow_extent_size(path: Path) -> int:
    """The copy-on-write preallocation of a file or directory on XFS, in bytes; 0 = default."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        now = fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size))
    finally:
        os.close(fd)
    return int(_FSXATTR.unpack(now)[4])


def _try_clone(directory: Path, fs: Fs) -> None:
    with contextlib.ExitStack() as stack:
        source, target = (_trial_file(directory, fs, stack) for _ in range(2))
        fs.pwrite(source, ZERO_BLOCK, 0, directory)
        clone(fs, source, target, directory)


def _trial_file(directory: Path, fs: Fs, stack: contextlib.ExitStack) -> int:
    name = temporary(directory / "reflink")
    fd = fs.create(name)
    stack.callback(fs.unlink, name)
    stack.callback(os.close, fd)
    return fd


def clone(fs: Fs, source_fd: int, target_fd: int, path: Path) -> None:
    """As `Fs.clone`; UsageError where the file system has no reflinks."""
    try:
        fs.clone(source_fd, target_fd, path)
    except OSError as exc:
        if exc.errno in _CANNOT:
            raise UsageError(
                f"store cow needs btrfs or XFS with reflink: {path} cannot share blocks"
                f" ({exc.strerror})",
                hint="use such a file system, or --store packs (backyfs copy converts)",
            ) from exc
        raise


def data_extents(fd: int, start: int, end: int) -> Iterator[Extent]:
    """Extents within [start, end) that are no holes, sorted and touching-free."""
    position = start
    while position < end:
        try:
            data = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # nothing but hole up to the end
                return
            if exc.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            yield Extent(position, end - position)  # a file system that cannot tell
            return
        if data >= end:
            return
        position = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        yield Extent(data, position - data)
