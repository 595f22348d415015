"""Blocking work in batches on a bounded number of threads, owned by one nursery.

A job reads a batch, hashes, compares, compresses and appends it in one go; a thread does one after
the other for a tenth of a second before it reports. (A hop of threads takes 100-200 us and the
interpreter from who computes: one a job made an increment 15 % slower.) Memory is bounded by
workers times a batch: a worker takes its next job only when it is done with the last, so that
no queue is needed. Reading and writing overlap because the workers are at different points.
(Readers and writers as two stages took 2.11 s for what takes 1.74 s, and a third more memory.)

Cancelling waits for the jobs that run (they are small, or call `checkpoint`) and starts no more.
The first error stops the others and is raised as it is, never inside a group.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Generic, TypeVar, TypeVarTuple

import trio

from backyfs.cancelling import checking, checkpoint

BATCH_BYTES = 2 << 20
"""Image bytes of one job."""

WORKERS_MAX = 8
"""Threads at most, however many cores there are.

Each has a batch in memory, read and compressed: 64 of them took 320 MiB, eight take 80. And part
of each job is done with the interpreter's lock in the hand, which all others wait for.
"""

ROUND_SECONDS = 0.1
"""How long a thread does jobs before it hands over their results."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
Job = Callable[[], T]


def workers() -> int:
    """Threads for jobs that compute and wait by turns.

    One more than the cores this process may use, so that they stay busy while one job waits for
    the source or for the store's disk. With everything in memory it costs 2 %.
    """
    return min(len(os.sched_getaffinity(0)) + 1, WORKERS_MAX)


async def run_jobs(jobs: Iterator[Job[T]], done: Callable[[T], None], *, threads: int = 0) -> None:
    """Run every job on `threads` threads (0 = as `workers` says) and hand its result to `done`.

    `jobs` is advanced in the worker threads, one at a time: it may block. Results come in the
    order in which jobs end, some of them `ROUND_SECONDS` later.
    """
    count = threads or workers()
    limiter = trio.CapacityLimiter(count)
    work = _Work(jobs)
    failures: list[Exception] = []

    async def worker() -> None:
        try:
            more = True
            while more:
                try:
                    more = await trio.to_thread.run_sync(work.go_on, limiter=limiter)
                finally:
                    work.hand_over(done)
        except Exception as exc:
            failures.append(exc)
            nursery.cancel_scope.cancel()

    with checking(trio.from_thread.check_cancelled):
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(worker)
    if failures:
        raise failures[0]


class _Work(Generic[T]):
    """Jobs that many threads take from, and the results nobody has seen yet."""

    def __init__(self, jobs: Iterator[Job[T]]) -> None:
        self._jobs = jobs
        self._turn = threading.Lock()
        self._results: deque[T] = deque()

    def go_on(self) -> bool:
        """Do jobs for a while; whether there may be more. In any thread."""
        until = time.perf_counter() + ROUND_SECONDS
        while time.perf_counter() < until:
            checkpoint()
            with self._turn:
                try:
                    job = next(self._jobs)
                except StopIteration:
                    return False
            self._results.append(job())
        return True

    def hand_over(self, done: Callable[[T], None]) -> None:
        """Give away the results there are. In one thread."""
        while self._results:
            done(self._results.popleft())


async def asked(function: Callable[[*Ts], T], *arguments: *Ts) -> T:
    """Call what may take long, in a thread; cancelled meanwhile, it goes on to a `checkpoint`."""
    with checking(trio.from_thread.check_cancelled):
        return await trio.to_thread.run_sync(function, *arguments)


@asynccontextmanager
async def in_thread(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """Enter and leave a blocking context manager in threads; leaving it is never cut short.

    Cancelled meanwhile, entering goes on to its next `checkpoint`.
    """
    value = await asked(manager.__enter__)
    async with leaving(manager):
        yield value


@asynccontextmanager
async def leaving(manager: AbstractContextManager[object]) -> AsyncIterator[None]:
    """Leave, in a thread, a context manager that was entered already."""
    try:
        yield
    except BaseException as exc:
        if not await _leave(manager, exc):
            raise
    else:
        await _leave(manager, None)


async def _leave(manager: AbstractContextManager[object], exc: BaseException | None) -> bool:
    kind, trace = (type(exc), exc.__traceback__) if exc else (None, None)
    handled = None
    with trio.CancelScope(shield=True):
        handled = await trio.to_thread.run_sync(manager.__exit__, kind, exc, trace)
    return bool(handled)
