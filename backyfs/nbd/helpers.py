"""Threads that lend a hand: when a client asks for much at once, several cores decode it.

The thread of a connection (the owner) makes a Job of reads that are independent of each other,
offers it, and works on it itself; helpers that are free take reads off it. Nobody hops between
threads for a single read, and an owner never waits for a helper that has not begun: with all of
them busy it does its job alone.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

_CORES = len(os.sched_getaffinity(0))
_SPARE = max(1, _CORES - 1)
HELPERS = min(8, max(4, _CORES))
"""How many there are, for all connections together: more than cores, for disks wait longer."""

T = TypeVar("T", bound=Callable[[], None])


class Job(Generic[T]):
    """Tasks, each done once, by whoever comes first. A task must not raise."""

    def __init__(self, tasks: Iterable[T]) -> None:
        self._tasks = deque(tasks)
        self._done: deque[T] = deque()
        self._lock = threading.Lock()
        self._helping = 0
        self._closed = False
        self._idle = threading.Event()

    def help(self) -> None:
        """Work on it until no task is left (helpers call this)."""
        with self._lock:
            if not self._tasks:
                return
            self._helping += 1
        try:
            self._work()
        finally:
            with self._lock:
                self._helping -= 1
                if self._closed and not self._helping:
                    self._idle.set()

    def done(self) -> Iterator[T]:
        """Work on it, and give the tasks as they are done, by whomever (the owner calls this)."""
        while self._step():
            yield from self._given()
        self.drop()  # nothing is left, but some may be under way
        yield from self._given()

    @property
    def over(self) -> bool:
        """Whether all tasks are done."""
        with self._lock:
            return not self._tasks and not self._helping

    def drop(self) -> None:
        """Forget what has not begun; return when nobody works on it any more."""
        self._tasks.clear()
        with self._lock:
            self._closed = True
            helping = self._helping
        if helping:
            self._idle.wait()

    def _work(self) -> None:
        while self._step():
            pass

    def _step(self) -> bool:
        try:
            task = self._tasks.popleft()
        except IndexError:
            return False
        task()
        self._done.append(task)
        return True

    def _given(self) -> Iterator[T]:
        while self._done:
            yield self._done.popleft()


class Helpers:
    """The threads' common queue; `run` is what each of them runs, until `stop`."""

    def __init__(self, count: int = HELPERS) -> None:
        self.count = count
        self._offered: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()

    def offer(self, job: Job[Any], hands: int, *, waiting: bool = False) -> None:
        """Ask up to `hands` helpers to work on a job: one per spare core, or all of them when the
        tasks are mostly `waiting`.
        """
        for _ in range(min(hands, self.count if waiting else _SPARE)):
            self._offered.put(job)

    def run(self) -> None:
        """Help until `stop`."""
        while True:
            job = self._offered.get()
            if job is None:
                return
            job.help()

    def stop(self) -> None:
        """End all threads, after what was offered before."""
        for _ in range(self.count):
            self._offered.put(None)
