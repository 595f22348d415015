"""Read-ahead for a client that reads in sequence: helpers decode what it will want next.

Holes belong to a sequence: a client that knows them asks for data only. Helpers mostly wait here
for the processes that decode (store/packs/decoders.py), and take turns among connections.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from backyfs.model import Extent
from backyfs.nbd.attached import Attached
from backyfs.nbd.helpers import Helpers, Job
from backyfs.reader.cache import ReadAhead
from backyfs.store.packs.decoders import PROCESSES

READ_AHEAD_BYTES = 16 << 20
"""So far at most, for what is stored decodes slower than it is sent, and a hole costs nothing."""
PIECE_BYTES = 1 << 20
_PIECES = 8
"""That many are decoded by one helper at one go; then it is another connection's turn."""
_PAUSE_S = 1.0
"""Who has asked for nothing for so long needs no room in the cache."""


class Window:
    """How far to decode ahead of each connection: all that read in sequence get a quarter of the
    cache. Where that is too little for two pieces each, nobody gets anything. For many threads.
    """

    def __init__(self, cache_bytes: int) -> None:
        self._bytes = cache_bytes // 4
        self._lock = threading.Lock()
        self._seen: dict[int, float] = {}
        self._next = 0.0

    def of(self, reader: object) -> int:
        """Bytes for one who reads in sequence at this moment."""
        now = time.monotonic()
        with self._lock:
            self._seen[id(reader)] = now
            if now > self._next:
                self._seen = {key: at for key, at in self._seen.items() if at >= now - _PAUSE_S}
                self._next = now + _PAUSE_S
            share = self._bytes // len(self._seen)
        return min(READ_AHEAD_BYTES, share) if share >= 2 * PIECE_BYTES else 0


class Ahead:
    """The read-ahead of one connection; nothing where the kernel does it, for raw images.

    One thread notes and drops; helpers do the rest.
    """

    def __init__(self, attached: Attached, helpers: Helpers, window: Window) -> None:
        self._attached, self._helpers, self._window = attached, helpers, window
        decoded = attached.raw_fd is None
        self._reads = ReadAhead(attached.info.size) if decoded else None
        self._lock = threading.Lock()
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
        window = self._window.of(self) // 2
        with self._lock:
            self._turns = [turn for turn in self._turns if not turn.over]
            free = PROCESSES - len(self._turns)
        for _ in range(free):
            extent = reads.due(window, PIECE_BYTES)
            if extent is None:
                return
            self._offer(extent)

    def _offer(self, extent: Extent) -> None:
        turn = Job([_Turn(self.decode, extent)])
        with self._lock:
            if self._dropped:
                return
            self._turns.append(turn)
        self._helpers.offer(turn, 1)

    def decode(self, extent: Extent) -> None:
        """Decode this, and what is due then; the rest in another turn."""
        assert self._reads is not None
        due: Extent | None = extent
        for _ in range(_PIECES):
            if due is None or self._dropped:
                return
            if due.end > self._end:  # not if the reader came first
                self._attached.prefetch(due.offset, due.length)
            due = self._reads.due(self._window.of(self), PIECE_BYTES)
        if due is not None:
            self._offer(due)

    def drop(self) -> None:
        """Forget what has not begun; return when nobody uses the image for it any more."""
        with self._lock:
            self._dropped = True
        for turn in self._turns:
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
