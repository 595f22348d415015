"""A world made of trio's clock and a list of revisions per VM, for the scheduler to live in.

It keeps score: when which VM was backed up, what failed on purpose, when no scheduler ran. What
retention decides is compared, at every purge, with an oracle written another way.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import trio

from backyfs.config.job import Job as JobFile
from backyfs.config.schedule import Schedule
from backyfs.config.site import Maintenance, Settings, Site, SiteJob
from backyfs.engine.retention import Candidate, decide
from backyfs.engine.scheduling.history import Revision
from backyfs.engine.scheduling.memory import Memory
from backyfs.engine.scheduling.scheduler import Scheduler
from backyfs.engine.scheduling.world import Command, Contents, Kind, Outcome
from backyfs.errors import BackyfsError

DAY = 86_400.0
START = datetime(2026, 1, 1, tzinfo=UTC).timestamp()


def site(schedules: Mapping[str, Schedule], *, workers: int = 3, checks: bool = False) -> Site:
    """A site of jobs with these schedules, by name."""
    return Site(
        path=Path("/sim.conf"),
        settings=Settings(worker_limit=workers, stop_timeout_s=60),
        maintenance=Maintenance(
            worker_limit=workers,
            purge_interval_s=0,
            verify_interval_s=30 * 86_400 if checks else 0,
            scrub_interval_s=7 * 86_400 if checks else 0,
        ),
        jobs={n: SiteJob(n, JobFile("sim", {}, schedule)) for n, schedule in schedules.items()},
    )


class JumpingClock(trio.abc.Clock):
    """Jumps to the next deadline whenever nothing else can run. As trio's autojump clock, in half
    the time: it needs no turn of the loop to find out that all tasks wait. Not with threads.
    """

    def __init__(self) -> None:
        self._now = 0.0

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        if deadline == float("inf"):
            return 999999999
        self._now = max(self._now, deadline)
        return 0


@dataclass
class Vm:
    """A VM of the simulation: what is stored, what ever was, and what the oracle still has."""

    kept: list[tuple[int, Revision]] = field(default_factory=list)
    revisions: list[Revision] = field(default_factory=list)
    """The same, without the numbers."""
    made: list[float] = field(default_factory=list)
    """Steady times of the good revisions, when they were begun."""
    walls: list[float] = field(default_factory=list)
    """Their wall times."""
    oracle: dict[int, tuple[float, set[str], bool]] = field(default_factory=dict)
    busy: bool = False
    attempts: int = 0
    failing_since: float | None = None
    excused: list[tuple[float, float]] = field(default_factory=list)


class World:
    """Time, revisions and commands, all simulated."""

    def __init__(
        self,
        *,
        seed: int = 1,
        seconds: Callable[[str, random.Random], float] = lambda name, rng: rng.uniform(5, 60),
        fails: Callable[[str, float, random.Random], int] = lambda name, now, rng: 0,
        purge_every: int = 1,
    ) -> None:
        self.random = random.Random(seed)
        self.vms: dict[str, Vm] = defaultdict(Vm)
        self.jump = 0.0
        self.starts: list[float] = []
        self.running = 0
        self.running_max = 0
        self.calls: dict[Kind, int] = defaultdict(int)
        self.commands: list[Command] = []
        self.log_commands = False
        self.unreadable = ""
        self.codes: dict[Kind, int] = {}
        """Exit codes of maintenance, where not 0."""
        self.called_back = 0
        self.compared = 0
        self._seconds, self._fails = seconds, fails
        self._purge_every = purge_every
        self._seq = 0

    def wall(self) -> float:
        return START + trio.current_time() + self.jump

    def steady(self) -> float:
        return trio.current_time()

    async def prepare(self, job: SiteJob) -> None:
        pass

    async def settle(self, job: SiteJob) -> None:
        pass

    async def contents(self, job: SiteJob) -> Contents:
        if self.unreadable:
            raise BackyfsError(self.unreadable)
        return Contents(self.vms[job.name].revisions)

    async def call_back(self, job: SiteJob) -> None:
        self.called_back += 1

    async def run(self, command: Command) -> Outcome:
        self.calls[command.kind] += 1
        if self.log_commands:
            self.commands.append(command)
        if command.kind is Kind.BACKUP:
            return await self._back_up(command)
        if self.random.random() < 0.1:
            await trio.sleep(self.random.uniform(1, 60))
        if command.kind is Kind.PURGE:
            self._purge(command.job)
        return Outcome(self.codes.get(command.kind, 0))

    def back_up_by_hand(self, name: str, *tags: str) -> None:
        """What an operator does beside the scheduler."""
        self._add(self.vms[name], self.wall(), tags, 1.0)

    async def _back_up(self, command: Command) -> Outcome:
        vm, begun = self.vms[command.job.name], trio.current_time()
        assert not vm.busy, "two backups of one VM at once"
        seconds = self._seconds(command.job.name, self.random)
        code = self._fails(command.job.name, begun, self.random)
        time = self.wall()
        vm.busy, vm.attempts = True, vm.attempts + 1
        self.running += 1
        self.running_max = max(self.running_max, self.running)
        self.starts.append(begun)
        try:
            await trio.sleep(seconds if code == 0 else seconds / 10)
        finally:
            vm.busy = False
            self.running -= 1
        if code:
            vm.failing_since = begun if vm.failing_since is None else vm.failing_since
            return Outcome(code, "simulated")
        if vm.failing_since is not None:
            vm.excused.append((vm.failing_since, begun))
            vm.failing_since = None
        self._add(vm, time, tuple(command.arguments[-1].split(",")), seconds)
        vm.made.append(begun)
        vm.walls.append(time)
        return Outcome(0)

    def _add(self, vm: Vm, time: float, tags: tuple[str, ...], seconds: float) -> None:
        self._seq += 1
        good = self.random.random() > 0.02
        vm.revisions.append(Revision(str(self._seq), time, tags, seconds, good))
        vm.kept.append((self._seq, vm.revisions[-1]))
        vm.oracle[self._seq] = (time, set(tags), good)

    def _purge(self, job: SiteJob) -> None:
        vm = self.vms[job.name]
        if vm.attempts % self._purge_every:
            return
        now = self.wall()
        self._decide(vm, job.schedule, now)
        consult(vm.oracle, job.schedule, now)
        assert {seq: set(r.tags) for seq, r in vm.kept} == {
            seq: tags for seq, (_, tags, _) in vm.oracle.items()
        }
        self.compared += 1

    def _decide(self, vm: Vm, schedule: Schedule, now: float) -> None:
        """What `purge` does, with the real decisions."""
        candidates = [
            Candidate(r.id, seq, datetime.fromtimestamp(r.time, UTC), r.tags, r.good)
            for seq, r in vm.kept
        ]
        made = {
            d.revision: d for d in decide(datetime.fromtimestamp(now, UTC), schedule, candidates)
        }
        vm.kept = [
            (seq, Revision(r.id, r.time, made[r.id].tags, r.seconds, r.good))
            for seq, r in vm.kept
            if not made[r.id].remove
        ]
        vm.revisions = [revision for _, revision in vm.kept]


def consult(
    oracle: dict[int, tuple[float, set[str], bool]],
    schedule: Schedule,
    now: float,
    *,
    keep: Collection[int] = (),
) -> None:
    """Retention once more, from the sentence in the documentation and nothing else.

    `keep`: revisions that have a tag which never expires.
    """
    expired = {
        (seq, tag)
        for seq, (time, tags, _) in oracle.items()
        for tag in tags
        if tag not in schedule
        or (
            now - time > schedule[tag].keep * schedule[tag].interval_s
            and sum(1 for other, (_, t, _) in oracle.items() if other > seq and tag in t)
            >= schedule[tag].keep
        )
    }
    for seq, tag in expired:
        oracle[seq][1].discard(tag)
    stay = {*keep, max(oracle), max((seq for seq, item in oracle.items() if item[2]), default=-1)}
    for seq in [seq for seq, (_, tags, _) in oracle.items() if not tags and seq not in stay]:
        del oracle[seq]


@dataclass(frozen=True)
class Stretch:
    """A scheduler runs for some time, then none does; then the clock is set by `jump` seconds."""

    up_s: float
    down_s: float = 0.0
    jump: float = 0.0
    forget: bool = False
    """Whether what it remembered is lost, as by kill -9 and a full disk."""


async def live(
    world: World, site: Site, stretches: list[Stretch], *, clock_poll_s: float = 600.0
) -> list[tuple[float, float]]:
    """Let schedulers live through all that; returns when none ran (steady times)."""
    memories: dict[str, Memory] = {}
    down = []
    for stretch in stretches:
        scheduler = Scheduler(site, world, memories, clock_poll_s=clock_poll_s)
        with trio.move_on_after(stretch.up_s):
            await scheduler.run()
        memories = {} if stretch.forget else scheduler.memories()
        down.append((trio.current_time(), trio.current_time() + stretch.down_s))
        await trio.sleep(stretch.down_s)
        world.jump += stretch.jump
    return down
