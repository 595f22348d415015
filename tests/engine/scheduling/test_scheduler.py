"""The scheduler's tasks on trio's clock: failures, reload, stop, pools, clocks that are set."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from backyfs.config.schedule import DAILY, HOURLY, Rule, Schedule
from backyfs.engine.scheduling.jobs import FAST, SLOW, Status
from backyfs.engine.scheduling.memory import Memory
from backyfs.engine.scheduling.scheduler import Scheduler
from backyfs.engine.scheduling.world import Kind
from backyfs.errors import UsageError
from tests.engine.scheduling.simulation import (
    DAY,
    START,
    JumpingClock,
    Stretch,
    World,
    live,
    site,
)

HOUR = 3600.0
WEEKLY: Schedule = {"weekly": Rule(7 * 86_400, 5)}


@pytest.fixture
def clock() -> JumpingClock:
    return JumpingClock()


@asynccontextmanager
async def running(scheduler: Scheduler) -> AsyncIterator[Scheduler]:
    async with trio.open_nursery() as nursery:
        await nursery.start(scheduler.run)
        yield scheduler
        nursery.cancel_scope.cancel()


async def test_a_day_of_an_hourly_job(clock: JumpingClock) -> None:
    world = World()
    world.log_commands = True
    async with running(Scheduler(site({"a": HOURLY}), world)):
        await trio.sleep(DAY + 60)
    assert len(world.starts) == 24
    assert {round(b - a) for a, b in zip(world.starts, world.starts[1:], strict=False)} == {3600}
    assert world.called_back == 24
    kinds = [command.kind for command in world.commands]
    assert kinds == [Kind.BACKUP, Kind.PURGE] * 24
    assert world.commands[0].arguments[-1] == "hourly,daily,weekly,monthly"
    assert {command.arguments[-1] for command in world.commands[2::2]} <= {
        "hourly", "hourly,daily", "hourly,daily,weekly", "hourly,weekly", "hourly,daily,monthly",
        "hourly,monthly", "hourly,weekly,monthly", "hourly,daily,weekly,monthly",
    }  # fmt: skip


async def test_failures_back_off_and_success_ends_it(clock: JumpingClock) -> None:
    broken = True
    world = World(fails=lambda name, now, rng: 13 if broken else 0, seconds=lambda n, r: 0.0)
    async with running(Scheduler(site({"a": HOURLY}), world)) as scheduler:
        await trio.sleep(2 * DAY)
        waits = [round(b - a) / 60 for a, b in zip(world.starts, world.starts[1:], strict=False)]
        assert waits[:9] == [2, 4, 8, 16, 32, 64, 128, 256, 360]
        job = scheduler.jobs["a"]
        assert (job.status, job.memory.code, job.memory.reason) == (Status.FAILED, 13, "simulated")
        assert job.overdue_s() > DAY
        broken = False
        await trio.sleep(7 * HOUR)
        assert (job.status, job.memory.failures) == (Status.WAITING, 0)
        assert job.overdue_s() == 0
        assert round(world.starts[-1] - world.starts[-2]) == 3600


async def test_busy_is_no_failure(clock: JumpingClock) -> None:
    world = World(fails=lambda name, now, rng: 75 if now < 2 * DAY else 0, seconds=lambda n, r: 0)
    async with running(Scheduler(site({"a": DAILY}), world)) as scheduler:
        await trio.sleep(1.5 * DAY)
        assert {round(b - a) for a, b in zip(world.starts, world.starts[1:], strict=False)} == {120}
        job = scheduler.jobs["a"]
        assert (job.memory.failures, job.status) == (0, Status.WAITING)
        await trio.sleep(DAY)
        assert job.memory.code == 0
        assert job.history.count == 1


async def test_a_command_that_makes_no_revision_has_failed(clock: JumpingClock) -> None:
    world = World()
    world._add = lambda *_: None  # type: ignore[method-assign]
    async with running(Scheduler(site({"a": DAILY}), world)) as scheduler:
        await trio.sleep(2 * DAY)
        assert scheduler.jobs["a"].memory.reason == "the command succeeded but made no revision"
        assert len(world.starts) < 20


async def test_what_was_made_cannot_be_read(clock: JumpingClock) -> None:
    """No second backup at once; the next attempt finds that there is one."""
    world = World(seconds=lambda name, rng: 10.0)
    async with running(Scheduler(site({"a": DAILY}), world)) as scheduler:
        await trio.sleep(scheduler.jobs["a"].next().at - world.wall() + 1)
        assert world.running
        world.unreadable = "too many open files"
        await trio.sleep(100)
        memory = scheduler.jobs["a"].memory
        assert memory.reason == (
            "the command succeeded, but what it made cannot be read: too many open files"
        )
        world.unreadable = ""
        await trio.sleep(HOUR)
        assert (len(world.starts), memory.failures, memory.reason) == (1, 0, "")


async def test_a_backup_by_hand_serves_the_slot(clock: JumpingClock) -> None:
    world = World(seconds=lambda name, rng: 10.0)
    async with running(Scheduler(site({"a": DAILY}), world)) as scheduler:
        await trio.sleep(scheduler.jobs["a"].next().at - world.wall() + 60)
        assert world.vms["a"].made
        await trio.sleep(0.9 * DAY)
        world.back_up_by_hand("a", "daily")
        await trio.sleep(0.5 * DAY)
        assert len(world.starts) == 1, "it is only a few hours old when the slot comes"
        await trio.sleep(0.9 * DAY)
        assert len(world.starts) == 2
        world.back_up_by_hand("a", "other")
        scheduler.trigger("a")
        await trio.sleep(60)
        assert len(world.starts) == 3, "an operator said so"
        world.back_up_by_hand("a", "other")
        await trio.sleep(DAY)
        assert len(world.starts) == 4, "that one has no tag of the schedule"


async def test_a_backup_by_hand_ends_the_failures(clock: JumpingClock) -> None:
    world = World(fails=lambda name, now, rng: 13)
    async with running(Scheduler(site({"a": DAILY}), world)) as scheduler:
        await trio.sleep(2 * DAY)
        world.back_up_by_hand("a", "daily", "weekly", "monthly")
        made = len(world.starts)
        await trio.sleep(7 * HOUR)
        job = scheduler.jobs["a"]
        assert (len(world.starts), job.memory.failures, job.status) == (made, 0, Status.WAITING)


async def test_torn_ones_are_not_repeated(clock: JumpingClock) -> None:
    world = World()
    world.random.random = lambda: 0.0  # type: ignore[method-assign]  # none is good
    async with running(Scheduler(site({"a": DAILY}), world)) as scheduler:
        await trio.sleep(10 * DAY)
        assert len(world.starts) == 10
        assert scheduler.jobs["a"].overdue_s() > 8 * DAY


async def test_run_now(clock: JumpingClock) -> None:
    world = World(seconds=lambda name, rng: 100.0)
    async with running(Scheduler(site({"a": DAILY}), world)) as scheduler:
        await trio.sleep(1)
        assert scheduler.trigger("a")
        await trio.sleep(1)
        assert scheduler.jobs["a"].running
        assert not scheduler.trigger("a")
        with pytest.raises(UsageError, match="Unknown job b"):
            scheduler.trigger("b")
        await trio.sleep(200)
        assert scheduler.jobs["a"].history.count == 1
        assert scheduler.trigger("a")
        await trio.sleep(200)
        assert scheduler.jobs["a"].history.count == 2


async def test_a_reload_touches_no_running_backup(clock: JumpingClock) -> None:
    world = World(seconds=lambda name, rng: 1000.0)
    before = site({"a": DAILY, "b": DAILY, "c": DAILY})
    async with running(Scheduler(before, world)) as scheduler:
        for name in "ab":
            scheduler.trigger(name)
        await trio.sleep(10)
        assert world.running == 2
        quick: Schedule = {"quick": Rule(1800, 2)}
        after = site({"a": quick, "d": DAILY}, workers=5)
        assert scheduler.reload(after) == []
        await trio.sleep(10)
        assert world.running == 2
        assert set(scheduler.jobs) == {"a", "b", "d"}, "c is gone, b goes when it has ended"
        await trio.sleep(3 * HOUR)
        assert set(scheduler.jobs) == {"a", "d"}
        assert len(world.vms["b"].made) == 1
        assert len(world.vms["a"].made) in (6, 7)
        assert scheduler.pools[SLOW].limit == 5
        settings = replace(after.settings, telnet_port=1)
        assert scheduler.reload(replace(after, settings=settings)) == ["telnet-port"]


async def test_a_job_that_comes_back_while_it_runs_stays(clock: JumpingClock) -> None:
    world = World(seconds=lambda name, rng: 1000.0)
    both = site({"a": DAILY, "b": DAILY})
    async with running(Scheduler(both, world)) as scheduler:
        scheduler.trigger("b")
        await trio.sleep(10)
        scheduler.reload(site({"a": DAILY}))
        await trio.sleep(10)
        scheduler.reload(both)
        await trio.sleep(3 * DAY)
        assert set(scheduler.jobs) == {"a", "b"}
        assert len(world.vms["b"].made) >= 3


async def test_a_stop_lets_backups_finish(clock: JumpingClock) -> None:
    world = World(seconds=lambda name, rng: 50.0)
    scheduler = Scheduler(site({f"vm{n}": DAILY for n in range(9)}, workers=2), world)
    async with trio.open_nursery() as nursery:
        await nursery.start(scheduler.run)
        for name in scheduler.jobs:
            scheduler.trigger(name)
        await trio.sleep(10)
        assert world.running == 2
        scheduler.stop()
        begin = trio.current_time()
    assert trio.current_time() - begin == pytest.approx(40, abs=1)
    assert len(world.starts) == 2
    assert sum(len(vm.made) for vm in world.vms.values()) == 2


async def test_a_stop_does_not_wait_for_ever(
    clock: JumpingClock, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(seconds=lambda name, rng: 50_000.0)
    scheduler = Scheduler(site({"a": DAILY}), world)
    async with trio.open_nursery() as nursery:
        await nursery.start(scheduler.run)
        scheduler.trigger("a")
        await trio.sleep(10)
        scheduler.stop()
        begin = trio.current_time()
    assert trio.current_time() - begin == pytest.approx(60, abs=1)
    assert world.running == 0
    assert scheduler.memories()["a"].failures == 0
    [said] = [one for one in caplog.records if "unfinished" in one.message]
    assert said.args == {"job": "a", "stop_timeout_s": 60}


async def test_long_jobs_never_keep_short_ones_waiting(clock: JumpingClock) -> None:
    """Twenty jobs of a day each for two slow slots, and short hourly ones."""
    names = {f"long{n}": DAILY for n in range(20)}
    world = World(seconds=lambda name, rng: DAY if name.startswith("long") else 30.0)
    async with running(
        Scheduler(site({**names, "short": HOURLY}, workers=2), world, clock_poll_s=600)
    ) as scheduler:
        scheduler.trigger("short")
        await trio.sleep(13 * DAY)
        assert len(world.vms["short"].made) in range(311, 315)
        assert scheduler.pools[SLOW].waiting >= 10
        assert all(len(world.vms[name].made) >= 1 for name in names), "each had its turn"


async def test_a_job_that_becomes_slow_leaves_its_fast_slot(clock: JumpingClock) -> None:
    world = World(seconds=lambda name, rng: 30.0 if trio.current_time() < 3 * DAY else 5 * HOUR)
    scheduler = Scheduler(site({"a": DAILY}, workers=1), world, clock_poll_s=30)
    async with running(scheduler):
        await trio.sleep(3.1 * DAY)
        scheduler.trigger("a")
        await trio.sleep(500)
        seen = [str(scheduler.jobs["a"].status)]
        await trio.sleep(200)
        seen.append(str(scheduler.jobs["a"].status))
        assert seen == [Status.RUNNING_FAST, Status.RUNNING_SLOW]
        assert (scheduler.pools[FAST].running, scheduler.pools[SLOW].running) == (0, 1)
        await trio.sleep(6 * HOUR)
        assert (scheduler.pools[FAST].running, scheduler.pools[SLOW].running) == (0, 0)


@pytest.mark.parametrize("hours", [-0.4, 0.5, 5, 12, 16, -8, -14, -20, 24, -24, 9600, -9595])
async def test_a_clock_that_is_set_starts_no_stampede(clock: JumpingClock, hours: float) -> None:
    world = World()
    names = {f"vm{n}": DAILY for n in range(50)}
    async with running(Scheduler(site(names), world, clock_poll_s=30)):
        await trio.sleep(4 * DAY)
        world.jump += hours * HOUR
        made = len(world.starts)
        await trio.sleep(HOUR)
        assert len(world.starts) - made < 12, "about two an hour are usual"
        await trio.sleep(2 * DAY)
        for vm in world.vms.values():
            gaps = [b - a for a, b in zip(vm.made, vm.made[1:], strict=False)]
            assert max(gaps) <= 1.5 * DAY


async def test_what_was_missed_is_made_up_for_little_by_little(clock: JumpingClock) -> None:
    names = {f"vm{n}": DAILY for n in range(100)}
    world = World(seconds=lambda name, rng: 10.0)
    first = Scheduler(site(names, workers=20), world)
    async with running(first):
        await trio.sleep(3 * DAY)
    await trio.sleep(2 * DAY)
    made = len(world.starts)
    begin = trio.current_time()
    async with running(Scheduler(site(names, workers=20), world, first.memories())):
        await trio.sleep(1200)
    late = [at - begin for at in world.starts[made:]]
    assert len(late) >= 100
    for minute in range(15):
        assert sum(60 * minute <= at < 60 * minute + 60 for at in late) < 20


async def test_a_retry_waits_across_a_restart(clock: JumpingClock) -> None:
    world = World()
    memory = Memory(first_seen=START - DAY, failures=5, retry_at=START + 900, code=13)
    async with running(Scheduler(site({"a": DAILY}), world, {"a": memory})):
        await trio.sleep(899)
        assert world.starts == []
        await trio.sleep(2)
        assert len(world.starts) == 1


async def test_verification_and_scrub_have_their_own_slot(clock: JumpingClock) -> None:
    world = World()
    world.log_commands = True
    names = {f"vm{n}": DAILY for n in range(20)}
    async with running(Scheduler(site(names, workers=1, checks=True), world, clock_poll_s=3600)):
        await trio.sleep(60 * DAY)
    assert 30 <= world.calls[Kind.VERIFY] <= 45
    assert 140 <= world.calls[Kind.SCRUB] <= 180
    scrubs = [command for command in world.commands if command.kind is Kind.SCRUB]
    assert scrubs[0].arguments == ("--budget", "600")


async def test_another_schedule_does_not_wait_for_what_a_set_clock_put_off(
    clock: JumpingClock,
) -> None:
    world = World()
    async with running(Scheduler(site({"a": WEEKLY}), world, clock_poll_s=30)) as scheduler:
        await trio.sleep(10 * DAY)
        world.jump += 3 * DAY
        await trio.sleep(60)
        made = len(world.starts)
        scheduler.reload(site({"a": HOURLY}))
        await trio.sleep(3 * HOUR)
        assert len(world.starts) - made >= 2


async def test_a_shorter_schedule_does_not_start_all_its_jobs(clock: JumpingClock) -> None:
    """Each begins at its own next slot, though it has had none of the new tag's ever."""
    world = World(seconds=lambda name, rng: 1.0)
    names = [f"vm{n}" for n in range(100)]
    async with running(Scheduler(site(dict.fromkeys(names, WEEKLY)), world)) as scheduler:
        await trio.sleep(10 * DAY)
        made = len(world.starts)
        scheduler.reload(site({name: {"daily": DAILY["daily"], **WEEKLY} for name in names}))
        await trio.sleep(HOUR)
        assert len(world.starts) - made < 15, "about five an hour are usual"
        await trio.sleep(DAY)
        assert len({vm.made[-1] for vm in world.vms.values() if vm.made[-1] > 10 * DAY}) == 100


