"""Retention: Backy's rules, and that the newest good revision never goes."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from backyfs.config.schedule import Rule, Schedule
from backyfs.engine.retention import Candidate, Decision, decide
from backyfs.model import Trust
from tests.engine.revisions import START, candidate
from tests.engine.scheduling.simulation import consult

HOURLY: Schedule = {"hourly": Rule(3600, 3)}
BOTH: Schedule = {"hourly": Rule(3600, 3), "daily": Rule(86400, 2)}


def at(hours: float, schedule: Schedule, *candidates: Candidate) -> dict[int, Decision]:
    """The decisions by the candidates' seq."""
    seqs = {c.revision: c.seq for c in candidates}
    found = decide(START + timedelta(hours=hours), schedule, candidates)
    return {seqs[decision.revision]: decision for decision in found}


def removed(decisions: dict[int, Decision]) -> set[int]:
    return {seq for seq, decision in decisions.items() if decision.remove}


def test_beyond_count_and_age_goes() -> None:
    hourly = [candidate(n, n, "hourly") for n in range(10)]
    found = at(9.5, HOURLY, *hourly)
    assert removed(found) == {0, 1, 2, 3, 4, 5, 6}
    assert "3 newer ones" in found[6].reasons[0]
    assert found[6].expired == ("hourly",)
    assert found[7].tags == ("hourly",)


def test_beyond_count_but_young_stays() -> None:
    """Several backups within an hour: count is exceeded, age is not."""
    quick = [candidate(n, n / 10, "hourly") for n in range(10)]
    assert removed(at(1.0, HOURLY, *quick)) == set()


def test_exactly_the_age_stays() -> None:
    five = [candidate(n, n, "hourly") for n in range(5)]
    assert removed(at(4, HOURLY, *five)) == {0}  # 1 is exactly 3 x 1h old


def test_old_but_within_count_stays() -> None:
    """A missed backup never shortens history."""
    assert removed(at(10_000, HOURLY, *(candidate(n, n, "hourly") for n in range(3)))) == set()


def test_a_tag_outside_the_schedule_goes_and_manual_stays() -> None:
    found = at(
        100,
        HOURLY,
        candidate(1, 0, "yearly"),
        candidate(2, 1, "manual:before upgrade", "yearly"),
        candidate(3, 2, "hourly"),
    )
    assert removed(found) == {1}
    assert found[2].expired == ("yearly",)
    assert found[2].tags == ("manual:before upgrade",)
    assert found[1].reasons == ("yearly is not in the schedule",)


def test_no_tags_goes() -> None:
    found = at(1, HOURLY, candidate(1, 0), candidate(2, 0.5, "hourly"))
    assert removed(found) == {1}
    assert found[1].reasons == ("it has no tags",)


def test_several_tags_go_one_by_one() -> None:
    many = [candidate(n, n, "hourly", *(["daily"] if n % 24 == 0 else [])) for n in range(49)]
    found = at(48.5, BOTH, *many)
    assert found[0].expired == ("hourly", "daily")  # rank 2 of 2, older than 2 days
    assert found[24].expired == ("hourly",)
    assert removed(found) == set(range(46)) - {24}


def test_without_schedule_nothing_goes() -> None:
    assert removed(at(100_000, {}, candidate(1, 0), candidate(2, 1, "daily"))) == set()


def test_nothing_to_decide() -> None:
    assert at(0, HOURLY) == {}


def test_the_newest_good_one_stays_though_its_tags_have_run_out() -> None:
    torn = [candidate(n, n, "hourly", torn=True) for n in range(1, 20)]
    found = at(19, HOURLY, candidate(0, 0, "hourly"), *torn)
    assert not found[0].remove
    assert "newest good" in found[0].reasons[-1]
    assert 1 in removed(found)


def test_distrusted_and_damaged_are_not_good() -> None:
    later = [
        candidate(1, 1, "x", trust=Trust.DISTRUSTED),
        candidate(2, 2, "x", damaged=True),
        candidate(3, 3, "x", torn=True),
    ]
    found = at(100, HOURLY, candidate(0, 0, "x"), *later)
    assert removed(found) == {1, 2}
    assert "the newest revision" in found[3].reasons[-1]


