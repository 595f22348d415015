"""A round: the reads that a client asked for at once, done by several threads.

What answers a READ may be one part or several; the parts are read by whichever thread is free, and
go out as they are ready.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from backyfs.nbd.attached import Attached
from backyfs.nbd.helpers import Helpers, Job
from backyfs.nbd.session.failure import Failure, Failures
from backyfs.nbd.session.replies import Replies
from backyfs.store.contract import Buffer

ROUND_BYTES = 2 << 20
"""Reads under way at a time."""
PIECE_BYTES = 256 << 10
"""Reads longer than this are split, so that helpers can take a part."""
SLOW_S = 0.002
"""Who takes longer for a read has waited for a disk."""
_EARLY_BUFFERS = 8


def cut(offset: int, length: int) -> list[tuple[int, int]]:
    """A range in pieces (offset, length)."""
    end = offset + length
    return [(at, min(PIECE_BYTES, end - at)) for at in range(offset, end, PIECE_BYTES)]


class Reading:
    """A READ under way: how many parts of its answer are to come, whether it must be one part."""

    __slots__ = ("cookie", "failed", "parts", "whole")

    def __init__(self, cookie: int, *, whole: bool = False) -> None:
        self.cookie, self.whole = cookie, whole
        self.parts, self.failed = 0, False


class _Part:
    """A range to be read as a part of an answer, by whichever thread; then `data` or `error`."""

    __slots__ = ("data", "error", "length", "offset", "read", "reading")

    def __init__(
        self,
        read: Callable[[int, int], Buffer],
        offset: int,
        length: int,
        reading: Reading,
    ) -> None:
        self.read, self.offset, self.length, self.reading = read, offset, length, reading
        self.data: Buffer = b""
        self.error: BaseException | None = None

    def __call__(self) -> None:
        try:
            self.data = self.read(self.offset, self.length)
        except BaseException as exc:  # for the thread that collects it
            self.error = exc


class Round:
    """Collects parts, has them read, and puts the answers."""

    def __init__(
        self, attached: Attached, replies: Replies, failures: Failures, helpers: Helpers
    ) -> None:
        self.slow = False
        """Whether the last reads took so long that a disk must have been waited for."""
        self._attached, self._replies, self._form = attached, replies, replies.form
        self._failures, self._helpers = failures, helpers
        self._parts: list[_Part] = []
        self._bytes = 0

    @property
    def full(self) -> bool:
        """Whether it should be worked on before more is added."""
        return self._bytes >= ROUND_BYTES

    def add(self, offset: int, length: int, reading: Reading) -> None:
        """Have a range read in this round."""
        reading.parts += 1
        self._parts.append(_Part(self._attached.read, offset, length, reading))
        self._bytes += length

    def work(self) -> None:
        """Read all ranges, and put or send their answers. OSError and Stalled of sending."""
        if not self._parts:
            return
        parts, self._parts, self._bytes = self._parts, [], 0
        started = time.perf_counter()
        job = Job(parts)
        self._helpers.offer(job, len(parts) - 1, waiting=self.slow)
        try:
            self._replies.send()  # helpers have begun
            for part in job.done():
                self._collect(part)
                self._send_early()
        finally:
            job.drop()  # when the client is gone, the image is closed next
        self.slow = time.perf_counter() - started > SLOW_S * len(parts)

    def _send_early(self) -> None:
        """What is ready goes out, so that the client asks on while we go on."""
        replies = self._replies
        if replies.held >= PIECE_BYTES or (self.slow and len(replies.buffers) >= _EARLY_BUFFERS):
            replies.send()

    def _collect(self, part: _Part) -> None:
        reading = part.reading
        reading.parts -= 1
        last = not reading.parts
        if part.error is not None:
            self._damaged(part, last)
            return
        header = self._form.data(reading.cookie, part.offset, part.length, last=last)
        self._replies.put(header, part.data)

    def _damaged(self, part: _Part, last: bool) -> None:
        """The answer for a part that could not be read; frame by frame, where it may be split."""
        reading, failure = part.reading, self._failures.of(part.error, part.offset, part.length)
        self._replies.traffic.errors += not reading.failed
        reading.failed = True
        if not self._form.structured:
            self._replies.put(self._form.error(reading.cookie, failure.number, failure.text))
        elif reading.whole:
            self._put_error(reading.cookie, failure, last)
        else:
            self._put_frames(part, failure, last)

    def _put_frames(self, part: _Part, failure: Failure, last: bool) -> None:
        """Every frame of a part as data, or as its error."""
        frames = self._attached.frames(part.offset, part.length)
        for index, (at, count) in enumerate(frames, 1):
            final = last and index == len(frames)
            try:
                if len(frames) == 1:
                    raise failure
                data = self._failures.read(at, count)
            except Failure as exc:
                self._put_error(part.reading.cookie, exc, final)
            else:
                header = self._form.data(part.reading.cookie, at, count, last=final)
                self._replies.put(header, data)

    def _put_error(self, cookie: int, failure: Failure, last: bool) -> None:
        number, text, offset = failure.number, failure.text, failure.offset
        self._replies.put(self._form.error_at(cookie, number, text, offset, last=last))