async def test_slots_that_a_schedule_moves_are_made_up_for_little_by_little(
    clock: JumpingClock,
) -> None:
    """Where they lie follows from the longest interval; as when a scheduler starts."""
    world = World(seconds=lambda name, rng: 1.0)
    names = [f"vm{n}" for n in range(200)]
    scheduler = Scheduler(site(dict.fromkeys(names, WEEKLY), workers=50), world)
    async with running(scheduler):
        await trio.sleep(10 * DAY)
        made, begin = len(world.starts), trio.current_time()
        after: Schedule = {**WEEKLY, "monthly": Rule(30 * 86_400, 4)}
        scheduler.reload(site(dict.fromkeys(names, after), workers=50))
        await trio.sleep(1200)
    late = [at - begin for at in world.starts[made:]]
    assert len(late) >= 40
    assert max(sum(60 * m <= at < 60 * m + 60 for at in late) for m in range(15)) < 20


async def test_a_check_remembered_from_the_future_comes(clock: JumpingClock) -> None:
    """The clock was wrong when it was noted; no later than an interval from now it is done."""
    world = World()
    memory = Memory(first_seen=START, verified=START + 400 * DAY)
    async with running(Scheduler(site({"a": DAILY}, checks=True), world, {"a": memory})):
        await trio.sleep(31 * DAY)
    assert world.calls[Kind.VERIFY] == 1


