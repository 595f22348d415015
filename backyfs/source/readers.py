"""Descriptors of images, open for reading: through the page cache, and past it.

Both know their size when opened, read from many threads without sharing a position, and fail
with EBADF when read after `close`, instead of meeting another file of the same number.
"""

from __future__ import annotations

import mmap
import os
from typing import Protocol

from backyfs.source.pagecache import PageCache

_BLOCK = 4096  # direct reads are aligned to it; no device in use has larger logical blocks


class Reader(Protocol):
    """An open file or device."""

    fd: int
    size: int
    identity: os.stat_result

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer only where the file ends. OSError."""

    def close(self) -> None:
        """Close the descriptor."""


class FileReader:
    """Reads a regular file through the page cache, leaving that as it was found."""

    def __init__(self, fd: int, identity: os.stat_result | None = None) -> None:
        self.fd = fd
        self.size = os.fstat(fd).st_size
        self.identity = identity or os.fstat(fd)
        self._cache = PageCache(fd, self.size)

    def read(self, offset: int, length: int) -> bytes:
        """One pread: no other call may use the descriptor's position."""
        if length:
            self._cache.before_reading(offset, length)
        return os.pread(self.fd, length, offset)

    def close(self) -> None:
        """Give back what the page cache holds because of us, then close."""
        self._cache.close()
        os.close(self.fd)
        self.fd = -1


class DirectReader:
    """Reads past the page cache: a block device where it allows that, or a file open so."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size = os.lseek(fd, 0, os.SEEK_END)
        self.identity = os.fstat(fd)
        self._buffers: list[mmap.mmap] = []  # aligned, one per thread that ever read at a time

    def read(self, offset: int, length: int) -> bytes:
        """The bytes by way of an aligned buffer."""
        start = offset - offset % _BLOCK
        end = -(-(offset + length) // _BLOCK) * _BLOCK  # perhaps behind the end of the image
        if not length:
            return b""
        buffer = self._buffer(end - start)
        try:
            with memoryview(buffer) as view:
                got = self._fill(view[: end - start], start)
                return bytes(view[offset - start : min(got, offset - start + length)])
        finally:
            self._buffers.append(buffer)

    def _fill(self, view: memoryview, start: int) -> int:
        """How much could be read: a file system that gives less than asked for is asked again."""
        got = 0
        while got < len(view) and (more := os.preadv(self.fd, [view[got:]], start + got)):
            got += more
        return got

    def _buffer(self, length: int) -> mmap.mmap:
        try:
            buffer = self._buffers.pop()
        except IndexError:
            return mmap.mmap(-1, length)
        return buffer if len(buffer) >= length else mmap.mmap(-1, length)

    def close(self) -> None:
        """Close and free the buffers."""
        os.close(self.fd)
        self.fd = -1
        self._buffers.clear()
