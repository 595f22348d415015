"""What a schedule keeps, worked out for days to come with the scheduler's own planning. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from backyfs.config.schedule import Schedule
from backyfs.engine.retention import Candidate, decide
from backyfs.engine.scheduling import planning

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Day:
    """The end of a day: backups made and missed since the day before, and what is kept.

    `kept`: age in days and tags of each revision, oldest first.
    """

    number: int
    made: int
    missed: int
    kept: tuple[tuple[float, tuple[str, ...]], ...]


def simulate(
    schedule: Schedule, *, name: str, days: int, start: float, miss: float = 0.0, seed: int = 0
) -> Iterator[Day]:
    """The days of a VM `name` that begins with nothing at the wall time `start`.

    `miss`: how likely a run does not take place, 0 to 1; it is then made up for at the next slot.
    """
    rng = random.Random(seed)
    offset = planning.offset_s(name, schedule)
    newest: dict[str, float] = {}
    kept: list[Candidate] = []
    now, number, made, missed = start, 0, 0, 0
    for day in range(1, days + 1):
        end = start + day * DAY_S
        while (plan := planning.plan(schedule, offset, newest, now, start)).at < end:
            now = plan.at
            if rng.random() < miss:
                missed += 1
                now = planning.slot_before(now, planning.shortest(schedule), offset)
                now += planning.shortest(schedule)
                continue
            number, made = number + 1, made + 1
            newest |= dict.fromkeys(plan.tags, now)
            kept.append(Candidate(str(number), number, _time(now), plan.tags))
            kept = _expired(schedule, kept, now)
        now = max(now, end)
        kept = _expired(schedule, kept, now)
        ages = tuple(((end - c.time.timestamp()) / DAY_S, c.tags) for c in kept)
        yield Day(day, made, missed, ages)
        made = missed = 0


def _expired(schedule: Schedule, kept: list[Candidate], now: float) -> list[Candidate]:
    made = {decision.revision: decision for decision in decide(_time(now), schedule, kept)}
    return [
        replace(candidate, tags=made[candidate.revision].tags)
        for candidate in kept
        if not made[candidate.revision].remove
    ]


def _time(wall: float) -> datetime:
    return datetime.fromtimestamp(wall, UTC)
