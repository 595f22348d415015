"""One job as its task sees it: what is known of it, what it waits for, and its next run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import trio

from backyfs.config.site import SiteJob
from backyfs.engine.scheduling import backoff, planning
from backyfs.engine.scheduling.history import History, Revision, observe
from backyfs.engine.scheduling.memory import Memory
from backyfs.engine.scheduling.planning import Plan
from backyfs.engine.scheduling.pools import Pool
from backyfs.engine.scheduling.world import Clocks, Contents, Outcome

FAST, SLOW = "fast", "slow"


class Status(StrEnum):
    """What a job does; the words are Backy's, but for the last."""

    STARTING = "reading repository"
    WAITING = "waiting for deadline"
    QUEUED_FAST = "waiting for worker slot (fast)"
    QUEUED_SLOW = "waiting for worker slot (slow)"
    RUNNING_FAST = "running (fast)"
    RUNNING_SLOW = "running (slow)"
    FAILED = "failed"
    ENDED = "not scheduled"


_QUEUED = {FAST: Status.QUEUED_FAST, SLOW: Status.QUEUED_SLOW}
_RUNNING = {FAST: Status.RUNNING_FAST, SLOW: Status.RUNNING_SLOW}


@dataclass(frozen=True, slots=True)
class Retry:
    """The waits of the back-off, in seconds."""

    first_s: float
    longest_s: float