async def test_checks_come_though_no_scheduler_lives_as_long(clock: JumpingClock) -> None:
    """One that is started again each week verifies once a month all the same."""
    world = World()
    names = {f"vm{n}": DAILY for n in range(20)}
    await live(world, site(names, checks=True), [Stretch(6 * DAY)] * 15)
    assert 40 <= world.calls[Kind.VERIFY] <= 65
    assert 180 <= world.calls[Kind.SCRUB] <= 260


@pytest.mark.parametrize(("code", "least", "most"), [(0, 3, 4), (12, 3, 4), (1, 15, 35)])
async def test_a_check_that_failed_comes_again_sooner(
    clock: JumpingClock, code: int, least: int, most: int
) -> None:
    """Unless it failed because of what it found: that is its work."""
    world = World()
    world.codes[Kind.VERIFY] = code
    async with running(Scheduler(site({"a": DAILY}, checks=True), world, clock_poll_s=3600)):
        await trio.sleep(100 * DAY)
    assert least <= world.calls[Kind.VERIFY] <= most


@pytest.mark.parametrize("jump", [-DAY, 400 * DAY])
async def test_a_clock_that_is_set_before_the_first_backup(
    clock: JumpingClock, jump: float
) -> None:
    world = World()
    names = {f"vm{n}": DAILY for n in range(50)}
    async with running(Scheduler(site(names), world, clock_poll_s=30)) as scheduler:
        await trio.sleep(60)
        made = len(world.starts)
        world.jump += jump
        await trio.sleep(HOUR)
        assert len(world.starts) - made < 12
        assert not any(job.overdue_s() for job in scheduler.jobs.values())
        await trio.sleep(1.1 * DAY)
        assert all(vm.made for vm in world.vms.values())
        assert len(world.vms) == 50


@pytest.mark.parametrize("jump", [-400 * DAY, 400 * DAY])
async def test_a_failure_before_it_was_seen_that_the_clock_was_set(
    clock: JumpingClock, jump: float
) -> None:
    world = World(fails=lambda name, now, rng: 13)
    async with running(Scheduler(site({"a": DAILY}), world, clock_poll_s=30)) as scheduler:
        await trio.sleep(65)
        world.jump += jump
        scheduler.trigger("a")
        await trio.sleep(7 * HOUR)
        assert 7 <= len(world.starts) <= 10
        assert scheduler.memories()["a"].retry_at < world.wall() + 6 * HOUR


async def test_what_was_remembered_while_the_clock_was_wrong(clock: JumpingClock) -> None:
    world = World(fails=lambda name, now, rng: 13)
    ahead = START + 400 * DAY
    memory = Memory(first_seen=ahead, failures=3, retry_at=ahead, code=13)
    async with running(Scheduler(site({"a": DAILY}), world, {"a": memory})) as scheduler:
        await trio.sleep(6 * HOUR + 1)
        assert len(world.starts) == 1
        await trio.sleep(1.5 * DAY)
        assert scheduler.jobs["a"].overdue_s()
