"""The directory `at`: names of times, each a link to the newest revision not after it.

It lists the days and hours that have a revision and a few words; any time that times.py knows is
found when it is looked up. "After" and the revisions' own times are as in a SPEC: a bare day counts
until its end, the newest is the one with the highest seq, one from the future counts as made now.

Pure: the clock and the zone are arguments.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import accumulate

from backyfs.reader import times
from backyfs.reader.catalog import Revision, Vm

_DAY, _HOUR = len("2026-11-14"), len("2026-11-14T12")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def find(vm: Vm, name: str, now: datetime, zone: tzinfo | None = None) -> Revision | None:
    """The newest revision not after a time; None without one, or when `name` is no time."""
    try:
        period = times.period(name, now=now, zone=zone)
    except ValueError:
        return None
    return None if period is None else _newest_before(vm, period.end, now)


def listing(vm: Vm, now: datetime, zone: tzinfo | None = None) -> list[tuple[str, Revision]]:
    """The names to list, each with what it leads to: words, days, hours."""
    words = ((word, find(vm, word, now, zone)) for word in times.WORDS)
    found = [(word, revision) for word, revision in words if revision is not None]
    stamped = sorted(_stamped(vm.revisions.values(), now), key=lambda pair: pair[0])
    shown = [times.local(moment, zone).isoformat() for moment, _ in stamped]
    newest = list(accumulate((revision for _, revision in stamped), _newer))
    for length in (_DAY, _HOUR):
        # Of those with the same name the last one overwrites: all before its end were seen.
        found += {text[:length]: to for text, to in zip(shown, newest, strict=True)}.items()
    return found


def _newest_before(vm: Vm, end: datetime, now: datetime) -> Revision | None:
    if now < end:
        return vm.latest
    micros = (end - _EPOCH) // timedelta(microseconds=1)
    for name in reversed(vm.revisions):
        if vm.revisions[name].time_ns < micros * 1000:
            return vm.revisions[name]
    return None


def _stamped(revisions: Iterable[Revision], now: datetime) -> list[tuple[datetime, Revision]]:
    return [(min(revision.record.time, now), revision) for revision in revisions]


def _newer(one: Revision, other: Revision) -> Revision:
    return max(one, other, key=lambda revision: (revision.record.seq, revision.record.id))
