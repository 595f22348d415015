"""Retention: which tags of one VM's revisions have run out, and which revisions go with them.

Pure: no clock, no input or output; `now` is an argument. Order is by `seq`; time gives only age,
and a time in the future counts as now.

The rules, which are Backy's:
1. A tag of the schedule leaves a revision that is beyond the newest `keep` revisions with this
   tag *and* older than keep x interval. So a missed backup never shortens history.
2. A tag that is not in the schedule leaves at once, except "manual:...", which stays for ever.
3. A revision without tags goes.
And ours: the newest revision and the newest good one (not torn, not distrusted, not damaged)
always stay; without a schedule nothing goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from backyfs.config.interval import format_interval
from backyfs.config.schedule import MANUAL, Rule, Schedule
from backyfs.model import Consistency, Trust
from backyfs.store.record import Record, State


@dataclass(frozen=True, slots=True)
class Candidate:
    """A revision as retention sees it; `damaged` is computed by the repository."""

    record: Record
    state: State
    damaged: bool = False

    @property
    def good(self) -> bool:
        """Whether one could rely on this revision alone."""
        torn = self.record.consistency is Consistency.TORN
        return not (torn or self.damaged or self.state.trust is Trust.DISTRUSTED)


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a revision: tags that leave it, whether it goes, and why, in words."""

    revision: str
    remove: bool
    tags: tuple[str, ...]
    expired: tuple[str, ...] = ()
    reasons: tuple[str, ...] = field(default=())


def decide(now: datetime, schedule: Schedule, candidates: Iterable[Candidate]) -> list[Decision]:
    """A decision for each revision, oldest first. `tags` are what is left of a revision's tags."""
    ordered = sorted(candidates, key=lambda candidate: candidate.record.seq)
    if not schedule:
        return [
            Decision(c.record.id, False, c.state.tags, reasons=("no schedule: all stay",))
            for c in ordered
        ]
    protected = _protected(ordered)
    ranks = {tag: _ranks(tag, ordered) for tag in schedule}
    return [_decision(now, schedule, c, ranks, protected) for c in ordered]


def _protected(ordered: Sequence[Candidate]) -> dict[str, str]:
    why = {}
    if ordered:
        why[ordered[-1].record.id] = "the newest revision"
    for candidate in reversed(ordered):
        if candidate.good:
            why[candidate.record.id] = "the newest good revision"
            break
    return why


def _ranks(tag: str, ordered: Sequence[Candidate]) -> dict[str, int]:
    having = [c.record.id for c in reversed(ordered) if tag in c.state.tags]
    return {revision: rank for rank, revision in enumerate(having)}


def _decision(
    now: datetime,
    schedule: Schedule,
    candidate: Candidate,
    ranks: Mapping[str, Mapping[str, int]],
    protected: Mapping[str, str],
) -> Decision:
    revision = candidate.record.id
    age = max(now.astimezone(UTC) - candidate.record.time, timedelta(0))
    kept: list[str] = []
    expired: list[str] = []
    reasons: list[str] = []
    for tag in candidate.state.tags:
        why = _why_expired(tag, schedule.get(tag), ranks.get(tag, {}).get(revision, 0), age)
        (expired if why else kept).append(tag)
        if why:
            reasons.append(why)
    if not kept and revision in protected:
        reasons.append(f"kept as {protected[revision]}")
    elif not candidate.state.tags:
        reasons.append("it has no tags")
    remove = not kept and revision not in protected
    return Decision(revision, remove, tuple(kept), tuple(expired), tuple(reasons))


def _why_expired(tag: str, rule: Rule | None, rank: int, age: timedelta) -> str:
    if tag.startswith(MANUAL):
        return ""
    if rule is None:
        return f"{tag} is not in the schedule"
    if rank >= rule.keep and age > timedelta(seconds=rule.interval_s * rule.keep):
        span = f"{rule.keep} x {format_interval(rule.interval_s)}"
        return f"{tag}: {rank} newer ones, and older than {span}"
    return ""
