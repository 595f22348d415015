"""Expiry: retention's decisions, carried out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from backyfs.config.schedule import Schedule
from backyfs.engine.retention import Candidate, Decision, decide
from backyfs.errors import NoRevision
from backyfs.store.record import Record, State
from backyfs.store.removal import Removal
from backyfs.store.repository import Repository


@dataclass(frozen=True, slots=True)
class Expiry:
    """What expiry did, or (dry run) would do, by revision id.

    `in_use`: due, but somebody reads it; `kept`: was due and is not any more: a tag was set
    meanwhile, or newer revisions were removed.
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
    made = _made(repository, schedule, now, explain=dry_run)
    due = [decision.revision for decision in made if decision.remove]
    if dry_run:
        return Expiry(made, removed=due)
    removal, kept = Removal(), list[str]()
    if due:
        expired = {decision.revision: decision.expired for decision in made}
        still = _still(repository, schedule, now, due)
        removal = repository.remove(still, unless=_tags_besides(expired), wait_s=wait_s)
        there = {record.id for record in repository.revisions()}
        kept = [revision for revision in due if revision in there - set(removal.in_use)]
    for decision in made:
        if decision.expired and not decision.remove:
            with contextlib.suppress(NoRevision):  # gone meanwhile
                repository.update_state(decision.revision, _without(decision.expired))
    return Expiry(made, removal.removed, removal.in_use, kept)


def _made(
    repository: Repository, schedule: Schedule, now: datetime, *, explain: bool = False
) -> list[Decision]:
    """The decisions that may be carried out."""
    return [
        decision
        for decision in decisions(repository, schedule, now, explain=explain)
        if not repository.state_problem(decision.revision)
    ]


def _still(
    repository: Repository, schedule: Schedule, now: datetime, due: Collection[str]
) -> Iterator[str]:
    """Those that are due when the first is asked for: while the writer's lock was waited for, some
    may have gone, or become the newest good one.
    """
    for decision in _made(repository, schedule, now):
        if decision.remove and decision.revision in due:
            yield decision.revision


def _tags_besides(expired: Mapping[str, tuple[str, ...]]) -> Callable[[Record, State], bool]:
    """Whether a revision has tags that were not there when it was decided to go."""
    return lambda record, state: bool(set(state.tags) - set(expired[record.id]))


def _without(tags: tuple[str, ...]) -> Callable[[State], State]:
    return lambda state: replace(state, tags=tuple(t for t in state.tags if t not in tags))
