"""Replies of a connection: collected, and sent together; and the count of what went through it."""

from __future__ import annotations

from dataclasses import dataclass

from backyfs.nbd.channel import Channel
from backyfs.nbd.protocol.transmission import Transmission
from backyfs.nbd.session.failure import Failure
from backyfs.store.contract import Buffer


@dataclass(slots=True)
class Traffic:
    """What a connection moved: requests, bytes read and written, requests that failed."""

    requests: int = 0
    read: int = 0
    written: int = 0
    errors: int = 0


class Replies:
    """Buffers to be sent, in order. Whoever puts them sees to it that they do not become many."""

    def __init__(self, channel: Channel, form: Transmission) -> None:
        self.form = form
        """What the bytes of a reply look like."""
        self.traffic = Traffic()
        self.buffers: list[Buffer] = []
        self.held = 0
        """Bytes in `buffers`; who appends there adds to it."""
        self._channel = channel

    def put(self, *buffers: Buffer) -> None:
        """Send these in time."""
        self.buffers += buffers
        for buffer in buffers:
            self.held += len(buffer)

    def fail(self, cookie: int, failure: Failure) -> None:
        """Answer a request with an error."""
        self.traffic.errors += 1
        self.put(self.form.error(cookie, failure.number, failure.text))

    def send(self, *, more: bool = False) -> None:
        """Send what was put; `more`: something follows at once. OSError, Stalled."""
        if self.buffers:
            buffers, self.buffers, self.held = self.buffers, [], 0  # what fails is not sent again
            self._channel.send(buffers, more=more)
