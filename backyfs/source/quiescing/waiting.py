"""Waiting for descriptors, never without an end."""

from __future__ import annotations

import select
import time
from collections.abc import Sequence


class Stopped(Exception):
    """Somebody wants the waiting to end now."""


class Waiting:
    """A span of time to wait in: `limit_s` seconds from now on, or until `stops` are readable."""

    def __init__(self, limit_s: float, stops: Sequence[int] = ()) -> None:
        self._limit_s, self._end = limit_s, time.monotonic() + limit_s
        self._stops = tuple(stops)

    def for_any(self, wanted: Sequence[int], *, writable: bool = False) -> list[int]:
        """Those of `wanted` that can be read (or written) now, at least one. TimeoutError, Stopped.

        A peer that hung up makes a descriptor readable.
        """
        poll = select.poll()
        for fd in self._stops:
            poll.register(fd, select.POLLIN)
        for fd in wanted:
            poll.register(fd, select.POLLOUT if writable else select.POLLIN)
        left_s = self._end - time.monotonic()
        ready = [fd for fd, _ in poll.poll(max(0.0, left_s) * 1000)]
        if set(ready) & set(self._stops):
            raise Stopped
        if not ready or left_s < 0:  # also when a peer never ends sending
            raise TimeoutError(f"no answer within {self._limit_s:g} s")
        return ready
