"""How a READ is answered: at once, with the others of its round, in parts, or as a stream.

What is at hand (cached, a single frame of a disk that is quick) is answered at once: a single frame
takes so little time between two steps of the interpreter that two threads would mostly wait for
each other. Longer reads and those of a slow disk go into the round.
"""

from __future__ import annotations

import time

from backyfs.errors import BackyfsError
from backyfs.model import FRAME
from backyfs.nbd.attached import Attached
from backyfs.nbd.protocol.transmission import Read
from backyfs.nbd.session.ahead import Ahead
from backyfs.nbd.session.replies import Replies
from backyfs.nbd.session.rounds import PIECE_BYTES, SLOW_S, Reading, Round, cut
from backyfs.nbd.session.streaming import Streaming
from backyfs.store.contract import Buffer

WHOLE_BYTES = 1 << 20
"""Reads whose answer must be one part are held up to this length; longer ones are streamed."""


class Reads:
    """Answers the READs of a connection; `begin` and `finish` around those that came together."""

    def __init__(
        self,
        attached: Attached,
        replies: Replies,
        round_: Round,
        streaming: Streaming,
        ahead: Ahead,
    ) -> None:
        self._attached, self._replies, self._round = attached, replies, round_
        self._streaming, self._ahead = streaming, ahead
        self._form, self._structured = replies.form, replies.form.structured
        self._alone = 0  # reads for which no helper was asked, since `begin`
        self._begun = 0.0

    def begin(self) -> None:
        """Requests arrived."""
        self._alone, self._begun = 0, time.perf_counter()

    def finish(self) -> None:
        """All of them were taken: do those that are not answered yet. OSError, Stalled."""
        if self._alone and time.perf_counter() - self._begun > SLOW_S * self._alone:
            self._round.slow = True
        self._round.work()

    def read(self, event: Read) -> None:
        """Answer a request, now or in this round."""
        cookie, offset, length, whole = event
        traffic = self._replies.traffic
        traffic.requests += 1
        traffic.read += length
        self._ahead.note(offset, length)
        small = length <= PIECE_BYTES and not self._streaming.by_kernel(length)
        if small and self._small(event):
            return
        if whole or not self._structured:
            self._whole(cookie, offset, length)
        else:
            self._parts(cookie, offset, length)

    def _small(self, event: Read) -> bool:
        """Answer a read at once or in this round; False if it should be answered in parts."""
        cookie, offset, length, whole = event
        if not length or (self._structured and not self._attached.stored(offset, length)):
            return False
        data = self._at_once(offset, length)
        if data is None:
            self._round.add(offset, length, Reading(cookie, whole=whole))
            return True
        self._replies.put(self._form.data(cookie, offset, length, last=True), data)
        return True

    def _at_once(self, offset: int, length: int) -> Buffer | None:
        """Bytes that need no helper: in memory, or a frame of a disk that is quick."""
        if self._round.slow or length > FRAME:
            return self._attached.try_read(offset, length)
        self._alone += 1
        try:
            return self._attached.read(offset, length)
        except (BackyfsError, OSError):
            return None  # the round reads it again, and tells

    def _parts(self, cookie: int, offset: int, length: int) -> None:
        """In chunks: data, holes, errors."""
        reading = Reading(cookie)
        reading.parts = 1  # until the last chunk is known
        for start, end, stored in self._attached.pieces(offset, length):
            if not stored:
                self._replies.put(self._form.hole(cookie, start, end - start, last=False))
            elif self._streaming.by_kernel(end - start):
                self._streaming.file(cookie, start, end - start)
            else:
                self._pieces(start, end, reading)
        reading.parts -= 1
        if not reading.parts:
            self._replies.put(self._form.end(cookie))

    def _pieces(self, start: int, end: int, reading: Reading) -> None:
        for at, count in cut(start, end - start):
            self._round.add(at, count, reading)
            if self._round.full:
                self._round.work()

    def _whole(self, cookie: int, offset: int, length: int) -> None:
        """In one part."""
        if not length:
            done = self._form.end if self._structured else self._form.done
            self._replies.put(done(cookie))
        elif length <= WHOLE_BYTES:
            self._round.add(offset, length, Reading(cookie, whole=True))
        else:
            self._streaming.whole(cookie, offset, length)
