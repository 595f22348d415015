"""Threads of a server that hang in a file system which does not answer: others go on without them.

A dead NFS server, a disk that is frozen for a snapshot: what is asked of a VM there may never
return, and no thread that waits for it can be stopped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

import trio

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_S = 2.0
"""What takes a thread longer hangs: it no longer counts."""
HANGING_MAX = 64
END_S = 10.0
"""How long a server may take to end."""


class Threads:
    """Runs functions in worker threads, `count` at once; beside them up to 64 that hang."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._limiter = trio.CapacityLimiter(count)
        self._since: dict[object, float] = {}

    async def run(self, function: Callable[..., T], *args: object) -> T:
        """The result of `function(*args)`; the thread is waited for, whatever is cancelled."""
        return await trio.to_thread.run_sync(self._noted, function, args, limiter=self._limiter)

    def _noted(self, function: Callable[..., T], args: tuple[object, ...]) -> T:
        key = object()
        self._since[key] = time.monotonic()
        try:
            return function(*args)
        finally:
            del self._since[key]

    async def make_room(self) -> None:
        """For ever: let as many more begin as hang."""
        while True:
            late = time.monotonic() - PATIENCE_S
            hanging = sum(since < late for since in list(self._since.values()))
            self._limiter.total_tokens = self._count + min(hanging, HANGING_MAX)
            await trio.sleep(PATIENCE_S / 2)


def _nothing() -> None:
    """What most have to clean up."""


def end_in_time(clean_up: Callable[[], object] = _nothing) -> None:
    """Have this process end soon, also if threads of it never come back: then `clean_up` is done,
    and it exits 1, since not all was given back in good order.
    """
    timer = threading.Timer(END_S, _give_up, (clean_up,))
    timer.daemon = True
    timer.start()


def _give_up(clean_up: Callable[[], object]) -> NoReturn:
    log.error("ended while threads of it hang: a file system does not answer")
    with contextlib.suppress(Exception):
        clean_up()
    logging.shutdown()
    os._exit(1)
