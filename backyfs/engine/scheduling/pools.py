"""Slots for commands that run at once. The most urgent one that waits gets the next free slot.

Urgent is what has the earliest deadline. Deadlines are points in time, so everything that waits
becomes the most urgent one some day: nothing starves.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class Pool:
    """`limit` slots (>= 1); a lower limit takes effect as slots are given back."""

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self._limit = limit
        self._running = 0
        self._order = itertools.count()
        self._waiting: list[tuple[float, int, _Ticket]] = []

    @property
    def limit(self) -> int:
        """How many may run at once."""
        return self._limit

    @property
    def running(self) -> int:
        """How many slots are taken."""
        return self._running

    @property
    def waiting(self) -> int:
        """How many wait for one."""
        return sum(1 for _, _, ticket in self._waiting if not ticket.gone)

    def resize(self, limit: int) -> None:
        """Change the limit; what runs goes on."""
        self._limit = limit
        self._serve()

    @asynccontextmanager
    async def slot(self, deadline: float) -> AsyncIterator[None]:
        """Hold a slot; wait for it as long as others with an earlier deadline do."""
        await self.take(deadline)
        try:
            yield
        finally:
            self.give()

    def give(self) -> None:
        """Give a slot back."""
        self._running -= 1
        self._serve()

    async def take(self, deadline: float) -> None:
        """Take a slot, which has to be given back; as `slot`."""
        if self._running < self._limit and not self._waiting:
            self._running += 1
            return
        ticket = _Ticket()
        heapq.heappush(self._waiting, (deadline, next(self._order), ticket))
        self._serve()
        try:
            await ticket.given.wait()
        except BaseException:
            ticket.gone = True
            if ticket.given.is_set():  # given and cancelled at the same time
                self._running -= 1
            self._serve()
            raise

    def _serve(self) -> None:
        while self._waiting and self._running < self._limit:
            _, _, ticket = heapq.heappop(self._waiting)
            if not ticket.gone:
                self._running += 1
                ticket.given.set()


class _Ticket:
    """One that waits; `gone`: it was cancelled."""

    __slots__ = ("given", "gone")

    def __init__(self) -> None:
        self.given = trio.Event()
        self.gone = False
