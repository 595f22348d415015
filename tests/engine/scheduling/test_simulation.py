"""A year and more of a large site, in seconds: the real scheduler on trio's clock.

    BACKYFS_SIMULATION=full python -m pytest tests/engine/scheduling/test_simulation.py

runs 1000 VMs for 400 days; without it, fewer of both.
"""

from __future__ import annotations

import os
import random
from itertools import pairwise

import pytest
import trio

from backyfs.config.schedule import DAILY, HOURLY, Rule, Schedule
from tests.engine.scheduling.simulation import DAY, START, JumpingClock, Stretch, World, live, site

FULL = os.environ.get("BACKYFS_SIMULATION") == "full"
VMS, DAYS = (1000, 400) if FULL else (250, 100)


WEEKLY: Schedule = {"weekly": Rule(7 * 86_400, 5), "monthly": Rule(30 * 86_400, 4)}


def _schedule(number: int) -> Schedule:
    if number in (50, 150):
        return HOURLY
    return WEEKLY if number % 2 == 0 else DAILY


def _seconds(name: str, rng: random.Random) -> float:
    """Every fiftieth VM takes hours."""
    number = int(name[2:])
    if number % 50 == 7:
        return rng.uniform(1.0, 2.5) * 3600
    return rng.uniform(5, 90)


def _fails(name: str, now: float, rng: random.Random) -> int:
    """One VM in ten fails now and then; one in a hundred is broken for two weeks."""
    number = int(name[2:])
    if number % 100 == 3 and 30 * DAY < now < 44 * DAY:
        return 13
    if number % 10 == 1 and rng.random() < 0.1:
        return rng.choice([1, 13, 14, -9, 75])
    return 0


def _stretches() -> list[Stretch]:
    """Undisturbed weeks, then outages, lost memories and a clock that is set."""
    rng = random.Random(4)
    stretches = [Stretch(21 * DAY)]
    total = 21.0
    while total < DAYS:
        up = rng.uniform(2, 20)
        down = rng.choice([0.0, 0.01, 0.2, 1.5, 3.0])
        jump = rng.choice([0.0, 0.0, 3600.0, -3600.0, -DAY, DAY / 2])
        stretches.append(Stretch(up * DAY, down * DAY, jump, forget=rng.random() < 0.3))
        total += up + down
    return stretches


@pytest.fixture
def clock() -> JumpingClock:
    return JumpingClock()


@pytest.mark.timeout(900)
async def test_a_large_site_for_a_long_time(clock: JumpingClock) -> None:
    schedules = {f"vm{n}": _schedule(n) for n in range(VMS)}
    world = World(seconds=_seconds, fails=_fails, purge_every=10 if FULL else 1)
    begin = trio.current_time()
    down = await live(world, site(schedules, workers=4), _stretches())
    end = trio.current_time()

    assert sorted(world.vms) == sorted(schedules)
    assert world.running_max <= 8
    assert world.compared > VMS * DAYS / (40 if FULL else 2)
    assert world.called_back > VMS * DAYS * 0.45

    # The load is spread, once all jobs have a history (chance is large where jobs are few).
    bin_hours = 1 if FULL else 6
    bins = [0] * (24 // bin_hours)
    for start in world.starts:
        if begin + 2 * DAY <= start < begin + 20 * DAY:
            bins[int((start - begin) % DAY // 3600) // bin_hours] += 1
    assert max(bins) / (sum(bins) / len(bins)) < 1.5

    # SLA: no gap is longer than 1.5 intervals, but for the time no scheduler ran or it failed, and
    # as long as all slots are needed for what an outage left. A clock that is set back while none
    # runs makes a revision look younger than it is: then the gap is what the clock says.
    backlog_s = 1.2 * VMS * 47.5 / 4
    down = [(x, y + backlog_s if y - x > 0.1 * DAY else y) for x, y in down]
    for name, schedule in schedules.items():
        interval = min(rule.interval_s for rule in schedule.values())
        vm = world.vms[name]
        excuses = [*down, *vm.excused]
        if vm.failing_since is not None:
            excuses.append((vm.failing_since, end))
        made = list(zip([begin, *vm.made, end], [START, *vm.walls, world.wall()], strict=True))
        for (a, wall_a), (b, wall_b) in pairwise(made):
            excused = sum(max(0.0, min(b, y) - max(a, x)) for x, y in excuses)
            gap = min(b - a, wall_b - wall_a) - excused
            assert gap <= 1.5 * interval, (name, a / DAY, b / DAY, gap / interval)
