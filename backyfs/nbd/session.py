"""The transmission phase of one connection: a loop in a thread of its own.

Bytes are received, all requests in them are served in order, and their replies go out together:
few system calls for many requests, no other thread, no lock. A client that does not read its
replies blocks this thread and nothing else.

Memory of a connection: what one receive takes (256 KiB), replies not yet sent (at most 1 MiB and
one piece) and a piece of at most 1 MiB being read; through TLS the encrypted form of one piece
more. Reads of up to 32 MiB are served piece by piece.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backyfs.errors import BackyfsError, Corrupt
from backyfs.model import FRAME
from backyfs.nbd.attached import Attached
from backyfs.nbd.channel import Channel, Idle, Stalled
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
from backyfs.store.contract import Buffer

log = logging.getLogger(__name__)

RECEIVE_BYTES = 256 << 10
PIECE_BYTES = 1 << 20
_HELD_BYTES_MAX = 1 << 20
_SENDFILE_BYTES_MIN = 64 << 10
_STATUS_BYTES_MAX = (1 << 32) - FRAME
_ERRORS_LOGGED_MAX = 20
_ZEROS = bytes(PIECE_BYTES)


@dataclass(slots=True)
class Traffic:
    """What a connection moved: requests, bytes read and written, requests that failed."""

    requests: int = 0
    read: int = 0
    written: int = 0
    errors: int = 0


class _Failure(Exception):
    """A range that could not be read: errno, and words for people."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number, self.text = number, text


