"""Purge, verification and scrub: what repositories need besides backups, a few at a time.

Two lanes, each with its own slots: one for purges (after every backup, and once in a while), one
for verification and scrub. So a verification of many hours never keeps space from being freed,
and neither takes a slot from backups. Within a lane the one that is due longest comes first.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections.abc import Mapping

import trio

from backyfs.config.site import Maintenance
from backyfs.engine.scheduling.backoff import BUSY, BUSY_WAIT_S
from backyfs.engine.scheduling.jobs import Job
from backyfs.engine.scheduling.planning import fraction
from backyfs.engine.scheduling.pools import Pool
from backyfs.engine.scheduling.world import Command, Kind, Outcome, World
from backyfs.errors import Corrupt

log = logging.getLogger(__name__)

AGAIN = 0.1
"""What failed is tried again after this part of its interval; to find damage is no failure."""

WAIT_S = 60
"""How long a command waits for another writer, in seconds."""


class Lane:
    """Some kinds of maintenance for all jobs. `settings` may be replaced at any time."""

    def __init__(
        self, name: str, kinds: tuple[Kind, ...], settings: Maintenance, world: World
    ) -> None:
        self.pool = Pool(name, settings.worker_limit)
        self._kinds = kinds
        self._settings = settings
        self._world = world
        self._order = itertools.count()
        self._due: dict[tuple[str, Kind], float] = {}
        self._agenda: list[tuple[float, int, Job, Kind]] = []
        self._changed = trio.Event()
        self._resized = trio.Event()
        self._turn = trio.Lock()

    def add(self, job: Job) -> None:
        """Put a new job on the agenda, at times that follow from its name and its past.

        What was never done counts as done some time ago, which is remembered: or a scheduler that
        is started again once a week would never come to what is done once a month.
        """
        for kind in self._kinds:
            if interval := self._interval(kind):
                wall = self._world.wall()
                never = wall - interval * (1 - fraction(job.name, kind))
                done = min(_last(job, kind) or never, wall)  # later: the clock was wrong
                _note(job, kind, done)
                self._put(max(0.0, done + interval - wall), job, kind)

    def request(self, job: Job, kind: Kind) -> None:
        """Have it done for the job as soon as there is a slot."""
        self._put(0.0, job, kind)

    def configure(self, settings: Maintenance, jobs: Mapping[str, Job]) -> None:
        """Use other settings from now on."""
        if settings == self._settings:
            return
        self._settings = settings
        self.pool.resize(settings.worker_limit)
        self._resized.set()
        self._agenda.clear()
        self._due.clear()
        for job in jobs.values():
            self.add(job)

    async def run(self) -> None:
        """Carry the agenda out, for ever: as many workers as there may be slots."""
        async with trio.open_nursery() as nursery:
            workers = 0
            while True:
                for _ in range(workers, self.pool.limit):
                    nursery.start_soon(self._work)
                workers = max(workers, self.pool.limit)
                self._resized = trio.Event()
                await self._resized.wait()

    async def _work(self) -> None:
        """Do one thing after the other, each in a slot: there may be fewer slots than workers."""
        while True:
            async with self._turn:
                job, kind = await self._next()
            async with self.pool.slot(0.0):
                await self._carry_out(job, kind)

    async def _next(self) -> tuple[Job, Kind]:
        """Wait for the first of the agenda to be due, and take it off."""
        while True:
            wait = self._agenda[0][0] - self._world.steady() if self._agenda else float("inf")
            if wait > 0:
                with trio.move_on_after(max(0.001, wait)):
                    await self._changed.wait()
                continue
            at, _, job, kind = heapq.heappop(self._agenda)
            if job.removed or self._due.get((job.name, kind)) != at:
                continue  # of a job that is gone, or put on the agenda anew since
            if not job.running:
                return job, kind
            self._put(BUSY_WAIT_S, job, kind)

    async def _carry_out(self, job: Job, kind: Kind) -> None:
        command = self._command(job, kind)
        outcome = await self._world.run(command) if command else Outcome(0)
        if outcome.code == BUSY:
            self._put(BUSY_WAIT_S, job, kind)
            return
        interval: float = self._interval(kind)
        wait = interval
        if outcome.code:
            values = {"job": job.name, "code": outcome.code, "reason": outcome.reason}
            log.warning("maintenance failed", {"command": str(kind), **values})
            wait = interval if outcome.code == Corrupt.exit_code else interval * AGAIN
        _note(job, kind, self._world.wall() - interval + wait)
        if interval and not job.removed:
            self._put(wait, job, kind)

    def _command(self, job: Job, kind: Kind) -> Command | None:
        """The command for it; None: there is nothing to do it with."""
        if not job.history.count:
            return None
        if kind is Kind.PURGE:
            return Command(kind, job.config, ("--wait", str(WAIT_S)))
        if kind is Kind.VERIFY:
            return Command(kind, job.config, ("-r", job.history.distrusted or "latest"))
        return Command(kind, job.config, ("--budget", str(self._settings.scrub_budget_s)))

    def _interval(self, kind: Kind) -> int:
        return {
            Kind.PURGE: self._settings.purge_interval_s,
            Kind.VERIFY: self._settings.verify_interval_s,
            Kind.SCRUB: self._settings.scrub_interval_s,
        }[kind]

    def _put(self, wait_s: float, job: Job, kind: Kind) -> None:
        at = self._world.steady() + wait_s
        self._due[job.name, kind] = at
        heapq.heappush(self._agenda, (at, next(self._order), job, kind))
        self._changed.set()
        self._changed = trio.Event()


def _last(job: Job, kind: Kind) -> float:
    """When it was done last, or counts as done, in wall time; 0 = never."""
    memory = job.memory
    return {
        Kind.PURGE: memory.purged,
        Kind.VERIFY: memory.verified,
        Kind.SCRUB: memory.scrubbed,
    }[kind]


def _note(job: Job, kind: Kind, wall: float) -> None:
    """Remember that it was done, or counts as done, at that time."""
    if kind is Kind.PURGE:
        job.memory.purged = wall
    elif kind is Kind.VERIFY:
        job.memory.verified = wall
    else:
        job.memory.scrubbed = wall
