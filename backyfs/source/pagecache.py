"""Reads a big file without driving everybody else's pages out of the host's page cache.

Pages that were cached before we came (a running VM's, say) stay; those our reading brought in are
given back a little later. Residency is sampled per window, one window ahead of the reader,
because the kernel's read-ahead would otherwise make our own pages look like somebody else's.
Costs 9 us per 2 MiB, where reading 2 MiB from the cache costs 70. Safe from many threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import threading

WINDOW = 32 << 20
"""Bytes sampled, and given back, at once; more than the kernel ever reads ahead."""

_WINDOWS_KEPT = 4
_PAGE = mmap.PAGESIZE
_BROUGHT_IN = re.compile(rb"\0+")
_ODD_TO_RESIDENT = bytes(value & 1 for value in range(256))
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int64),
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


class PageCache:
    """The page cache of one open file of `size` bytes; the descriptor stays the caller's."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd, self._size = fd, size
        self._lock = threading.Lock()
        self._before: dict[int, bytes] = {}  # window -> one byte per page: cached before us
        self._entered: dict[int, None] = {}  # windows read from, oldest first
        self._address = self._mapped()

    def _mapped(self) -> int | None:
        """Where the file is mapped, only to ask about its pages; None = cannot be asked."""
        if not self._size:
            return None
        found: int | None = _libc.mmap(
            None, self._size, mmap.PROT_READ, mmap.MAP_SHARED, self._fd, 0
        )
        return None if found == _MAP_FAILED else found

    def before_reading(self, offset: int, length: int) -> None:
        """To be called before `length` > 0 bytes at `offset` are read."""
        if self._address is None:
            return
        for window in range(offset // WINDOW, (offset + length - 1) // WINDOW + 1):
            if window not in self._entered:
                with self._lock:
                    self._enter(window)

    def _enter(self, window: int) -> None:
        for number in (window, window + 1):
            if number not in self._before:
                self._before[number] = self._resident(number)
        self._entered[window] = None
        while len(self._entered) > _WINDOWS_KEPT:
            self._give_back(next(iter(self._entered)))

    def _resident(self, window: int) -> bytes:
        length = min(WINDOW, self._size - window * WINDOW)
        if length <= 0 or self._address is None:
            return b""
        vector = ctypes.create_string_buffer(-(-length // _PAGE))
        if _libc.mincore(self._address + window * WINDOW, length, vector):
            return b""  # cannot be asked: nothing of it will be given back
        return vector.raw.translate(_ODD_TO_RESIDENT)

    def _give_back(self, window: int) -> None:
        del self._entered[window]
        for run in _BROUGHT_IN.finditer(self._before.pop(window, b"")):
            first, count = run.start(), run.end() - run.start()
            with contextlib.suppress(OSError):
                os.posix_fadvise(
                    self._fd,
                    window * WINDOW + first * _PAGE,
                    count * _PAGE,
                    os.POSIX_FADV_DONTNEED,
                )

    def close(self) -> None:
        """Give back what is left. To be called before the descriptor is closed."""
        with self._lock:
            for window in list(self._entered):
                self._give_back(window)
            if self._address is not None:
                _libc.munmap(self._address, self._size)
                self._address = None
