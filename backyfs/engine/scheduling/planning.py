"""When a job runs next, and with which tags. Pure; times are seconds since 1970 (UTC).

Each tag has slots: one per interval, at an offset that follows from the job's name. So jobs spread
evenly over their interval, and a job keeps its slots whatever happens to it or to other jobs. Tags
whose slots fall together share one revision; when one interval divides another, they always do.

A tag is due when its newest revision is from before its newest slot. A revision made up to a
quarter of an interval early serves the slot; so a late backup is not followed by the next one at
once, and two revisions are never further apart than 1.25 intervals when every run succeeds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

from backyfs.config.schedule import Schedule

EARLY = 0.25
"""How early a revision may be to serve a slot, as a part of the interval."""

CATCH_UP_S = 900
"""Jobs that missed a slot while no scheduler ran start spread over up to this long ..."""

CATCH_UP = 0.1
"""... but no longer than this part of their shortest interval."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The next run: when (now or in the future), and its tags in the order of the schedule."""

    at: float
    tags: tuple[str, ...]


def shortest(schedule: Schedule) -> int:
    """The shortest interval of a schedule, in seconds."""
    return min(rule.interval_s for rule in schedule.values())


def fraction(job: str, purpose: str = "") -> float:
    """A number in [0, 1) that follows from the job's name, evenly spread over names."""
    digest = hashlib.blake2b(f"{purpose}\0{job}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def offset_s(job: str, schedule: Schedule) -> int:
    """Where in time the job's slots lie: whole seconds, below its longest interval."""
    return int(fraction(job) * max(rule.interval_s for rule in schedule.values()))


def slot_before(now: float, interval_s: int, offset: int) -> float:
    """The newest slot that is not after `now`."""
    return offset + math.floor((now - offset) / interval_s) * interval_s


def due_tags(
    schedule: Schedule, offset: int, newest: Mapping[str, float], now: float, since: float
) -> tuple[str, ...]:
    """The tags a slot of which has passed since their newest revision.

    A tag that no revision has yet is due as soon as any other one is, or at its own first slot
    after `since`: a schedule that gets a new tag does not start all its jobs.
    """

    def late(tag: str, interval_s: int) -> bool:
        slot = slot_before(now, interval_s, offset)
        return newest[tag] < slot - EARLY * interval_s if tag in newest else since < slot

    if not any(late(tag, rule.interval_s) for tag, rule in schedule.items()):
        return ()
    return tuple(
        tag for tag, rule in schedule.items() if tag not in newest or late(tag, rule.interval_s)
    )


def plan(
    schedule: Schedule,
    offset: int,
    newest: Mapping[str, float],
    now: float,
    first_seen: float,
    since: float | None = None,
) -> Plan:
    """The next run of a job, of which `newest` has the time of the newest revision per tag.

    Without any revision: all tags, at the first slot of the shortest interval after `first_seen`.
    `since`: when the schedule became what it is, which is now if it is not given.
    """
    known = {tag: newest[tag] for tag in schedule if tag in newest}
    if not known:
        slot = _next_slot(min(first_seen, now), shortest(schedule), offset)
        return Plan(max(slot, now), tuple(schedule))
    since = now if since is None else since
    due = due_tags(schedule, offset, known, now, since)
    if due:
        return Plan(now, due)
    at = min(
        _next_due(rule.interval_s, offset, known.get(tag), now) for tag, rule in schedule.items()
    )
    return Plan(at, due_tags(schedule, offset, known, at, since))


def _next_slot(now: float, interval_s: int, offset: int) -> float:
    return slot_before(now, interval_s, offset) + interval_s


def _next_due(interval_s: int, offset: int, newest: float | None, now: float) -> float:
    """The first slot after `now` that the newest revision does not serve already."""
    slot = _next_slot(now, interval_s, offset)
    if newest is not None and newest >= slot - EARLY * interval_s:
        slot += interval_s
    return slot


def catch_up_s(job: str, schedule: Schedule) -> float:
    """How long after its start a scheduler waits with a job that is due already."""
    return fraction(job, "catch-up") * min(CATCH_UP_S, CATCH_UP * shortest(schedule))


def deadline(schedule: Schedule, since: float) -> float:
    """When a job breaks its SLA: 1.5 times the shortest interval after `since`.

    `since` is the time of the newest good revision, or when the job was first seen.
    """
    return since + 1.5 * shortest(schedule)


def overdue_s(schedule: Schedule, since: float, now: float) -> float:
    """For how long a job has been breaking its SLA; 0 = it keeps it."""
    return max(0.0, now - deadline(schedule, since)) if math.isfinite(since) else 0.0
