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
from datetime import datetime

from backyfs.config.interval import format_interval
from backyfs.config.schedule import MANUAL, Rule, Schedule
from backyfs.model import Consistency, Trust
from backyfs.store.record import Record, State


@dataclass(frozen=True, slots=True)
class Candidate:
    """A revision as retention sees it. `good`: one could rely on this revision alone."""

    revision: str
    seq: int
    time: datetime
    tags: tuple[str, ...]
    good: bool = True

    @classmethod
    def of(cls, record: Record, state: State, *, damaged: bool = False) -> Candidate:
        """The candidate for a revision; `damaged` is computed by the repository."""
        torn = record.consistency is Consistency.TORN
        good = not (torn or damaged or state.trust is Trust.DISTRUSTED)
        return cls(record.id, record.seq, record.time, state.tags, good)


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a revision: tags that leave it, whether it goes, and why, in words."""

    revision: str
    remove: bool
    tags: tuple[str, ...]
    expired: tuple[str, ...] = ()
    reasons: tuple[str, ...] = field(default=())


def decide(
    now: datetime, schedule: Schedule, candidates: Iterable[Candidate], *, explain: bool = False
) -> list[Decision]:
    """A decision for each revision, oldest first. `tags` are what is left of a revision's tags.

    `explain`: say of the tags that stay why they do, too.
    """
    ordered = sorted(candidates, key=lambda candidate: candidate.seq)
    if not schedule:
        return [
            Decision(c.revision, False, c.tags, reasons=("no schedule: all stay",)) for c in ordered
        ]
    protected = _protected(ordered)
    ranks = {tag: _ranks(tag, ordered) for tag in schedule}
    return [_decision(now, schedule, c, ranks, protected, explain) for c in ordered]


def _protected(ordered: Sequence[Candidate]) -> dict[str, str]:
    why = {}
    if ordered:
        why[ordered[-1].revision] = "the newest revision"
    for candidate in reversed(ordered):
        if candidate.good:
            why[candidate.revision] = "the newest good revision"
            break
    return why


def _ranks(tag: str, ordered: Sequence[Candidate]) -> dict[str, int]:
    having = [c.revision for c in reversed(ordered) if tag in c.tags]
    return {revision: rank for rank, revision in enumerate(having)}


def _decision(
    now: datetime,
    schedule: Schedule,
    candidate: Candidate,
    ranks: Mapping[str, Mapping[str, int]],
    protected: Mapping[str, str],
    explain: bool,
) -> Decision:
    revision = candidate.revision
    age_s = max((now - candidate.time).total_seconds(), 0.0)
    kept: list[str] = []
    expired: list[str] = []
    reasons: list[str] = []
    for tag in candidate.tags:
        rule, rank = schedule.get(tag), ranks.get(tag, {}).get(revision, 0)
        why = _why_expired(tag, rule, rank, age_s)
        (expired if why else kept).append(tag)
        if why:
            reasons.append(why)
        elif explain:
            reasons.append(_why_kept(tag, rule, rank, age_s))
    if not candidate.tags:
        reasons.append("it has no tags")
    if revision in protected and (explain or not kept):
        reasons.append(f"kept as {protected[revision]}")
    remove = not kept and revision not in protected
    return Decision(revision, remove, tuple(kept), tuple(expired), tuple(reasons))


def _why_expired(tag: str, rule: Rule | None, rank: int, age_s: float) -> str:
    if tag.startswith(MANUAL):
        return ""
    if rule is None:
        return f"{tag} is not in the schedule"
    if rank >= rule.keep and age_s > rule.interval_s * rule.keep:
        span = f"{rule.keep} x {format_interval(rule.interval_s)}"
        return f"{tag}: {rank} newer ones, and older than {span}"
    return ""


def _why_kept(tag: str, rule: Rule | None, rank: int, age_s: float) -> str:
    if rule is None or tag.startswith(MANUAL):
        return f"{tag} never expires"
    span = f"{rule.keep} x {format_interval(rule.interval_s)}"
    if rank < rule.keep:
        old = f", though older than {span}" if age_s > rule.interval_s * rule.keep else ""
        return f"{tag}: one of the newest {rule.keep}{old}"
    return f"{tag}: {rank} newer ones, but not older than {span}"
