"""SPEC: every form of it, its errors, and all of it against a model made of lists."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backyfs.errors import NoRevision, UsageError
from backyfs.model import Consistency, Trust
from backyfs.reader.spec import select, select_one
from backyfs.store.record import Record, State, Stats

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
FIRST = datetime(2026, 11, 14, 6, 30, tzinfo=UTC)
Pair = tuple[Record, State]


def revision(
    number: int, time: datetime, tags: tuple[str, ...] = (), trust: Trust = Trust.TRUSTED
) -> Pair:
    record = Record(
        seq=number + 1,
        id=f"{time.astimezone(UTC):%Y%m%dT%H%M%SZ}-{number:04}",
        time=time,
        parent="",
        tool="test",
        consistency=Consistency.CRASH,
        reason="",
        tags=(),
        trust=Trust.TRUSTED,
        verification="none",
        stats=Stats(),
        disks={},
    )
    return record, State(tags, trust)


HISTORY = [
    revision(0, FIRST, ("daily", "weekly")),
    revision(1, FIRST + timedelta(days=1), ("daily",), Trust.VERIFIED),
    revision(2, FIRST + timedelta(days=1, hours=8), ("manual:before upgrade",)),
    revision(3, FIRST + timedelta(days=2), ("daily", "a..b"), Trust.DISTRUSTED),
    revision(4, FIRST + timedelta(days=4), ("daily", "e.g. this"), Trust.VERIFIED),
    revision(5, NOW + timedelta(days=30), ("hourly",)),  # made by a clock that ran ahead
]
IDS = [record.id for record, _ in HISTORY]


def numbers(spec: str, history: list[Pair] = HISTORY) -> list[int]:
    """What a SPEC selects, as positions in HISTORY; dates are UTC."""
    return [record.seq - 1 for record in select(spec, history, now=NOW, zone=UTC)]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("latest", [5]),
        ("last", [5]),
        ("first", [0]),
        ("0", [5]),
        ("1", [4]),
        ("5", [0]),
        ("all", [0, 1, 2, 3, 4, 5]),
        ("clean", [0, 1, 2, 3, 4, 5]),
        (IDS[2], [2]),
        (IDS[3][:12], [3]),
        (IDS[1][:11], [1]),
        ("20261114", [0]),
        ("tag:daily", [0, 1, 3, 4]),
        ("tag: daily ", [0, 1, 3, 4]),
        ("tag:manual:before upgrade", [2]),
        ("tag:'a..b'", [3]),
        ('"tag:a..b"', [3]),
        ("tag:e.g. this", [4]),
        ("daily", [4]),
        ("manual:before upgrade", [2]),
        ("trust:verified", [1, 4]),
        ("trust:distrusted", [3]),
        ("trust:trusted", [0, 2, 5]),
        ("not(tag:daily)", [2, 5]),
        ("not( all & tag:daily )", [2, 5]),
        ("reverse(tag:daily)", [4, 3, 1, 0]),
        ("first(tag:daily)", [0]),
        ("last(tag:daily)", [4]),
        ("first(reverse(all))", [5]),
        ("0,1,0,latest", [5, 4]),
        ("first , latest", [0, 5]),
        ("reverse(all) & tag:daily", [4, 3, 1, 0]),
        ("0,tag:daily & trust:verified", [5, 1, 4]),
        ("(0,tag:daily) & trust:verified", [1, 4]),
        ("0..2", [3, 4, 5]),
        ("2..0", [3, 4, 5]),
        ("..3", [0, 1, 2]),
        ("3..", [2, 3, 4, 5]),
        ("..", [0, 1, 2, 3, 4, 5]),
        (f"{IDS[1]}..{IDS[3]}", [1, 2, 3]),
        (f"{IDS[3]} .. {IDS[1][:11]}", [1, 2, 3]),
        ("tag:daily..1", [0, 1, 2, 3, 4]),
        ("tag:weekly..trust:verified", [0, 1, 2, 3, 4]),
        ("first..last(trust:verified)", [0, 1, 2, 3, 4]),
        ("tag:none,0", [5]),
        ("tag:none..0,first", [0]),
        ("not(tag:none)", [0, 1, 2, 3, 4, 5]),
        # dates
        ("2026-11-14", [0]),
        ("2026-11-15", [2]),
        ("2026-11-17", [3]),
        ("2026-11-15T06:30", [1]),
        ("2026-11-15T06:29", [0]),
        ("2026-11-15 06:30:00", [1]),
        ("2026-11-15T06:29:59", [0]),
        ("2026-11-15T07:30+01:00", [1]),
        ("2026-11-15T05:30Z", [0]),
        ("2026-11-20", [4]),
        ("2026-11-21", [5]),  # the one from the future counts as made now
        ("2099-01-01", [5]),
        # and as people say them (today is Saturday, 2026-11-21)
        ("now", [5]),
        ("today", [5]),
        ("yesterday", [4]),
        ("last-saturday", [0]),
        ("last saturday", [0]),
        ("before-2026-11-15", [0]),
        ("4-days-ago", [3]),
        ("72 hours ago", [4]),
        ("last-week", [2]),
        ("2026-11-15T06", [1]),
        ("2026-11", [5]),
        ("last-week & tag:weekly, yesterday", [4]),
        ("last-week..last-week", [0, 1, 2]),
        ("yesterday..", [5]),
        ("before-2026-11-15..4 days ago", [1, 2, 3]),
        ("last(5-days-ago..3-days-ago)", [4]),
        ("2026-11-15..2026-11-16", [1, 2, 3]),
        ("2026-11-16..2026-11-15", [1, 2, 3]),
        ("2026-11-15..", [1, 2, 3, 4, 5]),
        ("..2026-11-15", [0, 1, 2]),
        ("2026-11-15..2026-11-15", [1, 2]),
        ("2026-11-15T06:31..2026-11-16T06:30", [2, 3]),
        ("2026-11-16..1", [3, 4]),
        ("first..2026-11-15", [0, 1, 2]),
        ("2026-11-15.. & tag:daily", [1, 3, 4]),
    ],
)
def test_select(spec: str, expected: list[int]) -> None:
    assert numbers(spec) == expected


@pytest.mark.parametrize(
    "spec",
    [
        "6",
        "99999",
        "nope",
        "0,nope",
        "20261113",
        "20261114T063000z",
        IDS[0][:-1] + "x",
        "tag:none",
        "2026-11-13",
        "..2026-11-01",
        "..before-last-week",
        "before-last-saturday",
        "saturday",
        "trust:verified & 0",
        "not(all)",
    ],
)
def test_nothing_matches(spec: str) -> None:
    with pytest.raises(NoRevision):
        numbers(spec)


@pytest.mark.parametrize("spec", ["latest", "first", "all", "tag:x", "2026-11-14", ".."])
def test_an_empty_history(spec: str) -> None:
    with pytest.raises(NoRevision, match="no revision matches"):
        numbers(spec, [])


@pytest.mark.parametrize(
    ("spec", "place", "what"),
    [
        ("", 1, "expected a revision"),
        ("   ", 4, "expected a revision"),
        ("0,", 3, "expected a revision"),
        (",0", 1, "expected a revision"),
        ("0,,1", 3, "expected a revision"),
        ("0 & ", 5, "expected a revision"),
        ("(0", 1, "a ( without its )"),
        ("0)", 2, "a ) without its ("),
        ("0..1..2", 5, "a second .."),
        ("()", 2, "expected a revision"),
        ("0, newest(all)", 4, "no function 'newest'"),
        ("tag:", 1, "tag: without a name"),
        ("first, trust:maybe", 8, "no trust 'maybe'"),
        ("2026-13-01", 1, "no such date"),
        ("2026-11-14T25:00", 1, "no such date"),
        ("0001-01-01T00:00+23:00", 1, "no such date"),
        ("tag:'daily", 5, "a ' without its partner"),
        ("(" * 1000, 51, "more than 50 parentheses"),
        ("not(daily)", 5, "'daily' is a tag"),
        ("(daily)", 2, "'daily' is a tag"),
        ("daily,0", 1, "'daily' is a tag"),
        ("202611", 1, "'202611' fits 5 revisions"),
    ],
)
def test_usage_errors_name_the_place(spec: str, place: int, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        numbers(spec)
    assert f"character {place}: {what}" in caught.value.message
    assert caught.value.hint


def test_a_tag_that_looks_like_the_beginning_of_an_id_must_be_spelt_out() -> None:
    history = [*HISTORY, revision(6, NOW, ("20261114",))]
    with pytest.raises(UsageError, match="both a tag and the beginning"):
        numbers("20261114", history)
    assert numbers("last(tag:20261114)", history) == [6]
    assert numbers(IDS[0], [*HISTORY, revision(6, NOW, (IDS[0],))]) == [0]


def test_keywords_and_numbers_win_over_tags() -> None:
    history = [revision(0, FIRST, ("latest", "0")), revision(1, FIRST)]
    assert numbers("latest", history) == [1]
    assert numbers("0", history) == [1]
    assert numbers("tag:latest", history) == [0]
    assert numbers("'0'", history) == [0]


def test_a_tag_that_reads_like_a_time_must_be_spelt_out() -> None:
    history = [revision(0, FIRST, ("yesterday", "last sat")), revision(1, FIRST)]
    for word in ("yesterday", "last sat"):
        with pytest.raises(UsageError, match="both a time and a tag") as caught:
            numbers(word, history)
        assert caught.value.hint == (f"write ({word}) for the time, last(tag:{word}) for the tag")
        assert numbers(f"({word})", history) == [1]
        assert numbers(f"last(tag:{word})", history) == [0]


def test_order_is_by_seq_whatever_the_clock_said() -> None:
    history = [revision(0, FIRST), revision(1, FIRST - timedelta(days=1))]
    assert numbers("latest", history[::-1]) == [1]
    assert numbers("2026-11-14", history) == [1]
    assert numbers("2026-11-13", history) == [1]


def test_dates_are_in_the_given_zone() -> None:
    east = timezone(timedelta(hours=10))
    found = select("2026-11-14T16:29", HISTORY[:2], now=NOW, zone=UTC)
    assert [record.id for record in found] == [IDS[0]]
    with pytest.raises(NoRevision):
        select("2026-11-14T16:29", HISTORY[:2], now=NOW, zone=east)


def test_one() -> None:
    assert select_one("tag:weekly", HISTORY, now=NOW).id == IDS[0]
    with pytest.raises(UsageError, match="matches 4 revisions, where one is needed") as caught:
        select_one("tag:daily", HISTORY, now=NOW)
    assert caught.value.hint == "the newest of them is: last(tag:daily)"


# ---- against a model ---------------------------------------------------------------------------
# A generated SPEC is a pair: its text, and the positions in HISTORY it must select.

ALL = list(range(len(HISTORY)))
Case = tuple[str, list[int]]

ATOMS: list[Case] = [
    ("all", ALL),
    ("latest", ALL[-1:]),
    ("first", [0]),
    *((f"tag:{t}", [n for n in ALL if t in HISTORY[n][1].tags]) for t in ("daily", "hourly", "no")),
    *((f"trust:{t}", [n for n in ALL if HISTORY[n][1].trust == t]) for t in Trust),
    *((str(n), [ALL[-1 - n]]) for n in ALL),
    *((IDS[n], [n]) for n in ALL),
]


def united(cases: list[Case]) -> Case:
    positions = dict.fromkeys(n for _, found in cases for n in found)
    return "(" + " , ".join(text for text, _ in cases) + ")", list(positions)


def intersected(cases: list[Case]) -> Case:
    first, *others = (found for _, found in cases)
    kept = [n for n in first if all(n in other for other in others)]
    return "(" + "&".join(text for text, _ in cases) + ")", kept


def ranged(sides: tuple[Case, Case]) -> Case:
    (left, a), (right, b) = sides
    if not a or not b:
        return f"({left}..{right})", []
    low, high = min(a), max(b)
    if low > high:
        low, high = min(b), max(a)
    return f"({left} .. {right})", [n for n in ALL if low <= n <= high]


def called(function: str, case: Case) -> Case:
    text, found = case
    results = {
        "not": [n for n in ALL if n not in found],
        "reverse": found[::-1],
        "first": found[:1],
        "last": found[-1:],
    }
    return f"{function}({text})", results[function]


CASES = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map(united),
        st.lists(inner, min_size=1, max_size=3).map(intersected),
        st.tuples(inner, inner).map(ranged),
        st.builds(called, st.sampled_from(["not", "reverse", "first", "last"]), inner),
    ),
    max_leaves=12,
)


@given(CASES)
def test_any_spec_selects_what_the_model_says(case: Case) -> None:
    text, expected = case
    if expected:
        assert numbers(text) == expected
    else:
        with pytest.raises(NoRevision):
            numbers(text)


@given(st.text(st.sampled_from("0129-:TZ.,&() 'tagdilyrsno\"\x00é"), max_size=30))
def test_no_text_is_a_surprise(text: str) -> None:
    with contextlib.suppress(UsageError, NoRevision):
        assert numbers(text)
