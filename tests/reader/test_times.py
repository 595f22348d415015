"""Times as people write them; the calendar of 2026: 21 November is a Saturday."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backyfs.reader import times

NOW = datetime(2026, 11, 21, 12, 30, 15, tzinfo=UTC)
BERLIN = ZoneInfo("Europe/Berlin")  # summer time from 29 March to 25 October
SANTIAGO = ZoneInfo("America/Santiago")  # its clocks change at midnight
HAVANA = ZoneInfo("America/Havana")  # shows midnight twice on 1 November


def read(text: str, zone: tzinfo = UTC, now: datetime = NOW) -> tuple[str, str] | None:
    """Start and end of what a text names, UTC; seconds and zone left out where they are zero."""
    found = times.period(text, now=now, zone=zone)
    if found is None:
        return None
    assert found.start <= found.end
    assert found.start.tzinfo is found.end.tzinfo is UTC
    return _short(found.start), _short(found.end)


def _short(moment: datetime) -> str:
    return moment.replace(tzinfo=None).isoformat().removesuffix("T00:00:00").removesuffix(":00")


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("2026-11-14", "2026-11-14", "2026-11-15"),
        ("2026-11", "2026-11-01", "2026-12-01"),
        ("2024-02", "2024-02-01", "2024-03-01"),
        ("2026-12", "2026-12-01", "2027-01-01"),
        ("2026-11-14T12", "2026-11-14T12:00", "2026-11-14T13:00"),
        ("2026-11-14T12:34", "2026-11-14T12:34", "2026-11-14T12:35"),
        ("2026-11-14 12:34", "2026-11-14T12:34", "2026-11-14T12:35"),
        ("2026-11-14T12:34:56", "2026-11-14T12:34:56", "2026-11-14T12:34:57"),
        ("2026-11-14T12:34:56.5", "2026-11-14T12:34:56.500000", "2026-11-14T12:34:56.500001"),
        ("2026-11-14T12Z", "2026-11-14T12:00", "2026-11-14T13:00"),
        ("2026-11-14T12:34+01:00", "2026-11-14T11:34", "2026-11-14T11:35"),
        ("2026-11-14T23:34:56-05:30", "2026-11-15T05:04:56", "2026-11-15T05:04:57"),
        ("2026-11-14t23:59z", "2026-11-14T23:59", "2026-11-15"),
        ("today", "2026-11-21", "2026-11-22"),
        ("Yesterday", "2026-11-20", "2026-11-21"),
        ("yesterday-14:00", "2026-11-20T14:00", "2026-11-20T14:01"),
        ("yesterday 14:00", "2026-11-20T14:00", "2026-11-20T14:01"),
        ("yesterdayT14", "2026-11-20T14:00", "2026-11-20T15:00"),
        ("last-saturday", "2026-11-14", "2026-11-15"),
        ("last-sat", "2026-11-14", "2026-11-15"),
        ("last-friday", "2026-11-20", "2026-11-21"),
        ("last-Sunday", "2026-11-15", "2026-11-16"),
        ("last-sunday-06:15", "2026-11-15T06:15", "2026-11-15T06:16"),
        ("before-last-saturday", "2026-11-14", "2026-11-14"),
        ("before  last saturday ", "2026-11-14", "2026-11-14"),
        ("before-2026-11-14T12:00", "2026-11-14T12:00", "2026-11-14T12:00"),
        ("before-now", "2026-11-21T12:30:15", "2026-11-21T12:30:15"),
        ("0-days-ago", "2026-11-21", "2026-11-22"),
        ("1-day-ago", "2026-11-20", "2026-11-21"),
        ("a day ago", "2026-11-20", "2026-11-21"),
        ("3-days-ago", "2026-11-18", "2026-11-19"),
        ("3-days-ago-07:00", "2026-11-18T07:00", "2026-11-18T07:01"),
        ("2-weeks-ago", "2026-11-07", "2026-11-08"),
        ("9-months-ago", "2026-02-21", "2026-02-22"),
        ("11-months-ago", "2025-12-21", "2025-12-22"),
        ("1-year-ago", "2025-11-21", "2025-11-22"),
        ("2-hours-ago", "2026-11-21T10:30:15", "2026-11-21T10:30:15.000001"),
        ("an hour ago", "2026-11-21T11:30:15", "2026-11-21T11:30:15.000001"),
        ("90-minutes-ago", "2026-11-21T11:00:15", "2026-11-21T11:00:15.000001"),
        ("15-seconds-ago", "2026-11-21T12:30", "2026-11-21T12:30:00.000001"),
        ("now", "2026-11-21T12:30:15", "2026-11-21T12:30:15.000001"),
        ("this-week", "2026-11-16", "2026-11-23"),
        ("last-week", "2026-11-09", "2026-11-16"),
        ("this-month", "2026-11-01", "2026-12-01"),
        ("last-month", "2026-10-01", "2026-11-01"),
        ("this-year", "2026-01-01", "2027-01-01"),
        ("last-year", "2025-01-01", "2026-01-01"),
    ],
)
def test_times(text: str, start: str, end: str) -> None:
    assert read(text) == (start, end)


@pytest.mark.parametrize(
    "text",
    [
        "", "last", "saturday", "last-caturday", "tomorrow", "2026", "2026-1-1", "14.11.2026",
        "2026-11-14T", "2026-11-14T1", "2026-11-14T12:", "2026-11-14T12:0", "2026-11-14+01:00",
        "days-ago", "3-days", "3-fortnights-ago", "-3-days-ago", "1234567-days-ago",
        "before-", "before-before-today", "now-12:00", "last-week-12:00", "last-month-ago",
        "２０２６-11-14", "2026-11-14\n12:00:", "daily", "20261114", "today/..", "latest",
    ],
)  # fmt: skip
def test_no_times(text: str) -> None:
    assert read(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "2026-02-30", "2026-13-01", "2026-00", "2026-11-14T24", "2026-11-14T12:60", "0000-01-01",
        "2026-11-14T12:00+24:00", "2026-11-14T12:00+01:60", "9999-12-31", "0001-01-01T00:00+23:00",
        "999999-days-ago", "3000-years-ago", "99999-months-ago", "0001-01",
    ],
)  # fmt: skip
def test_times_that_no_calendar_has(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        read(text, BERLIN)


def test_the_last_of_a_month_is_the_31st_of_all() -> None:
    now = datetime(2024, 3, 31, 12, tzinfo=UTC)
    assert read("1-month-ago", now=now) == ("2024-02-29", "2024-03-01")
    assert read("13-months-ago", now=now) == ("2023-02-28", "2023-03-01")


# ---- zones ---------------------------------------------------------------------------------------


def test_days_are_those_of_the_zone() -> None:
    late = datetime(2026, 11, 21, 23, 30, tzinfo=UTC)  # Sunday, 00:30 in Berlin
    assert read("today", BERLIN, late) == ("2026-11-21T23:00", "2026-11-22T23:00")
    assert read("last-saturday", BERLIN, late) == ("2026-11-20T23:00", "2026-11-21T23:00")
    assert read("yesterday-12:00Z", BERLIN, late) == ("2026-11-20T12:00", "2026-11-20T12:01")
    assert read("2026-11-14T12:00", BERLIN) == ("2026-11-14T11:00", "2026-11-14T11:01")


def test_where_clocks_skip_an_hour() -> None:
    assert read("2026-03-29", BERLIN) == ("2026-03-28T23:00", "2026-03-29T22:00")  # 23 hours
    assert read("2026-03-29T01:59", BERLIN) == ("2026-03-29T00:59", "2026-03-29T01:00")
    assert read("2026-03-29T02:30", BERLIN) == ("2026-03-29T01:30", "2026-03-29T01:31")  # = 03:30
    assert read("2026-03-29T02:59", BERLIN) == ("2026-03-29T01:59", "2026-03-29T02:00")
    assert read("2026-03-29T02", BERLIN) == ("2026-03-29T01:00", "2026-03-29T02:00")
    assert read("2026-03-29T03", BERLIN) == ("2026-03-29T01:00", "2026-03-29T02:00")


def test_where_clocks_show_an_hour_twice() -> None:
    assert read("2026-10-25", BERLIN) == ("2026-10-24T22:00", "2026-10-25T23:00")  # 25 hours
    assert read("2026-10-25T02:30", BERLIN) == ("2026-10-25T00:30", "2026-10-25T01:31")
    assert read("2026-10-25T02", BERLIN) == ("2026-10-25", "2026-10-25T02:00")
    assert read("2026-10-25T02:30+02:00", BERLIN) == ("2026-10-25T00:30", "2026-10-25T00:31")
    assert read("2026-10-25T03", BERLIN) == ("2026-10-25T02:00", "2026-10-25T03:00")


def test_where_there_is_no_midnight_or_two() -> None:
    assert read("2026-09-05", SANTIAGO) == ("2026-09-05T04:00", "2026-09-06T04:00")
    assert read("2026-09-06", SANTIAGO) == ("2026-09-06T04:00", "2026-09-07T03:00")
    assert read("2026-10-31", HAVANA) == ("2026-10-31T04:00", "2026-11-01T04:00")
    assert read("2026-11-01", HAVANA) == ("2026-11-01T04:00", "2026-11-02T05:00")


def test_moments_ago_are_not_of_the_clock() -> None:
    after = datetime(2026, 10, 25, 2, 0, tzinfo=UTC)  # 03:00, an hour after the second 02:00
    assert read("2-hours-ago", BERLIN, after) == ("2026-10-25", "2026-10-25T00:00:00.000001")


@pytest.fixture
def system_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("system_zone")
@pytest.mark.parametrize(
    "text",
    ["2026-03-29", "2026-03-29T02:30", "2026-10-25", "2026-10-25T02:30", "2026-10-25T02", "today"],
)
def test_the_systems_zone_is_as_good(text: str) -> None:
    assert os.environ["TZ"] == "Europe/Berlin"
    assert times.period(text, now=NOW) == times.period(text, now=NOW, zone=BERLIN)
    shown = times.local(NOW)
    assert shown == times.local(NOW, BERLIN)
    assert shown.isoformat() == "2026-11-21T13:30:15"


ZONES = st.sampled_from([UTC, BERLIN, SANTIAGO, HAVANA, ZoneInfo("Asia/Kathmandu")])
MOMENTS = st.timedeltas(timedelta(days=-9000), timedelta(days=4000)).map(lambda ago: NOW + ago)


@given(MOMENTS, ZONES)
def test_every_moment_lies_in_its_own_hour_and_day(moment: datetime, zone: tzinfo) -> None:
    shown = times.local(moment, zone).isoformat(timespec="microseconds")
    for length in (len("2026-11"), 10, 13, 16, 19, 26):
        found = times.period(shown[:length], now=NOW, zone=zone)
        assert found is not None
        assert found.start <= moment < found.end


@given(MOMENTS, ZONES)
def test_days_follow_each_other(moment: datetime, zone: tzinfo) -> None:
    today, yesterday = (times.period(w, now=moment, zone=zone) for w in ("today", "yesterday"))
    assert today is not None
    assert yesterday is not None
    assert yesterday.end == today.start <= moment < today.end
    assert timedelta(hours=22) < today.end - today.start < timedelta(hours=26)


@given(st.text("0129-:TZ.+ daysgolthurmbefw", max_size=24), MOMENTS, ZONES)
def test_no_text_is_a_surprise(text: str, moment: datetime, zone: tzinfo) -> None:
    try:
        found = times.period(text, now=moment, zone=zone)
    except ValueError:
        return
    assert found is None or found.start <= found.end


def test_listed_words_are_times() -> None:
    for word in times.WORDS:
        assert read(word)
