"""Read-ahead for a client that reads in sequence: helpers decode what it will want next."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from backyfs.nbd.attached import Attached
from backyfs.nbd.helpers import Helpers, Job
from backyfs.nbd.session.rounds import cut
from backyfs.reader.cache import ReadAhead

READ_AHEAD_BYTES = 1 << 20
_SHALLOW = 2
"""It is for clients that have few requests under way; others keep helpers busy anyway."""


class _Task:
    """A range that will probably be read soon: to be made cheap."""

    __slots__ = ("length", "offset", "prefetch")

    def __init__(self, prefetch: Callable[[int, int], None], offset: int, length: int) -> None:
        self.prefetch, self.offset, self.length = prefetch, offset, length

    def __call__(self) -> None:
        # The read that needs it will say what is wrong; and nothing else may end a helper.
        with contextlib.suppress(Exception):
            self.prefetch(self.offset, self.length)


class Ahead:
    """The read-ahead of one connection; nothing where the kernel does it, for raw images."""

    def __init__(self, attached: Attached, helpers: Helpers) -> None:
        self._attached, self._helpers = attached, helpers
        decoded = attached.raw_fd is None
        self._reads = ReadAhead(attached.info.size) if decoded else None
        self._job = Job[_Task]([])
        self._sequential = False

    def note(self, offset: int, length: int) -> None:
        """A range is being read."""
        if self._reads is not None:
            self._sequential = self._reads.note(offset, length)

    def look(self, requests: int) -> None:
        """Have the next bytes decoded while we wait for the client, who sent `requests`."""
        if self._reads is None or not self._sequential or requests > _SHALLOW:
            return
        if not self._job.over:
            return
        extent = self._reads.due(READ_AHEAD_BYTES, READ_AHEAD_BYTES // 2)
        if extent is not None:
            pieces = cut(extent.offset, extent.length)
            self._job = Job([_Task(self._attached.prefetch, *piece) for piece in pieces])
            self._helpers.offer(self._job, len(pieces))

    def drop(self) -> None:
        """Forget what has not begun; return when nobody uses the image for it any more."""
        self._job.drop()