def test_order_is_by_seq_whatever_the_clock_said() -> None:
    """The clock was set back by a day: seq 3 has the earliest time and is the newest."""
    found = at(100, HOURLY, candidate(1, 50, "x"), candidate(2, 51, "x"), candidate(3, 27, "x"))
    assert removed(found) == {1, 2}


def test_a_time_in_the_future_is_now() -> None:
    future = [candidate(n, 1000 + n, "hourly") for n in range(6)]
    assert removed(at(0, HOURLY, *future)) == set()


candidates = st.lists(
    st.tuples(
        st.floats(0, 400),
        st.sets(st.sampled_from(["hourly", "daily", "manual:a", "other"])),
        st.booleans(),
        st.booleans(),
        st.sampled_from(Trust),
    ),
    max_size=30,
).map(
    lambda rows: [
        candidate(n, hours, *tags, torn=torn, damaged=damaged, trust=trust)
        for n, (hours, tags, torn, damaged, trust) in enumerate(rows)
    ]
)


@given(candidates, st.floats(0, 1000))
def test_what_always_holds(revisions: list[Candidate], hours: float) -> None:
    found = at(hours, BOTH, *revisions)
    gone = removed(found)
    assert len(found) == len(revisions)
    if revisions:
        assert revisions[-1].seq not in gone
    good = [c.seq for c in revisions if c.good]
    assert not good or good[-1] not in gone
    for c in revisions:
        decision = found[c.seq]
        assert set(decision.tags) | set(decision.expired) == set(c.tags)
        assert not (decision.remove and "manual:a" in c.tags)
        assert not (decision.remove and decision.tags)
        assert decision.reasons or not (decision.remove or decision.expired)
    for tag, rule in BOTH.items():
        having = [c for c in revisions if tag in c.tags]
        for c in having[-rule.keep :]:
            assert tag in found[c.seq].tags


@given(candidates, st.floats(0, 1000))
def test_deciding_again_removes_nothing_more(revisions: list[Candidate], hours: float) -> None:
    first = at(hours, BOTH, *revisions)
    left = [replace(c, tags=first[c.seq].tags) for c in revisions if not first[c.seq].remove]
    second = at(hours, BOTH, *left)
    assert removed(second) == set()
    assert all(not decision.expired for decision in second.values())


@given(candidates, st.lists(st.floats(0, 1000), min_size=1, max_size=4))
def test_it_agrees_with_an_oracle_written_another_way(
    revisions: list[Candidate], hours: list[float]
) -> None:
    """The sentence of the documentation, by counting; at several times, one after the other."""
    left = {c.seq: c for c in revisions}
    oracle = {
        c.seq: (c.time.timestamp(), {t for t in c.tags if t != "manual:a"}, c.good)
        for c in revisions
    }
    manual = {c.seq for c in revisions if "manual:a" in c.tags}
    for hour in sorted(hours):
        found = at(hour, BOTH, *left.values())
        left = {
            seq: replace(left[seq], tags=decision.tags)
            for seq, decision in found.items()
            if not decision.remove
        }
        if oracle:
            consult(oracle, BOTH, (START + timedelta(hours=hour)).timestamp(), keep=manual)
        assert {s: set(c.tags) - {"manual:a"} for s, c in left.items()} == {
            seq: tags for seq, (_, tags, _) in oracle.items()
        }


def test_every_decision_can_be_explained_in_words() -> None:
    hourly = [candidate(n, n / 2, "hourly", "manual:x") for n in range(8)]
    seqs = {c.revision: c.seq for c in hourly}
    made = decide(START + timedelta(hours=3.6), HOURLY, hourly, explain=True)
    words = {seqs[decision.revision]: decision.reasons for decision in made}
    assert words[0] == ("hourly: 7 newer ones, and older than 3 x 1h", "manual:x never expires")
    assert words[4][0] == "hourly: 3 newer ones, but not older than 3 x 1h"
    assert words[5][0] == "hourly: one of the newest 3"
    assert words[7][-1] == "kept as the newest good revision"
    late = decide(START + timedelta(days=9), HOURLY, hourly, explain=True)
    assert late[5].reasons[0] == "hourly: one of the newest 3, though older than 3 x 1h"
