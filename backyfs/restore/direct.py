"""Writing past the page cache: what a restore writes is not read again.

Saves a third of the processor time of writing, and the host keeps its cache. The kernel wants
aligned offsets, lengths and memory; what cannot be aligned (the tail of a disk of odd size), or a
file system without O_DIRECT, goes the ordinary way.
"""

from __future__ import annotations

import errno
import os

from backyfs.restore.target import pwrite_all
from backyfs.store.fs import SYSTEM

ALIGNMENT = 4096


class DirectFile:
    """Writes at any place of an open file, from many threads. Does not own the descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._direct_fd = _direct(fd)

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` (see Target.write), from byte `offset` on. OSError."""
        if self._direct_fd >= 0 and not (offset % ALIGNMENT or len(data) % ALIGNMENT):
            self._write(data, offset)
        else:
            pwrite_all(self._fd, data, offset)
            # Without this nothing is written before the end, which then waits for all of it.
            SYSTEM.start_writeback(self._fd, offset, len(data))

    def _write(self, data: memoryview, offset: int) -> None:
        try:
            done = os.pwrite(self._direct_fd, data, offset)
        except OSError as exc:
            if exc.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            done = 0  # this file system wants another alignment, or has none of it after all
        if done < len(data):  # an interrupted or nearly full file system: no alignment to keep
            pwrite_all(self._fd, data[done:], offset + done)

    def close(self) -> None:
        """Give back the second descriptor; closing twice is harmless."""
        if self._direct_fd >= 0:
            os.close(self._direct_fd)
            self._direct_fd = -1


def _direct(fd: int) -> int:
    """A descriptor of its own, with O_DIRECT, of the file behind `fd`; -1 where there is none."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return -1
