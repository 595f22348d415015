"""The scheduler: one task per job, two pools for backups, two lanes for maintenance.

A job's task waits for its next run, then for a slot, runs the backup and looks at what it left
behind. Whatever may change meanwhile (configuration, clock, an operator's `run`) only wakes the
task, which then plans anew; nothing but a stop past its deadline ends a running backup.

Fast and slow pool have `worker-limit` slots each. A backup in a fast slot that turns out to be slow
moves on to a slow slot as soon as one is free, so that long backups never hold up short ones.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import trio

from backyfs.config.site import Site
from backyfs.engine.scheduling.history import FAST_S, Revision
from backyfs.engine.scheduling.jobs import FAST, SLOW, Job, Retry
from backyfs.engine.scheduling.maintenance import WAIT_S, Lane
from backyfs.engine.scheduling.memory import Memory
from backyfs.engine.scheduling.pools import Pool
from backyfs.engine.scheduling.world import Command, Kind, Outcome, World
from backyfs.errors import BackyfsError, UsageError

log = logging.getLogger(__name__)

CLOCK_POLL_S = 30.0
"""How often the clock is compared with the steady one."""

CLOCK_JUMP_S = 5.0
"""How far they may drift apart before all jobs plan anew."""

_STOPPED = (-2, -15, 130, 143)
"""Exit codes of a command that was told to stop."""


class Scheduler:
    """Keeps the jobs of a site. `memories`: what an earlier scheduler remembered, by job."""

    def __init__(
        self,
        site: Site,
        world: World,
        memories: Mapping[str, Memory] | None = None,
        *,
        clock_poll_s: float = CLOCK_POLL_S,
    ) -> None:
        limit = site.settings.worker_limit
        self.site = site
        self.jobs: dict[str, Job] = {}
        self.pools = {FAST: Pool(FAST, limit), SLOW: Pool(SLOW, limit)}
        self.lanes = [
            Lane("purge", (Kind.PURGE,), site.maintenance, world),
            Lane("check", (Kind.VERIFY, Kind.SCRUB), site.maintenance, world),
        ]
        self.stopping = False
        self._world = world
        self._memories = dict(memories or {})
        self._clock_poll_s = clock_poll_s
        self._backups: trio.Nursery | None = None
        self._rest = trio.CancelScope()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Schedule until `stop` is called and what runs then has ended."""
        async with trio.open_nursery() as backups:
            self._backups = backups
            for config in self.site.jobs.values():
                self._add(config.name)
            with self._rest:
                async with trio.open_nursery() as others:
                    for lane in self.lanes:
                        others.start_soon(lane.run)
                    others.start_soon(self._watch_clock)
                    task_status.started()
        self._backups = None
        for job in self.jobs.values():
            job.end()

    def stop(self) -> None:
        """Start nothing more, end maintenance, give running backups `stop-timeout` to finish."""
        if self.stopping or self._backups is None:
            return
        self.stopping = True
        self._rest.cancel()
        timeout_s = self.site.settings.stop_timeout_s
        self._backups.cancel_scope.deadline = trio.current_time() + timeout_s
        self._wake_all()

    def reload(self, site: Site) -> list[str]:
        """Use another configuration; returns what cannot change while the scheduler runs.

        Running backups go on; a job that changed uses its new form from the next run on.
        """
        fixed = _fixed(self.site, site)
        self.site = site
        for pool in self.pools.values():
            pool.resize(site.settings.worker_limit)
        for job in list(self.jobs.values()):
            if job.name not in site.jobs:
                job.removed = True
                job.wake()
            elif job.config != site.jobs[job.name] or job.removed:
                job.removed = False
                job.configure(site.jobs[job.name])
        for name in site.jobs:
            if name not in self.jobs:
                self._add(name)
        for lane in self.lanes:
            lane.configure(site.maintenance, self.jobs)
        return fixed

    def trigger(self, name: str) -> bool:
        """Run a job now, whatever its schedule says; False: it runs or waits for a slot already.

        UsageError: there is no such job.
        """
        job = self.jobs.get(name)
        if job is None or job.removed:
            raise UsageError(f"Unknown job {name}")
        if job.running or job.queued:
            return False
        job.forced = True
        job.wake()
        return True

    def memories(self) -> dict[str, Memory]:
        """What is to be remembered of each job."""
        return {name: job.memory for name, job in self.jobs.items()}

    def _add(self, name: str) -> None:
        memory, longest_s = self._memories.get(name) or Memory(), self.site.settings.retry_longest_s
        job = Job(self.site.jobs[name], memory, self._world, retry_longest_s=longest_s)
        self.jobs[name] = job
        assert self._backups is not None
        self._backups.start_soon(self._keep, job)

    def _wake_all(self) -> None:
        for job in self.jobs.values():
            job.wake()

    async def _keep(self, job: Job) -> None:
        """The life of a job: from its first look at the repository until it is removed."""
        await self._look(job)
        for lane in self.lanes:
            lane.add(job)
        while not self._is_over(job):
            await self._step(job)
        if job.removed and self.jobs.get(job.name) is job:
            self._memories[job.name] = job.memory
            del self.jobs[job.name]

    def _is_over(self, job: Job) -> bool:
        return job.removed or self.stopping

    async def _step(self, job: Job) -> None:
        """Wait for the next run, or run."""
        plan = job.next()
        wait = plan.at - self._world.wall()
        if wait > 0:
            job.rest()
            await job.sleep(wait)  # ends early when something changed: then plan anew
        elif await job.take_slot(self.pools[job.pool]):
            try:
                await self._attempt(job)
            finally:
                job.give_slot()

    async def _attempt(self, job: Job) -> None:
        """Run the backup, and note how it ended; but first see whether somebody else made one."""
        if self._is_over(job):
            return
        before = job.history.last
        await self._look(job)
        if job.served(before):
            log.info("backed up by somebody else", {"job": job.name})
            return
        job.start()
        before = job.history.last
        outcome = await self._back_up(job)
        unknown = await self._look(job)
        if outcome.code == 0:
            outcome = _judged(before, job.history.last, unknown)
        if outcome.code == 0:
            await self._succeeded(job)
        elif not (self.stopping and outcome.code in _STOPPED):
            settings = self.site.settings
            job.failed(outcome, Retry(settings.retry_first_s, settings.retry_longest_s))
            self._tell(job, outcome)

    async def _succeeded(self, job: Job) -> None:
        """Give the slot back, and have done what follows a backup."""
        last = job.history.last
        assert last is not None
        job.succeeded()
        job.rest()
        log.info("backed up", {"job": job.name, "revision": last.id, "seconds": last.seconds})
        job.give_slot()
        self.lanes[0].request(job, Kind.PURGE)
        await self._world.call_back(job.config)

    async def _back_up(self, job: Job) -> Outcome:
        """One backup with the tags that are due by now: waiting for a slot may have taken long."""
        config = job.config
        tags = ",".join(job.next().tags)
        try:
            await self._world.prepare(config)
            return await self._world.run(
                Command(Kind.BACKUP, config, ("--wait", str(WAIT_S), tags))
            )
        except BackyfsError as exc:
            return Outcome(exc.exit_code, exc.message)
        except trio.Cancelled:
            values = {"job": config.name, "stop_timeout_s": self.site.settings.stop_timeout_s}
            log.warning("backup ended unfinished, the scheduler stops", values)
            raise

    async def _look(self, job: Job) -> str:
        """Learn what the repository holds; while it cannot be read, what was known counts.

        First of all a guest is thawed that a killed backup left frozen. Returns why it cannot.
        """
        await self._world.settle(job.config)
        try:
            job.learn(await self._world.contents(job.config))
        except BackyfsError as exc:
            job.known = True
            log.warning("repository cannot be read", {"job": job.name, "reason": exc.message})
            return exc.message
        return ""

    def _tell(self, job: Job, outcome: Outcome) -> None:
        memory = job.memory
        values = {
            "job": job.name,
            "code": outcome.code,
            "reason": outcome.reason,
            "failures": memory.failures,
            "retry_in_s": round(memory.retry_at - self._world.wall()),
        }
        log.log(logging.WARNING if memory.failures else logging.INFO, "backup failed", values)

    async def _watch_clock(self) -> None:
        """Notice when the clock is set or the machine was asleep; move slow backups on."""
        async with trio.open_nursery() as nursery:
            before = self._offsets()
            while True:
                await trio.sleep(self._clock_poll_s)
                now = self._offsets()
                if any(abs(a - b) > CLOCK_JUMP_S for a, b in zip(now, before, strict=True)):
                    by_s = now[0] - before[0]
                    log.warning("the clock was set", {"by_s": round(by_s, 1)})
                    for job in self.jobs.values():
                        job.clock_was_set()
                    before = now
                for job in self._slow_in_fast_slots():
                    nursery.start_soon(self._move, job)

    def _offsets(self) -> tuple[float, float]:
        """Wall minus steady time, and steady minus the time trio sleeps by."""
        steady = self._world.steady()
        return self._world.wall() - steady, steady - trio.current_time()

    def _slow_in_fast_slots(self) -> list[Job]:
        fast, steady = self.pools[FAST], self._world.steady()
        if not fast.running:
            return []
        return [
            job
            for job in self.jobs.values()
            if job.slot is fast and not job.moving and steady - job.started > FAST_S
        ]

    async def _move(self, job: Job) -> None:
        """Let a backup go on in a slot of the slow pool, ahead of those that have not begun."""
        run = job.started
        job.moving = True
        try:
            await self.pools[SLOW].take(float("-inf"))
        finally:
            job.moving = False
        if job.running and job.started == run:
            job.move(self.pools[SLOW])
        else:
            self.pools[SLOW].give()


def _judged(before: Revision | None, last: Revision | None, unknown: str) -> Outcome:
    """What to think of a command that succeeded, by the newest revision before and after it."""
    if unknown:
        return Outcome(1, f"the command succeeded, but what it made cannot be read: {unknown}")
    if last is None or (before is not None and before.id == last.id):
        return Outcome(1, "the command succeeded but made no revision")
    return Outcome(0)


def _fixed(old: Site, new: Site) -> list[str]:
    """The settings that differ but only count when the daemon starts."""
    pairs = {
        "base-dir": (old.settings.base_dir, new.settings.base_dir),
        "telnet-addrs": (old.settings.telnet_addrs, new.settings.telnet_addrs),
        "telnet-port": (old.settings.telnet_port, new.settings.telnet_port),
    }
    return [name for name, (before, after) in pairs.items() if before != after]