class Job:
    """A job of the running scheduler; only its own task (and a reload) changes it.

    What its memory has in wall time is kept in steady time here, so that no set clock moves it.
    """

    def __init__(
        self, config: SiteJob, memory: Memory, clocks: Clocks, *, retry_longest_s: float
    ) -> None:
        self.config = config
        self.memory = memory
        self.history = History()
        self.quarantined = 0
        self.status = Status.STARTING
        self.removed = False
        self.forced = False
        self._clocks = clocks
        self.slot: Pool | None = None
        self.moving = False
        self.started = 0.0
        self._waiting = trio.CancelScope()
        self._offset = planning.offset_s(config.name, config.schedule)
        self._scheduled = clocks.steady()
        self.known = False
        self._hold = self._planned = 0.0
        self._first_seen, self._retry_at = self._recall(retry_longest_s)
        self._remember()

    @property
    def name(self) -> str:
        """The job's name, which is that of its VM."""
        return self.config.name

    @property
    def pool(self) -> str:
        """Which pool its next backup belongs to."""
        return FAST if self.history.fast else SLOW

    @property
    def running(self) -> bool:
        """Whether a backup runs now."""
        return self.status in (Status.RUNNING_FAST, Status.RUNNING_SLOW)

    @property
    def queued(self) -> bool:
        """Whether it waits for a slot."""
        return self.status in (Status.QUEUED_FAST, Status.QUEUED_SLOW)

    def configure(self, config: SiteJob) -> None:
        """Use another configuration from the next run on."""
        wall = self._clocks.wall()
        was_due = self._plan(wall).at <= wall
        if config.schedule != self.config.schedule:
            self._scheduled = self._clocks.steady()
        self.config = config
        self._offset = planning.offset_s(config.name, config.schedule)
        self._hold = min(self._hold, self._spread())
        if not was_due and self._plan(wall).at <= wall:  # its slots lie elsewhere now
            self._hold = self._spread()
        self.wake()

    def start(self) -> None:
        """Note that a backup runs in the slot it holds."""
        assert self.slot is not None
        self.status = _RUNNING[self.slot.name]
        self.forced = False
        self.started = self._clocks.steady()
        self.memory.attempted = self._clocks.wall()

    def rest(self) -> None:
        """Note that nothing runs."""
        self.status = Status.FAILED if self.memory.failures else Status.WAITING

    def end(self) -> None:
        """Note that its scheduler ends."""
        self.status = Status.ENDED

    def wake(self) -> None:
        """End its waiting, so that the task looks again at what is to be done."""
        self._waiting.cancel()

    async def sleep(self, seconds: float) -> None:
        """Wait so long, or until somebody wakes the job."""
        self._planned = self._clocks.steady() + seconds
        self._waiting = trio.CancelScope(deadline=trio.current_time() + max(0.001, seconds))
        with self._waiting:
            await trio.sleep_forever()

    async def take_slot(self, pool: Pool) -> bool:
        """Wait for a slot of the pool; False: somebody woke the job meanwhile."""
        self.status = _QUEUED[pool.name]
        with trio.CancelScope() as self._waiting:
            await pool.take(self.deadline())
            self.slot = pool
            return True
        return False

    def give_slot(self) -> None:
        """Give the slot back that it holds."""
        if self.slot is not None:
            self.slot.give()
            self.slot = None

    def move(self, pool: Pool) -> None:
        """Hold a slot of `pool` that was taken for it instead of the one it had."""
        self.give_slot()
        self.slot = pool
        self.status = _RUNNING[pool.name]

    def learn(self, contents: Contents) -> None:
        """Take in what the repository holds."""
        wall, steady = self._clocks.wall(), self._clocks.steady()
        self.history = observe(self.history, contents.revisions, steady=steady, wall=wall)
        self.quarantined = contents.quarantined
        if not self.known:
            self.known = True
            if self._plan(wall).at <= wall:
                self._hold = self._spread()

    def _spread(self) -> float:
        """Until when it waits if it is due now, with many others perhaps; in steady time."""
        return self._clocks.steady() + planning.catch_up_s(self.name, self.config.schedule)

    def next(self) -> Plan:
        """The next run, as things stand. Its time is in the past when it should run now."""
        wall = self._clocks.wall()
        plan = self._plan(wall)
        if self.forced:
            return Plan(wall, plan.tags)
        if self._retry_at:
            return Plan(self._retry_at + wall - self._clocks.steady(), plan.tags)
        hold = self._hold - self._clocks.steady()
        return Plan(max(plan.at, wall + hold), plan.tags) if hold > 0 else plan

    def _plan(self, wall: float) -> Plan:
        ahead = wall - self._clocks.steady()
        newest, first_seen = self.history.wall(ahead), self._first_seen + ahead
        since = self._scheduled + ahead
        return planning.plan(self.config.schedule, self._offset, newest, wall, first_seen, since)

    def since(self) -> float:
        """The wall time of the newest good revision, else when the job was first seen."""
        at = self.history.good.at if self.history.good else self._first_seen
        return at + self._clocks.wall() - self._clocks.steady()

    def deadline(self) -> float:
        """When the job breaks its SLA, in steady time: its rank among those that wait."""
        wall, steady = self._clocks.wall(), self._clocks.steady()
        return planning.deadline(self.config.schedule, self.since()) - wall + steady

    def overdue_s(self) -> float:
        """For how long it has been breaking its SLA; 0: it keeps it."""
        return planning.overdue_s(self.config.schedule, self.since(), self._clocks.wall())

    def served(self, before: Revision | None) -> bool:
        """Whether a revision made since `before`, the newest then, leaves nothing to do now."""
        last, wall = self.history.last, self._clocks.wall()
        if last is None or (before is not None and before.id == last.id):
            return False
        if self.forced or self._plan(wall).at <= wall:
            return False
        self.succeeded()
        return True

    def succeeded(self) -> None:
        """Note a good end of a backup."""
        self.memory.failures, self.memory.retry_at, self._retry_at = 0, 0.0, 0.0
        self.memory.code, self.memory.reason = 0, ""

    def failed(self, outcome: Outcome, retry: Retry) -> None:
        """Note a bad end, and when to try again. Busy is none: it was only too early."""
        wait = backoff.BUSY_WAIT_S
        if outcome.code != backoff.BUSY:
            self.memory.failures += 1
            wait = backoff.wait_s(self.memory.failures, retry.first_s, retry.longest_s)
        self.memory.code, self.memory.reason = outcome.code, outcome.reason
        self._retry_at = self._clocks.steady() + min(wait, retry.longest_s)
        self._remember()

    def clock_was_set(self) -> None:
        """Keep the distance of what was to happen; wake up and plan anew.

        By the new time many jobs may be due at once, or sooner: none runs before it was to.
        """
        self._hold = max(self._hold, self._planned)
        self._remember()
        self.wake()

    def _remember(self) -> None:
        """Have the memory say in wall time when that is."""
        ahead = self._clocks.wall() - self._clocks.steady()
        self.memory.first_seen = self._first_seen + ahead
        self.memory.retry_at = self._retry_at + ahead if self._retry_at else 0.0

    def _recall(self, retry_longest_s: float) -> tuple[float, float]:
        """When it was first seen, and when to try again, in steady time (0: as scheduled).

        What the memory has beyond that comes from a clock that was wrong.
        """
        wall, steady, memory = self._clocks.wall(), self._clocks.steady(), self.memory
        first_seen = min(memory.first_seen or wall, wall)
        wait = min(memory.retry_at - wall, retry_longest_s)
        return first_seen - wall + steady, steady + wait if memory.retry_at else 0.0
