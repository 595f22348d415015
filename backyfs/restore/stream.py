"""Restoring to stdout, a pipe or a character device: every byte in order, holes as zeros."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable

from backyfs.model import Extent
from backyfs.restore.target import BATCH_BYTES, ZEROS, using, write_all

_PIPE_BYTES = 1 << 20  # the largest an unprivileged process may ask for


class Stream:
    """A target that takes bytes one after the other; it owns the descriptor unless told not to."""

    in_order = True
    writers = 1
    batch_bytes = BATCH_BYTES
    holes_are_zero = False
    head_bytes = 0

    def __init__(self, fd: int, name: str, *, owned: bool = True) -> None:
        self.name = name
        self._fd = fd
        self._owned = owned
        self._position = 0
        with contextlib.suppress(OSError):  # not a pipe, or not allowed: only slower
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def reserve(self, extents: Iterable[Extent]) -> None:
        """Nothing to do: a stream has no room of its own."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write `data`; `offset` must be where the last bytes ended."""
        assert offset == self._position
        with using(self.name):
            write_all(self._fd, data)
        self._position += len(data)

    def zero(self, offset: int, length: int) -> None:
        """Write zeros; `offset` must be where the last bytes ended."""
        end = offset + length
        while offset < end:
            piece = ZEROS[: min(len(ZEROS), end - offset)]
            self.write(offset, piece)
            offset += len(piece)

    def settle(self) -> None:
        """Nothing to do: a stream keeps no bytes of ours."""

    def finish(self) -> None:
        """Close what we opened; the reader sees the end."""
        self._close()

    def abandon(self) -> None:
        """As `finish`: only the exit code tells the reader that bytes are missing."""
        self._close()

    def _close(self) -> None:
        if self._owned:
            self._owned = False
            os.close(self._fd)
