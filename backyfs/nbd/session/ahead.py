"""Read-ahead for a client that reads in sequence: helpers decode what it will want next.

Holes belong to a sequence: a client that knows them asks for data only. Helpers mostly wait here
for the processes that decode (store/packs/decoders.py), and take turns among connections.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from backyfs.model import Extent
from backyfs.nbd.attached import Attached
from backyfs.nbd.helpers import Helpers, Job
from backyfs.reader.cache import ReadAhead
from backyfs.store.packs.decoders import PROCESSES

PIECE_BYTES = 1 << 20
_PIECES = 8
"""That many are decoded by one helper at one go; then it is another connection's turn."""


class Ahead:
    """The read-ahead of one connection; nothing where the kernel does it, for raw images.

    `window` says how far ahead, in bytes. One thread notes and drops; helpers do the rest.
    """

    def __init__(self, attached: Attached, helpers: Helpers, window: Callable[[], int]) -> None:
        self._attached, self._helpers, self._window = attached, helpers, window
        decoded = attached.raw_fd is None
        self._reads = ReadAhead(attached.info.size) if decoded else None
        self._turns: list[Job[_Turn]] = []
        self._end = 0
        self._sequential = self._dropped = False

    def note(self, offset: int, length: int) -> None:
        """A range is being read."""
        if self._reads is None:
            return
        if self._sequential and self._attached.hole(self._end, offset):
            self._reads.skip(offset)
        self._end = offset + length
        self._sequential = self._reads.note(offset, length)
        if self._sequential:
            self._begin(self._reads)

    def _begin(self, reads: ReadAhead) -> None:
        """Ask for helpers when half of what was decoded ahead is used."""
        self._turns = [turn for turn in self._turns if not turn.over]
        while len(self._turns) < PROCESSES:
            extent = reads.due(self._window() // 2, PIECE_BYTES)
            if extent is None:
                return
            self._offer(extent)

    def _offer(self, extent: Extent) -> None:
        turn = Job([_Turn(self.decode, extent)])
        self._turns.append(turn)
        self._helpers.offer(turn, 1)

    def decode(self, extent: Extent) -> None:
        """Decode this, and what is due then; the rest in another turn."""
        assert self._reads is not None
        due: Extent | None = extent
        for _ in range(_PIECES):
            if due is None or self._dropped:
                return
            self._attached.prefetch(due.offset, due.length)
            due = self._reads.due(self._window(), PIECE_BYTES)
        if due is not None:
            self._offer(due)

    def drop(self) -> None:
        """Forget what has not begun; return when nobody uses the image for it any more."""
        self._dropped = True
        for turn in list(self._turns):  # one that ends just now may offer another: for nothing
            turn.drop()


class _Turn:
    """An extent that will probably be read soon: where a helper begins."""

    __slots__ = ("_decode", "_extent")

    def __init__(self, decode: Callable[[Extent], None], extent: Extent) -> None:
        self._decode, self._extent = decode, extent

    def __call__(self) -> None:
        # The read that needs it will say what is wrong; and nothing else may end a helper.
        with contextlib.suppress(Exception):
            self._decode(self._extent)