class Session:
    """Serves the requests of one connection. `run` in a thread; `stop` from any other."""

    def __init__(self, channel: Channel, attached: Attached, transmission: Transmission) -> None:
        self.traffic = Traffic()
        self._channel, self._attached, self._transmission = channel, attached, transmission
        self._structured = transmission.structured
        self._out: list[Buffer] = []
        self._held = 0
        self._stopping = threading.Event()
        self._write_error: _Failure | None = None
        self._raw_fd = attached.raw_fd if channel.socket is not None else None
        self._handlers: dict[type, Callable[[Any], None]] = {
            Read: self._read_structured if self._structured else self._read_simple,
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
        try:
            return self._serve_all(data)
        finally:
            self._send()  # also when the rest makes no sense

    def _serve_all(self, data: memoryview) -> bool:
        handlers = self._handlers
        for event in self._transmission.receive(data):
            kind = type(event)
            if kind is Disconnect:
                return True
            if self._stopping.is_set():
                self._turn_away(event)
            else:
                handlers[kind](event)
            if self._held >= _HELD_BYTES_MAX:
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

    def _bytes(self, offset: int, length: int) -> Buffer:
        """Bytes of the export. _Failure."""
        try:
            return self._attached.read(offset, length)
        except (BackyfsError, OSError) as exc:
            raise self._failure(exc, offset) from exc

    def _failure(self, exc: BackyfsError | OSError, offset: int) -> _Failure:
        """What went wrong, logged; damage is known to the store already."""
        if self.traffic.errors < _ERRORS_LOGGED_MAX:
            level = logging.ERROR if isinstance(exc, Corrupt) else logging.WARNING
            values = {"export": self._attached.info.name, "offset": offset, "why": exc}
            log.log(level, "a read failed", values)
        return _Failure(errno.EIO, getattr(exc, "message", "") or str(exc))

    def _read_simple(self, event: Read) -> None:
        """One header, then all bytes; so what is too long to hold is read twice."""
        cookie, offset, length, _ = event
        traffic = self.traffic
        traffic.requests += 1
        try:
            if length <= PIECE_BYTES:
                data = self._bytes(offset, length)
                self._put(self._transmission.data(cookie, offset, length, last=True), data)
                traffic.read += length
                return
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
        traffic.read += length

    def _read_structured(self, event: Read) -> None:
        cookie, offset, length, whole = event
        traffic = self.traffic
        traffic.requests += 1
        traffic.read += length
        if length <= FRAME and self._attached.stored(offset, length):
            try:
                data = self._bytes(offset, length)
            except _Failure:
                pass  # again, frame by frame
            else:
                header = self._transmission.data(cookie, offset, length, last=True)
                self._out.append(header)
                self._out.append(data)
                self._held += len(header) + length
                return
        if whole and length > PIECE_BYTES:
            self._read_whole(cookie, offset, length)
        elif whole:
            self._read_piece(cookie, offset, length)
            self._put(self._transmission.end(cookie))
        else:
            self._read_parts(cookie, offset, length)

    def _read_parts(self, cookie: int, offset: int, length: int) -> None:
        """In chunks: data, holes, errors."""
        for start, end, stored in self._attached.pieces(offset, length):
            if not stored:
                self._put(self._transmission.hole(cookie, start, end - start, last=False))
            elif self._raw_fd is not None and end - start >= _SENDFILE_BYTES_MIN:
                self._send_file(cookie, start, end - start)
            else:
                for at, count in _cut(start, end - start):
                    self._read_piece(cookie, at, count)
                    if self._held >= _HELD_BYTES_MAX:
                        self._send()
        self._put(self._transmission.end(cookie))

    def _read_piece(self, cookie: int, offset: int, length: int) -> None:
        """One chunk of data; where something is damaged one for each frame, or its error."""
        if not length:
            return
        try:
            data = self._bytes(offset, length)
        except _Failure as failure:
            frames = list(self._frames(offset, length))
            if len(frames) == 1:
                self.traffic.errors += 1
                self._put(self._transmission.error_at(cookie, failure.number, failure.text, offset))
                return
            for at, count in frames:
                self._read_piece(cookie, at, count)
            return
        self._put(self._transmission.data(cookie, offset, length, last=False), data)

    def _frames(self, offset: int, length: int) -> list[tuple[int, int]]:
        """A range cut at the frames of the image."""
        found = []
        end = offset + length
        while offset < end:
            stop = min(end, offset + FRAME - (self._attached.start + offset) % FRAME)
            found.append((offset, stop - offset))
            offset = stop
        return found

    def _read_whole(self, cookie: int, offset: int, length: int) -> None:
        """A long read in one chunk: what cannot be read is padding, and an error follows it."""
        failures: list[tuple[int, _Failure]] = []
        self._put(self._transmission.data(cookie, offset, length, last=False))
        for at, count in _cut(offset, length):
            self._put(self._padded(at, count, failures))
            self._send()
        self._end_of_chunk(cookie, failures)

    def _padded(self, offset: int, length: int, failures: list[tuple[int, _Failure]]) -> Buffer:
        try:
            return self._bytes(offset, length)
        except _Failure as failure:
            failures.append((offset, failure))
            return _ZEROS[:length]

    def _end_of_chunk(self, cookie: int, failures: list[tuple[int, _Failure]]) -> None:
        """The errors within a content chunk (the first tells it all), and the end of the reply."""
        self.traffic.errors += bool(failures)
        for at, failure in failures[:1]:
            self._put(self._transmission.error_at(cookie, failure.number, failure.text, at))
        self._put(self._transmission.end(cookie))

    def _send_file(self, cookie: int, offset: int, length: int) -> None:
        """One chunk, moved by the kernel; a part it cannot read is padding and an error."""
        sock, fd = self._channel.socket, self._raw_fd
        assert sock is not None
        assert fd is not None
        self._put(self._transmission.data(cookie, offset, length, last=False))
        self._send(more=True)
        at, end = offset, offset + length
        try:
            while at < end:
                count = os.sendfile(sock.fileno(), fd, self._attached.start + at, end - at)
                if not count:
                    raise _Failure(errno.EIO, "the image is shorter than it was")
                at += count
            return
        except BlockingIOError:
            raise Stalled("the client takes no bytes") from None
        except OSError as exc:
            if exc.errno not in _OF_THE_FILE:
                raise
            failure = self._failure(exc, at)
        except _Failure as exc:
            failure = exc
        self._pad(end - at)
        self.traffic.errors += 1
        self._put(self._transmission.error_at(cookie, failure.number, failure.text, at))

    def _pad(self, length: int) -> None:
        for _, count in _cut(0, length):
            self._put(_ZEROS[:count])
            self._send()

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
        self._attached.prefetch(event.offset, min(event.length, PIECE_BYTES))
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
        return self._failure(exc, offset)

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
