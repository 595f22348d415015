"""The transmission phase of one connection: a loop in a thread of its own.

Bytes are received, all requests in them are served, and their replies go out together: few system
calls for many requests. What is at hand (cached, a hole, a single frame of a disk that is quick) is
answered at once. Longer reads and those of a slow disk are collected and done by this thread with
what helpers are free (helpers.py); a single frame takes so little time between two steps of the
interpreter that two threads would mostly wait for each other. Replies may overtake each other, as
the protocol allows. A client that does not read its replies blocks this thread and nothing else.

Memory of a connection: what one receive takes (256 KiB), reads under way (at most ROUND_BYTES and
one read of 1 MiB), and as much again of replies that are not sent yet; through TLS the encrypted
form of one piece more. Reads of up to 32 MiB are served piece by piece.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backyfs.errors import BackyfsError, Corrupt
from backyfs.model import FRAME
from backyfs.nbd.attached import Attached
from backyfs.nbd.channel import Channel, Idle, Stalled
from backyfs.nbd.helpers import Helpers, Job
from backyfs.nbd.protocol.constants import DESCRIPTORS_MAX, STATE_HOLE, STATE_ZERO
from backyfs.nbd.protocol.handshake import ProtocolError
from backyfs.nbd.protocol.transmission import (
    Cache,
    Disconnect,
    Event,
    Flush,
    Read,
    Refused,
    Status,
    Transmission,
    Write,
    WriteData,
    Zero,
)
from backyfs.reader.cache import ReadAhead
from backyfs.store.contract import Buffer

log = logging.getLogger(__name__)

RECEIVE_BYTES = 256 << 10
ROUND_BYTES = 2 << 20
"""Reads under way at a time."""
PIECE_BYTES = 256 << 10
"""Reads longer than this are split, so that helpers can take a part."""
READ_AHEAD_BYTES = 1 << 20
WHOLE_BYTES = 1 << 20
"""Reads whose answer must be one part are held up to this length; longer ones are streamed."""
_SENDFILE_BYTES_MIN = 64 << 10
_STATUS_BYTES_MAX = (1 << 32) - FRAME
_ERRORS_LOGGED_MAX = 20
_EARLY_BUFFERS = 8
_SHALLOW = 2
"""Read-ahead is for clients that have few requests under way; others keep helpers busy anyway."""
_SLOW_S = 0.002
_ZEROS = bytes(PIECE_BYTES)


@dataclass(slots=True)
class Traffic:
    """What a connection moved: requests, bytes read and written, requests that failed."""

    requests: int = 0
    read: int = 0
    written: int = 0
    errors: int = 0


class _Failure(Exception):
    """A range that could not be read or written: errno, words for people, and where it began."""

    def __init__(self, number: int, text: str, offset: int = 0) -> None:
        super().__init__(text)
        self.number, self.text, self.offset = number, text, offset


class _Reading:
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
        reading: _Reading,
    ) -> None:
        self.read, self.offset, self.length, self.reading = read, offset, length, reading
        self.data: Buffer = b""
        self.error: BaseException | None = None

    def __call__(self) -> None:
        try:
            self.data = self.read(self.offset, self.length)
        except BaseException as exc:  # for the thread that collects it
            self.error = exc


class _Ahead:
    """A range that will probably be read soon: to be made cheap, by a helper."""

    __slots__ = ("length", "offset", "prefetch")

    def __init__(self, prefetch: Callable[[int, int], None], offset: int, length: int) -> None:
        self.prefetch, self.offset, self.length = prefetch, offset, length

    def __call__(self) -> None:
        # The read that needs it will say what is wrong; and nothing else may end a helper.
        with contextlib.suppress(Exception):
            self.prefetch(self.offset, self.length)


class Session:
    """Serves the requests of one connection. `run` in a thread; `stop` from any other."""

    def __init__(
        self,
        channel: Channel,
        attached: Attached,
        transmission: Transmission,
        helpers: Helpers,
    ) -> None:
        self.traffic = Traffic()
        self._channel, self._attached, self._transmission = channel, attached, transmission
        self._helpers = helpers
        self._structured = transmission.structured
        self._out: list[Buffer] = []
        self._held = 0
        self._round: list[_Part] = []
        self._round_bytes = 0
        self._stopping = threading.Event()
        self._write_error: _Failure | None = None
        self._alone = 0  # reads of this round that no helper was asked for
        decoded = attached.raw_fd is None
        self._ahead = ReadAhead(attached.info.size) if decoded else None
        self._prefetch = Job[_Ahead]([])
        self._sequential = False
        self._slow = False  # the last reads took so long that a disk must have been waited for
        # Only a structured reply can still tell of an error in bytes that the kernel moves.
        sendfile = self._structured and channel.socket is not None
        self._raw_fd = attached.raw_fd if sendfile else None
        self._handlers: dict[type, Callable[[Any], None]] = {
            Read: self._read,
            Write: self._write,
            WriteData: self._write_data,
            Zero: self._zero,
            Status: self._status,
            Cache: self._cache,
            Flush: self._flush,
            Refused: self._refused,
        }

    def stop(self) -> None:
        """Refuse what is asked from now on (ESHUTDOWN); who waits in `receive` must be woken."""
        self._stopping.set()

    def run(self, first: bytes) -> str:
        """Serve until the client is done; returns why it ended. `first`: bytes already received."""
        try:
            why = "disconnected" if self._serve(memoryview(first)) else self._run()
            self._channel.end()
            return why
        except (ProtocolError, Stalled) as exc:
            return str(exc)
        except OSError as exc:
            return exc.strerror or str(exc)
        finally:
            self._prefetch.drop()  # the image is closed next

    def _run(self) -> str:
        buffer = memoryview(bytearray(RECEIVE_BYTES))
        while True:
            try:
                count = self._channel.receive(buffer)
            except Idle:
                if not self._transmission.idle:
                    raise Stalled("the client stopped within a request") from None
                continue
            if not count:
                return "server stopped" if self._stopping.is_set() else "connection closed"
            if self._serve(buffer[:count]):
                return "disconnected"

    def _serve(self, data: memoryview) -> bool:
        """Serve what arrived and send all replies; whether the client is done."""
        self._alone, started = 0, time.perf_counter()
        before = self.traffic.requests
        try:
            return self._serve_all(data)
        finally:  # also when the rest makes no sense
            if self._alone and time.perf_counter() - started > _SLOW_S * self._alone:
                self._slow = True
            self._work()
            self._send()
            if self._sequential and self.traffic.requests - before <= _SHALLOW:
                self._look_ahead()

    def _serve_all(self, data: memoryview) -> bool:
        handlers, stopping = self._handlers, self._stopping.is_set
        for event in self._transmission.receive(data):
            kind = type(event)
            if kind is Disconnect:
                return True
            if stopping():
                self._turn_away(event)
            else:
                handlers[kind](event)
            if self._round_bytes >= ROUND_BYTES:
                self._work()
            if self._held >= ROUND_BYTES:
                self._send()
        return False

    # Replies

    def _put(self, *buffers: Buffer) -> None:
        self._out += buffers
        for buffer in buffers:
            self._held += len(buffer)

    def _send(self, *, more: bool = False) -> None:
        if self._out:
            out, self._out, self._held = self._out, [], 0  # what fails is not sent again
            self._channel.send(out, more=more)

    def _fail(self, cookie: int, failure: _Failure) -> None:
        self.traffic.errors += 1
        self._put(self._transmission.error(cookie, failure.number, failure.text))

    def _turn_away(self, event: Event) -> None:
        failure = _Failure(errno.ESHUTDOWN, "the server is stopping")
        if isinstance(event, Write) and event.length:
            self._write_error = failure  # told when its bytes are through
        elif isinstance(event, WriteData):
            self._write_error = failure
            self._write_data(event)
        elif not isinstance(event, Disconnect):
            self._fail(event.cookie, failure)

    def _refused(self, event: Refused) -> None:
        self.traffic.errors += 1
        self._put(event.reply)

    # Reading

    def _read(self, event: Read) -> None:
        cookie, offset, length, whole = event
        traffic = self.traffic
        traffic.requests += 1
        traffic.read += length
        if self._ahead is not None:
            self._sequential = self._ahead.note(offset, length)
        by_us = self._raw_fd is None or length < _SENDFILE_BYTES_MIN
        if length <= PIECE_BYTES and by_us and self._read_small(event):
            return
        if whole or not self._structured:
            self._read_whole(cookie, offset, length)
        else:
            self._read_parts(cookie, offset, length)

    def _read_small(self, event: Read) -> bool:
        """Answer a read at once or in this round; False if it should be answered in parts."""
        cookie, offset, length, whole = event
        if not length or (self._structured and not self._attached.stored(offset, length)):
            return False
        data = self._at_once(offset, length)
        if data is None:
            self._later(offset, length, _Reading(cookie, whole=whole))
            return True
        header = self._transmission.data(cookie, offset, length, last=True)
        self._out.append(header)
        self._out.append(data)
        self._held += len(header) + length
        return True

    def _at_once(self, offset: int, length: int) -> Buffer | None:
        """Bytes that need no helper: in memory, or a frame of a disk that is quick."""
        if self._slow or length > FRAME:
            return self._attached.try_read(offset, length)
        self._alone += 1
        try:
            return self._attached.read(offset, length)
        except (BackyfsError, OSError):
            return None  # the round reads it again, and tells

    def _look_ahead(self) -> None:
        """Have helpers decode what a sequential reader will want next, while we wait for it."""
        if self._ahead is None or not self._prefetch.over:
            return
        extent = self._ahead.due(READ_AHEAD_BYTES, READ_AHEAD_BYTES // 2)
        if extent is not None:
            prefetch = self._attached.prefetch
            tasks = [_Ahead(prefetch, *piece) for piece in _cut(extent.offset, extent.length)]
            self._prefetch = Job(tasks)
            self._helpers.offer(self._prefetch, len(tasks))

    def _later(self, offset: int, length: int, reading: _Reading) -> None:
        """Have a range read in this round."""
        reading.parts += 1
        self._round.append(_Part(self._attached.read, offset, length, reading))
        self._round_bytes += length

    def _work(self) -> None:
        """Read all ranges of this round, and put their answers."""
        if not self._round:
            return
        parts, self._round, self._round_bytes = self._round, [], 0
        started = time.perf_counter()
        job = Job(parts)
        self._helpers.offer(job, len(parts) - 1, waiting=self._slow)
        self._send()  # helpers have begun
        for part in job.done():
            self._collect(part)
            # What is ready goes out, so that the client asks on while we go on.
            if self._held >= PIECE_BYTES or (self._slow and len(self._out) >= _EARLY_BUFFERS):
                self._send()
        self._slow = time.perf_counter() - started > _SLOW_S * len(parts)

    def _collect(self, part: _Part) -> None:
        reading = part.reading
        reading.parts -= 1
        last = not reading.parts
        if part.error is not None:
            self._damaged(part, last)
            return
        self._put(
            self._transmission.data(reading.cookie, part.offset, part.length, last=last), part.data
        )

    def _damaged(self, part: _Part, last: bool) -> None:
        """The answer for a part that could not be read; frame by frame, where it may be split."""
        reading, cookie = part.reading, part.reading.cookie
        failure = self._failure(part.error, part.offset, part.length)
        self.traffic.errors += not reading.failed
        reading.failed = True
        if not self._structured:
            self._put(self._transmission.error(cookie, failure.number, failure.text))
            return
        frames = [(part.offset, part.length)]
        if not reading.whole:
            frames = self._attached.frames(part.offset, part.length)
        for at, count in frames:
            final = last and (at, count) == frames[-1]
            self._put(*self._frame(cookie, at, count, failure if len(frames) == 1 else None, final))

    def _frame(
        self, cookie: int, offset: int, length: int, failure: _Failure | None, last: bool
    ) -> list[Buffer]:
        """A chunk with data, or with the error of reading it (`failure`, if that is known)."""
        try:
            if failure is not None:
                raise failure
            data = self._bytes(offset, length)
        except _Failure as exc:
            return [
                self._transmission.error_at(cookie, exc.number, exc.text, exc.offset, last=last)
            ]
        return [self._transmission.data(cookie, offset, length, last=last), data]

    def _bytes(self, offset: int, length: int) -> Buffer:
        """Bytes of the export. _Failure."""
        try:
            return self._attached.read(offset, length)
        except (BackyfsError, OSError) as exc:
            raise self._failure(exc, offset, length) from exc

    def _failure(self, exc: BaseException | None, offset: int, length: int) -> _Failure:
        """What went wrong in a range, logged. Raises what is a bug."""
        if not isinstance(exc, BackyfsError | OSError):
            raise exc or AssertionError("no error")
        if self.traffic.errors < _ERRORS_LOGGED_MAX:
            level = logging.ERROR if isinstance(exc, Corrupt) else logging.WARNING
            values = {"export": self._attached.info.name, "offset": offset, "why": exc}
            log.log(level, "request failed", values)
        text = getattr(exc, "message", "") or str(exc)
        if isinstance(exc, Corrupt):  # it knows better where
            offset = max(offset, min(exc.offset - self._attached.start, offset + length - 1))
        return _Failure(errno.EIO, text, offset)

    def _read_parts(self, cookie: int, offset: int, length: int) -> None:
        """In chunks: data, holes, errors."""
        reading = _Reading(cookie)
        reading.parts = 1  # until the last chunk is known
        for start, end, stored in self._attached.pieces(offset, length):
            if not stored:
                self._put(self._transmission.hole(cookie, start, end - start, last=False))
            elif self._raw_fd is not None and end - start >= _SENDFILE_BYTES_MIN:
                self._send_file(cookie, start, end - start)
            else:
                for at, count in _cut(start, end - start):
                    self._later(at, count, reading)
                    if self._round_bytes >= ROUND_BYTES:
                        self._work()
        reading.parts -= 1
        if not reading.parts:
            self._put(self._transmission.end(cookie))

    def _read_whole(self, cookie: int, offset: int, length: int) -> None:
        """In one part."""
        if not length:
            done = self._transmission.end if self._structured else self._transmission.done
            self._put(done(cookie))
        elif length <= WHOLE_BYTES:
            self._later(offset, length, _Reading(cookie, whole=True))
        elif self._structured:
            self._stream(cookie, offset, length)
        else:
            self._stream_simple(cookie, offset, length)

    def _stream(self, cookie: int, offset: int, length: int) -> None:
        """A long chunk: what cannot be read is padding in it, and an error follows."""
        first: _Failure | None = None
        self._put(self._transmission.data(cookie, offset, length, last=False))
        for at, count in _cut(offset, length):
            try:
                self._put(self._bytes(at, count))
            except _Failure as failure:
                first = first or failure
                self._put(_ZEROS[:count])
            self._send()
        if first is not None:  # the specification wants one offset for a chunk
            self.traffic.errors += 1
            self._put(self._transmission.error_at(cookie, first.number, first.text, first.offset))
        self._put(self._transmission.end(cookie))

    def _stream_simple(self, cookie: int, offset: int, length: int) -> None:
        """A long answer whose header must know the outcome: so everything is read twice."""
        try:
            for at, count in _cut(offset, length):
                self._bytes(at, count)
        except _Failure as failure:
            self._fail(cookie, failure)
            return
        self._put(self._transmission.data(cookie, offset, length, last=True))
        try:
            for at, count in _cut(offset, length):
                self._put(self._bytes(at, count))
                self._send()
        except _Failure as failure:
            # The header promised success: the specification leaves only this.
            raise ProtocolError(f"a read failed when it had begun: {failure.text}") from failure

    def _send_file(self, cookie: int, offset: int, length: int) -> None:
        """One chunk, moved by the kernel; a part it cannot read is padding, and an error."""
        self._put(self._transmission.data(cookie, offset, length, last=False))
        self._send(more=True)
        at, end = offset, offset + length
        try:
            while at < end:
                at += self._moved(at, end - at)
            return
        except _Failure as exc:
            failure = exc
        for _, count in _cut(at, end - at):
            self._put(_ZEROS[:count])
            self._send()
        self.traffic.errors += 1
        self._put(self._transmission.error_at(cookie, failure.number, failure.text, at))

    def _moved(self, offset: int, length: int) -> int:
        """Bytes that the kernel moved from the image to the client. _Failure of the image."""
        sock, fd = self._channel.socket, self._raw_fd
        assert sock is not None
        assert fd is not None
        try:
            count = os.sendfile(sock.fileno(), fd, self._attached.start + offset, length)
        except BlockingIOError:
            raise Stalled("the client takes no bytes") from None
        except OSError as exc:
            if exc.errno not in _OF_THE_FILE:
                raise
            raise self._failure(exc, offset, 1) from exc
        if not count:
            raise _Failure(errno.EIO, "the image is shorter than it was")
        return count

    def _status(self, event: Status) -> None:
        cookie, offset, length, one = event
        self.traffic.requests += 1
        found: list[tuple[int, int]] = []
        last = -1
        for start, end, stored in self._attached.pieces(offset, min(length, _STATUS_BYTES_MAX)):
            state = 0 if stored else STATE_HOLE | STATE_ZERO
            if state == last:
                found[-1] = (found[-1][0] + end - start, state)
            elif len(found) == (1 if one else DESCRIPTORS_MAX):
                break
            else:
                found.append((end - start, state))
                last = state
        self._put(self._transmission.status(cookie, found))

    def _cache(self, event: Cache) -> None:
        self.traffic.requests += 1
        self._attached.prefetch(event.offset, min(event.length, WHOLE_BYTES))
        self._put(self._transmission.done(event.cookie))

    # Writing

    def _write(self, event: Write) -> None:
        self.traffic.requests += 1
        self._write_error = None
        if not event.length:
            self._put(self._transmission.done(event.cookie))

    def _write_data(self, event: WriteData) -> None:
        cookie, offset, data, last = event
        if self._write_error is None:
            try:
                self._attached.write(offset, data)
                self.traffic.written += len(data)
            except (BackyfsError, OSError) as exc:
                self._write_error = self._write_failure(exc, offset)
        if last and self._write_error is not None:
            self._fail(cookie, self._write_error)
        elif last:
            self._put(self._transmission.done(cookie))

    def _write_failure(self, exc: BackyfsError | OSError, offset: int) -> _Failure:
        if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
            if not self.traffic.errors:
                values = {"export": self._attached.info.name, "why": exc}
                log.warning("no space for an overlay", values)
            return _Failure(errno.ENOSPC, exc.strerror or "no space for overlays")
        return self._failure(exc, offset, 1)

    def _zero(self, event: Zero) -> None:
        self.traffic.requests += 1
        try:
            self._attached.zero(event.offset, event.length)
        except (BackyfsError, OSError) as exc:
            self._fail(event.cookie, self._write_failure(exc, event.offset))
        else:
            self._put(self._transmission.done(event.cookie))

    def _flush(self, event: Flush) -> None:
        """Nothing to do: overlays do not outlive the connection."""
        self.traffic.requests += 1
        self._put(self._transmission.done(event.cookie))


_OF_THE_FILE = (errno.EIO, errno.ENODATA, errno.EUCLEAN, errno.EBADMSG, errno.ESTALE)
"""What sendfile says when it is not the socket that failed."""


def _cut(offset: int, length: int) -> list[tuple[int, int]]:
    """A range in pieces."""
    end = offset + length
    return [(at, min(PIECE_BYTES, end - at)) for at in range(offset, end, PIECE_BYTES)]
