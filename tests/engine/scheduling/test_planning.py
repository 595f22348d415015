"""When a job runs and with which tags; back-off; what is known of revisions."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backyfs.config.schedule import DAILY, HOURLY, Rule, Schedule
from backyfs.engine.scheduling import backoff, planning
from backyfs.engine.scheduling.history import History, Revision, observe

HOUR, DAY = 3600, 86_400
NOW = 1_795_000_000.0


def offset(name: str, schedule: Schedule = DAILY) -> int:
    return planning.offset_s(name, schedule)


def test_the_first_run_is_at_the_first_slot_with_all_tags() -> None:
    plan = planning.plan(DAILY, offset("a"), {}, NOW, NOW)
    assert NOW < plan.at <= NOW + DAY
    assert plan.tags == ("daily", "weekly", "monthly")
    later = planning.plan(DAILY, offset("a"), {}, NOW + 3 * DAY, NOW)
    assert later.at == NOW + 3 * DAY, "a slot was missed: now"


def test_a_made_backup_is_followed_by_one_at_the_next_slot() -> None:
    at = planning.plan(DAILY, offset("a"), {}, NOW, NOW).at
    newest = dict.fromkeys(DAILY, at + 30)
    plan = planning.plan(DAILY, offset("a"), newest, at + 60, NOW)
    assert (plan.at, plan.tags[0]) == (at + DAY, "daily")


def test_a_missed_slot_is_made_up_for_at_once() -> None:
    at = planning.plan(DAILY, offset("a"), {}, NOW, NOW).at
    newest = dict.fromkeys(DAILY, at)
    assert planning.plan(DAILY, offset("a"), newest, at + DAY + 5, NOW).at == at + DAY + 5
    assert planning.due_tags(DAILY, offset("a"), newest, at + DAY + 5, NOW)[0] == "daily"
    assert planning.due_tags(DAILY, offset("a"), newest, at + DAY - 5, NOW) == ()


def test_a_backup_shortly_before_a_slot_serves_it() -> None:
    at = planning.plan(DAILY, offset("a"), {}, NOW, NOW).at
    newest = dict.fromkeys(DAILY, at - 0.2 * DAY)
    assert planning.plan(DAILY, offset("a"), newest, at - 0.1 * DAY, NOW).at == at + DAY
    newest = dict.fromkeys(DAILY, at - 0.3 * DAY)
    assert planning.plan(DAILY, offset("a"), newest, at - 0.1 * DAY, NOW).at == at


def test_a_new_tag_waits_for_the_next_run() -> None:
    at = planning.plan(DAILY, offset("a"), {}, NOW, NOW).at
    more = {**DAILY, "yearly": Rule(365 * DAY, 1)}
    newest = dict.fromkeys(DAILY, at)
    plan = planning.plan(more, offset("a"), newest, at + 60, NOW)
    assert plan.at == at + DAY
    assert "yearly" in plan.tags


def test_a_new_tag_has_its_own_slot_when_no_other_comes_before() -> None:
    """A VM that was backed up once a week shall be every hour from now on."""
    weekly = {"weekly": NOW - 10}
    plan = planning.plan(HOURLY, offset("a", HOURLY), weekly, NOW, NOW - DAY, NOW)
    assert NOW < plan.at <= NOW + HOUR
    assert plan.tags[0] == "hourly"
    for now in (plan.at, plan.at + 30, plan.at + 5 * HOUR):
        again = planning.plan(HOURLY, offset("a", HOURLY), weekly, now, NOW - DAY, NOW)
        assert (again.at, again.tags[0]) == (now, "hourly"), "it waits for a worker slot, say"
        assert "weekly" not in again.tags


@pytest.mark.parametrize("schedule", [DAILY, HOURLY])
def test_tags_share_revisions(schedule: Schedule) -> None:
    """Over a year: as many runs as the shortest interval has, and each tag at its own interval."""
    newest: dict[str, float] = {}
    now, made = NOW, []
    while now < NOW + 200 * DAY:
        plan = planning.plan(schedule, offset("vm", schedule), newest, now, NOW)
        now = plan.at
        newest |= dict.fromkeys(plan.tags, now)
        made.append((now, plan.tags))
    for tag, rule in schedule.items():
        times = [at for at, tags in made if tag in tags][1:]
        assert {b - a for a, b in pairwise(times)} == {rule.interval_s}
    shortest = planning.shortest(schedule)
    assert abs(len(made) - 200 * DAY / shortest) <= 1


def test_jobs_are_spread_evenly_and_for_ever() -> None:
    hours = [0] * 24
    for n in range(1000):
        at = planning.plan(DAILY, offset(f"web{n}.example"), {}, NOW, NOW).at
        hours[int(at % DAY // HOUR)] += 1
    assert max(hours) / (1000 / 24) < 1.5
    assert offset("web1") == offset("web1") != offset("web2")


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c"]),
        st.tuples(st.integers(1, 40 * DAY), st.integers(1, 9)),
        min_size=1,
    ),
    st.text(min_size=1, max_size=5),
    st.lists(st.floats(0, 0.2), min_size=20, max_size=20),
)
def test_no_gap_is_longer_than_the_sla_allows(
    rules: dict[str, tuple[int, int]], name: str, delays: list[float]
) -> None:
    """Runs that begin up to a fifth of the interval late, whatever the intervals are."""
    schedule = {tag: Rule(*rule) for tag, rule in rules.items()}
    where, short = offset(name, schedule), planning.shortest(schedule)
    newest: dict[str, float] = {}
    now = before = NOW
    for delay in delays:
        plan = planning.plan(schedule, where, newest, now, NOW)
        assert plan.at >= now
        assert plan.tags
        now = plan.at + delay * short
        tags = planning.due_tags(schedule, where, newest, now, NOW) or plan.tags
        newest |= dict.fromkeys(tags, now)
        assert now <= planning.deadline(schedule, before) + 1e-3
        before = now


def test_back_off_doubles_from_two_minutes_to_six_hours() -> None:
    minutes = [backoff.wait_s(n, 120, 6 * HOUR) / 60 for n in range(1, 12)]
    assert minutes == [2, 4, 8, 16, 32, 64, 128, 256, 360, 360, 360]
    assert backoff.wait_s(10_000, 120, 6 * HOUR) == 6 * HOUR


def revision(n: int, time: float, *tags: str, good: bool = True, relied: bool = True) -> Revision:
    return Revision(str(n), time, tags, 5.0, good, relied)


def test_history_goes_by_number_and_a_known_revision_keeps_its_age() -> None:
    """The clock is set back by a day between two looks."""
    first = [revision(1, NOW, "daily", "weekly")]
    history = observe(History(), first, steady=1000.0, wall=NOW + 10)
    assert history.newest["weekly"].at == 990.0
    wall = NOW + 10 - DAY
    later = [*first, revision(2, wall, "daily")]
    history = observe(history, later, steady=1000.0, wall=wall)
    assert history.newest["weekly"].at == 990.0
    assert history.newest["daily"].at == 1000.0
    assert history.good is not None
    assert history.good.id == "2"


def test_a_revision_of_the_future_is_followed_by_a_backup() -> None:
    """The clock was set back while no scheduler ran: it may be of yesterday as well as of now."""
    first = [revision(1, NOW + DAY, "daily")]
    history = observe(History(), first, steady=50.0, wall=NOW)
    assert planning.due_tags(DAILY, offset("a"), history.wall(NOW - 50.0), NOW, NOW)
    assert history.good is not None
    assert history.good.at == 50.0
    history = observe(history, [*first, revision(2, NOW, "daily")], steady=60.0, wall=NOW + 10)
    assert history.newest["daily"].at == 50.0
    nearly = observe(History(), [revision(1, NOW + 5, "daily")], steady=50.0, wall=NOW)
    assert nearly.newest["daily"].at == 50.0


def test_torn_counts_for_the_schedule_and_distrusted_does_not() -> None:
    revisions = [
        revision(1, NOW - 20, "daily"),
        revision(2, NOW - 10, "daily", good=False),
        revision(3, NOW - 5, "daily", "manual:x", good=False, relied=False),
    ]
    history = observe(History(), revisions, steady=100.0, wall=NOW)
    assert history.newest["daily"].id == "2"
    assert history.good is not None
    assert history.good.id == "1"
    assert (history.distrusted, history.manual_tags, history.count) == ("3", ("manual:x",), 3)
