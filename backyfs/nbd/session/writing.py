"""WRITE, WRITE_ZEROES and TRIM on an overlay, which ends with the connection."""

from __future__ import annotations

from backyfs.errors import BackyfsError
from backyfs.nbd.attached import Attached
from backyfs.nbd.protocol.transmission import Write, WriteData, Zero
from backyfs.nbd.session.failure import Failure, Failures
from backyfs.nbd.session.replies import Replies


class Writes:
    """Answers what changes bytes; the bytes of one WRITE may come in many pieces."""

    def __init__(self, attached: Attached, replies: Replies, failures: Failures) -> None:
        self._attached, self._replies, self._failures = attached, replies, failures
        self._failed: Failure | None = None  # of the WRITE whose bytes are coming

    def begin(self, event: Write) -> None:
        """A WRITE; its bytes follow."""
        self._replies.traffic.requests += 1
        self._failed = None
        if not event.length:
            self._done(event.cookie)

    def refuse(self, failure: Failure) -> None:
        """Write none of the bytes that are still to come; the answer comes behind them."""
        self._failed = failure

    def data(self, event: WriteData) -> None:
        """Bytes of it; the last ones bring the answer."""
        if self._failed is None:
            self._write(event)
        if event.last and self._failed is not None:
            self._replies.fail(event.cookie, self._failed)
        elif event.last:
            self._done(event.cookie)

    def _write(self, event: WriteData) -> None:
        try:
            self._attached.write(event.offset, event.data)
            self._replies.traffic.written += len(event.data)
        except (BackyfsError, OSError) as exc:
            self._failed = self._failures.of_write(exc, event.offset)

    def zero(self, event: Zero) -> None:
        """Make bytes zero."""
        self._replies.traffic.requests += 1
        try:
            self._attached.zero(event.offset, event.length)
        except (BackyfsError, OSError) as exc:
            self._replies.fail(event.cookie, self._failures.of_write(exc, event.offset))
        else:
            self._done(event.cookie)

    def _done(self, cookie: int) -> None:
        self._replies.put(self._replies.form.done(cookie))
