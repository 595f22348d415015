"""Lines from a descriptor that nobody vouches for: bounded in length and in time."""

from __future__ import annotations

import os

from backyfs.source.quiescing.waiting import Waiting

LINE_MAX = 1 << 20
"""Bytes of the longest line that is taken; the longest honest one has about 10 KiB."""

_READ = 65536


class Lines:
    """Reads from a non-blocking descriptor; does not own it."""

    def __init__(self, fd: int) -> None:
        self._fd, self._data = fd, bytearray()

    def line(self, waiting: Waiting) -> bytes:
        """The next line, without its end. EOFError, TimeoutError, Stopped, OSError; ValueError:
        it is too long.
        """
        return self.until(b"\n", waiting)

    def until(self, mark: bytes, waiting: Waiting) -> bytes:
        """What comes before the byte `mark`, which is dropped; as `line`."""
        searched = 0
        while (at := self._data.find(mark, searched)) < 0:
            searched = len(self._data)
            if searched > LINE_MAX:
                raise ValueError(f"more than {LINE_MAX} bytes without an end")
            self._more(waiting)
        found = bytes(self._data[:at])
        del self._data[: at + 1]
        return found

    def _more(self, waiting: Waiting) -> None:
        waiting.for_any([self._fd])
        try:
            data = os.read(self._fd, _READ)
        except BlockingIOError:
            return
        if not data:
            raise EOFError("the connection was closed")
        self._data += data
