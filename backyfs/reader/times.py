"""Times as people write them, for SPEC (spec.py) and for the directory `at` of the tree.

    2026-11-14 · 2026-11 · today · yesterday · last-saturday (or last-sat) · 3-days-ago ·
    2-weeks-ago · 3-months-ago · 1-year-ago · this-week, last-week, this-month, last-month,
    this-year, last-year                                a day, or a month, week or year of the
                                                        calendar: a period, meant as a whole
    DAY and a clock time: 2026-11-14T12 · …T12:00 · …T12:00:30 · yesterday-14:00
                                                        that hour, minute or second
    the same with Z or +01:00                           in that zone, else in the one given
    now · 30-seconds-ago · 5-minutes-ago · 2-hours-ago  a moment
    before-X                                            the moment before X begins

Hyphens between words may be blanks, capital letters do not matter. "The newest revision not after
X" goes by the end of X, so a bare day includes its last backup.

Zones: a day lasts from midnight to midnight of the zone, 23 or 25 hours where clocks change. An
hour, minute or second that clocks show twice means both; one that they skip is read as if they
had not yet been changed (02:30 is then what they show as 03:30).

A grammar of our own: the libraries for this (dateparser) fail on half of these, guess where an
error is wanted, take a bare day as its beginning, and cost as much time as the start of a command.

Pure: the clock and the zone are arguments.
"""

from __future__ import annotations

import re
from calendar import monthrange
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo

WORDS = ("now", "today", "yesterday", "last-week", "last-month")
"""Times that a listing may show beside days and hours."""

