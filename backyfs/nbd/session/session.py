"""The transmission phase of one connection: a loop in a thread of its own.

Bytes are received, all requests in them are served, and their replies go out together: few system
calls for many requests. What is at hand is answered at once; the rest is collected and done by this
thread with what helpers are free (helpers.py). Replies may overtake each other, as the protocol
allows. A client that does not read its replies blocks this thread and nothing else.

Memory of a connection: what one receive takes (256 KiB), reads under way (at most ROUND_BYTES and
one read of 1 MiB), and as much again of replies that are not sent yet; through TLS the encrypted
form of one piece more. Reads of up to 32 MiB are served piece by piece.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any

from backyfs.model import FRAME
from backyfs.nbd.attached import Attached
from backyfs.nbd.channel import Channel, Idle, Stalled
from backyfs.nbd.helpers import Helpers
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
from backyfs.nbd.session.ahead import Ahead, Window
from backyfs.nbd.session.failure import Failure, Failures
from backyfs.nbd.session.reading import Reads
from backyfs.nbd.session.replies import Replies
from backyfs.nbd.session.rounds import ROUND_BYTES, Round
from backyfs.nbd.session.streaming import Streaming
from backyfs.nbd.session.writing import Writes

RECEIVE_BYTES = 256 << 10
_CACHE_BYTES_MAX = 1 << 20
_STATUS_BYTES_MAX = (1 << 32) - FRAME


class Session:
    """Serves the requests of one connection. `run` in a thread; `stop` from any other."""

    def __init__(
        self,
        channel: Channel,
        attached: Attached,
        transmission: Transmission,
        helpers: Helpers,
        window: Window,
    ) -> None:
        self._channel, self._attached, self._form = channel, attached, transmission
        self._stopping = threading.Event()
        self._replies = Replies(channel, transmission)
        self.traffic = self._replies.traffic
        failures = Failures(attached)
        self._ahead = Ahead(attached, helpers, window)
        self._round = Round(attached, self._replies, failures, helpers)
        streaming = Streaming(attached, channel, self._replies, failures)
        self._reads = Reads(attached, self._replies, self._round, streaming, self._ahead)
        self._writes = Writes(attached, self._replies, failures)
        self._handlers: dict[type, Callable[[Any], None]] = {
            Read: self._reads.read,
            Write: self._writes.begin,
            WriteData: self._writes.data,
            Zero: self._writes.zero,
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
            self._ahead.drop()  # the image is closed next

    def _run(self) -> str:
        buffer = memoryview(bytearray(RECEIVE_BYTES))
        while True:
            try:
                count = self._channel.receive(buffer)
            except Idle:
                if not self._form.idle:
                    raise Stalled("the client stopped within a request") from None
                continue
            if not count:
                return "server stopped" if self._stopping.is_set() else "connection closed"
            if self._serve(buffer[:count]):
                return "disconnected"

    def _serve(self, data: memoryview) -> bool:
        """Serve what arrived and send all replies; whether the client is done."""
        self._reads.begin()
        try:
            return self._serve_all(data)
        finally:  # also when the rest makes no sense
            self._reads.finish()
            self._replies.send()

    def _serve_all(self, data: memoryview) -> bool:
        handlers, stopping = self._handlers, self._stopping.is_set
        round_, replies = self._round, self._replies
        for event in self._form.receive(data):
            kind = type(event)
            if kind is Disconnect:
                return True
            if stopping():
                self._turn_away(event)
            else:
                handlers[kind](event)
            if round_.full:
                round_.work()
            if replies.held >= ROUND_BYTES:
                replies.send()
        return False

    def _turn_away(self, event: Event) -> None:
        failure = Failure(errno.ESHUTDOWN, "the server is stopping")
        if isinstance(event, Write) and event.length:
            self._writes.refuse(failure)  # told when its bytes are through
        elif isinstance(event, WriteData):
            self._writes.refuse(failure)
            self._writes.data(event)
        elif not isinstance(event, Disconnect):
            self._replies.fail(event.cookie, failure)

    def _refused(self, event: Refused) -> None:
        self.traffic.errors += 1
        self._replies.put(event.reply)

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
        self._replies.put(self._form.status(cookie, found))

    def _cache(self, event: Cache) -> None:
        self.traffic.requests += 1
        self._attached.prefetch(event.offset, min(event.length, _CACHE_BYTES_MAX))
        self._replies.put(self._form.done(event.cookie))

    def _flush(self, event: Flush) -> None:
        """Nothing to do: overlays do not outlive the connection."""
        self.traffic.requests += 1
        self._replies.put(self._form.done(event.cookie))
