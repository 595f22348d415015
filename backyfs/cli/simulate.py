"""backyfs simulate: what a schedule keeps over a year."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from backyfs.cli import options, output
from backyfs.cli.session import Session
from backyfs.config import BUILT_IN, Schedule, format_interval
from backyfs.errors import UsageError

if TYPE_CHECKING:
    from backyfs.engine.scheduling.year import Day

WIDTH = 60
_AGES = (1, 2, 3, 5, 7, 10, 14, 21, 30, 45, 60, 90, 120, 180, 270, 365)


@click.command()
@options.config
@click.argument("what", metavar="[SCHEDULE|JOB]", default="daily")
@click.option(
    "--days", type=click.IntRange(1, 3660), default=365, show_default=True, help="How long."
)
@click.option(
    "--miss",
    metavar="PERCENT",
    type=click.FloatRange(0, 99),
    default=0.0,
    help="How many of the runs do not take place (default: none).",
)
@options.as_json
@click.pass_obj
def command(session: Session, what: str, days: int, miss: float, as_json: bool) -> None:
    """Show what a schedule keeps: `daily`, `hourly`, one of the configuration, or a job's.

    A VM begins with nothing; the planning and the retention of the scheduler do the rest. The
    table shows the store from month to month, the picture what is there at the end, by age.
    """
    from backyfs.engine.scheduling.year import simulate

    schedule = _schedule(session, what)
    now = datetime.now(UTC)
    start = now.replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
    made = list(simulate(schedule, name=what, days=days, start=start, miss=miss / 100))
    if as_json:
        for day in made:
            output.json_line(_value(day))
        return
    output.line(f"{what}: " + ", ".join(_rule(tag, schedule) for tag in schedule))
    output.line("")
    output.line(_table(schedule, made))
    output.line("")
    output.line(_picture(made[-1]))


def _schedule(session: Session, what: str) -> Schedule:
    if what in BUILT_IN and not session.has_site():
        return BUILT_IN[what]
    site = session.site()
    if what in site.jobs:
        return site.jobs[what].schedule
    if what in site.schedules:
        return site.schedules[what]
    raise UsageError(
        f"no schedule or job {what!r} in {site.path}",
        hint=f"schedules: {', '.join(site.schedules)}",
    )


def _rule(tag: str, schedule: Schedule) -> str:
    rule = schedule[tag]
    return f"{tag} every {format_interval(rule.interval_s)}, keep {rule.keep}"


def _value(day: Day) -> dict[str, object]:
    kept = [{"age_days": round(age, 3), "tags": list(tags)} for age, tags in day.kept]
    return {"day": day.number, "made": day.made, "missed": day.missed, "kept": kept}


def _table(schedule: Schedule, made: Sequence[Day]) -> str:
    header = ("Day", "Made", "Missed", "Kept", *schedule, "Oldest")
    step = max(1, round(len(made) / 12))
    rows = []
    begin = 0
    for last in sorted({*range(step - 1, len(made), step), len(made) - 1}):
        month, day, begin = made[begin : last + 1], made[last], last + 1
        counts = [str(sum(tag in tags for _, tags in day.kept)) for tag in schedule]
        oldest = f"{day.kept[0][0]:.1f} d" if day.kept else "-"
        rows.append(
            [
                str(day.number),
                str(sum(d.made for d in month)),
                str(sum(d.missed for d in month)),
                str(len(day.kept)),
                *counts,
                oldest,
            ]
        )
    return output.table(header, rows, right=range(len(header)))


def _picture(day: Day) -> str:
    """A bar per range of ages: how many revisions are that old."""
    lines = [f"Day {day.number}: {len(day.kept)} revisions by age"]
    younger = 0.0
    for age in (*_AGES, float("inf")):
        found = [tags for old, tags in day.kept if younger <= old < age]
        if found or any(old >= age for old, _ in day.kept):
            name = f"{younger:g}-{age:g} d" if age != float("inf") else f"over {younger:g} d"
            lines.append(f"{name:>12} {'#' * min(len(found), WIDTH)} {_tags(found)}".rstrip())
        younger = age
    return "\n".join(lines)


def _tags(found: Sequence[Sequence[str]]) -> str:
    counts: dict[str, int] = {}
    for tags in found:
        for tag in tags:
            counts[tag] = counts.get(tag, 0) + 1
    return ", ".join(f"{count} {tag}" for tag, count in counts.items())
