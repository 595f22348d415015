"""Expiry: retention's decisions, carried out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime

from backyfs.config.schedule import Schedule
from backyfs.engine.retention import Candidate, Decision, decide
from backyfs.store.record import Record, State
from backyfs.store.repository import Repository


@dataclass(frozen=True, slots=True)
class Expiry:
    """What expiry did, or (dry run) would do, by revision id.

    `in_use`: due, but somebody reads it; `kept`: due, but a tag was set meanwhile.
    """

    decisions: list[Decision]
    removed: list[str] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def decisions(
    repository: Repository, schedule: Schedule, now: datetime, *, explain: bool = False
) -> list[Decision]:
    """What retention says of every readable revision, oldest first."""
    damaged = repository.damage()
    return decide(
        now,
        schedule,
        (
            Candidate.of(r, repository.state(r), damaged=r.id in damaged)
            for r in repository.revisions()
        ),
        explain=explain,
    )


def expire(
    repository: Repository,
    schedule: Schedule,
    now: datetime,
    *,
    dry_run: bool = False,
    wait_s: float = 0.0,
) -> Expiry:
    """Take expired tags away and remove revisions that have none left. Busy, Corrupt, OSError.

    Space is freed by `purge`. Revisions with open readers stay and are due again the next time;
    so do those whose state cannot be read, since a tag in it may protect them.
    """
    made = [
        decision
        for decision in decisions(repository, schedule, now, explain=dry_run)
        if not repository.state_problem(decision.revision)
    ]
    due = [decision.revision for decision in made if decision.remove]
    if dry_run:
        return Expiry(made, removed=due)
    removal = repository.remove(due, unless=_tags_besides(made), wait_s=wait_s) if due else None
    for decision in made:
        if decision.expired and not decision.remove:
            repository.update_state(decision.revision, _without(decision.expired))
    if removal is None:
        return Expiry(made)
    return Expiry(made, removal.removed, removal.in_use, removal.kept)


def _tags_besides(made: list[Decision]) -> Callable[[Record, State], bool]:
    """Whether a revision has tags that were not there when it was decided to go."""
    expired = {decision.revision: set(decision.expired) for decision in made}
    return lambda record, state: bool(set(state.tags) - expired[record.id])


def _without(tags: tuple[str, ...]) -> Callable[[State], State]:
    return lambda state: replace(state, tags=tuple(t for t in state.tags if t not in tags))