_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_TIME = re.compile(
    r"(?P<before>before-)?"
    r"(?:"
    r"(?P<now>now)"
    r"|(?P<span>this|last)-(?P<unit>week|month|year)"
    r"|(?P<month>\d{4}-\d\d)"
    r"|(?P<count>\d{1,6}|an?)-(?P<short>second|minute|hour)s?-ago"
    r"|(?P<day>\d{4}-\d\d-\d\d|today|yesterday"
    rf"|last-(?P<weekday>{'|'.join(f'{day}|{day[:3]}' for day in _WEEKDAYS)})"
    r"|(?P<past>\d{1,6}|an?)-(?P<long>day|week|month|year)s?-ago)"
    r"(?:[t-](?P<hour>\d\d)(?::(?P<minute>\d\d)(?::(?P<second>\d\d)(?:\.(?P<fraction>\d{1,6}))?)?)?"
    r"(?P<zone>z|[+-]\d\d:\d\d)?)?"
    r")",
    re.ASCII,
)
_MOMENT = timedelta(microseconds=1)  # the resolution of revisions' times
_DAY = timedelta(days=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Period:
    """What a text means: `start` belongs to it, `end` no more (both UTC; equal for before-X)."""

    start: datetime
    end: datetime


def period(text: str, *, now: datetime, zone: tzinfo | None = None) -> Period | None:
    """The period `text` names; None when it is no time at all.

    `now` has a zone of its own; `zone` is the one that days and clock times without one are in
    (None: the system's). ValueError for a time that the calendar does not have.
    """
    match = _TIME.fullmatch("-".join(text.lower().split()))
    if match is None:
        return None
    try:
        found = _Reader(match, now, zone).read()
    except OverflowError as exc:
        raise ValueError("it is out of range") from exc
    return Period(found.start, found.start) if match["before"] else found


def local(moment: datetime, zone: tzinfo | None = None) -> datetime:
    """A moment as the clocks of `zone` (None: the system's) show it, without a zone."""
    return moment.astimezone(zone).replace(tzinfo=None)


class _Reader:
    """One matched text being read, in the zone that it names or that is given."""

    def __init__(self, match: re.Match[str], now: datetime, zone: tzinfo | None) -> None:
        self._match, self._now = match, now
        self._zone = _offset(match["zone"]) if match["zone"] else zone
        self._today = local(now, self._zone).date()

    def read(self) -> Period:
        match = self._match
        if match["now"]:
            return self._moment(timedelta())
        if match["short"]:
            return self._moment(timedelta(**{f"{match['short']}s": _number(match["count"])}))
        if match["unit"]:
            first = _first_of(match["unit"], self._today)
            return self._days(*_span(match["unit"], first, last=match["span"] == "last"))
        if match["month"]:
            return self._days(*_span("month", date.fromisoformat(f"{match['month']}-01")))
        day = self._day()
        return self._clock(day) if match["hour"] else self._days(day, day + _DAY)

    def _moment(self, ago: timedelta) -> Period:
        moment = self._now.astimezone(UTC) - ago
        return Period(moment, moment + _MOMENT)

    def _day(self) -> date:
        match, today = self._match, self._today
        if match["weekday"]:
            number = next(n for n, day in enumerate(_WEEKDAYS) if day.startswith(match["weekday"]))
            return today - timedelta(days=(today.weekday() - number - 1) % 7 + 1)
        if match["long"]:
            return _past(today, match["long"], _number(match["past"]))
        if match["day"] in ("today", "yesterday"):
            return today - _DAY * (match["day"] == "yesterday")
        return date.fromisoformat(match["day"])

    def _days(self, first: date, behind: date) -> Period:
        """From the beginning of one day to the beginning of another."""
        return Period(self._shown(_midnight(first))[0], self._shown(_midnight(behind))[0])

    def _clock(self, day: date) -> Period:
        hour, minute, second, fraction = (
            self._match[part] for part in ("hour", "minute", "second", "fraction")
        )
        micros = int((fraction or "").ljust(6, "0"))
        shown = datetime.combine(day, time(int(hour), int(minute or 0), int(second or 0), micros))
        length = _MOMENT if fraction else timedelta(seconds=1 if second else 60 if minute else 3600)
        first, last = self._shown(shown)
        return Period(first, last + length)

    def _shown(self, shown: datetime) -> tuple[datetime, datetime]:
        """When the clocks show a time first and last: the same moment, unless it comes twice."""
        first, second = (self._utc(shown.replace(fold=fold)) for fold in (0, 1))
        return first, max(first, second)

    def _utc(self, shown: datetime) -> datetime:
        if self._zone:
            return shown.replace(tzinfo=self._zone).astimezone(UTC)
        # Not astimezone(): where clocks skip an hour, it reads 02:30 as 01:30.
        seconds = int(shown.replace(microsecond=0).timestamp())
        return _EPOCH + timedelta(seconds=seconds, microseconds=shown.microsecond)


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time())


def _offset(text: str) -> tzinfo:
    if text == "z":
        return UTC
    hours, minutes = int(text[1:3]), int(text[4:6])
    if hours > 23 or minutes > 59:
        raise ValueError(f"there is no zone {text}")
    size = timedelta(hours=hours, minutes=minutes)
    return timezone(-size if text[0] == "-" else size)


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 1


def _first_of(unit: str, day: date) -> date:
    """The first day of the week (a Monday), month or year that `day` is in."""
    if unit == "week":
        return day - timedelta(days=day.weekday())
    return day.replace(day=1) if unit == "month" else day.replace(month=1, day=1)


def _span(unit: str, first: date, *, last: bool = False) -> tuple[date, date]:
    """The first day of a week, month or year, and the first behind it; of the one before."""
    if last:
        first = _first_of(unit, first - _DAY)
    return first, _first_of(
        unit, first + timedelta(days={"week": 7, "month": 31, "year": 366}[unit])
    )


def _past(today: date, unit: str, count: int) -> date:
    """The day so many days, weeks, months or years ago; the 31st becomes the last of a month."""
    if unit in ("day", "week"):
        return today - count * timedelta(days=7 if unit == "week" else 1)
    months = today.year * 12 + today.month - 1 - count * (12 if unit == "year" else 1)
    year, month = months // 12, months % 12 + 1
    if year < 1:
        raise ValueError("it is out of range")
    return date(year, month, min(today.day, monthrange(year, month)[1]))
