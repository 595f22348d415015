"""Trust: what an operator or a verification thinks of a revision; kept in its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from backyfs.model import Trust
from backyfs.store.record import Record, State
from backyfs.store.repository import Repository


def distrust(repository: Repository, records: Sequence[Record], why: str) -> list[State]:
    """Mark revisions as not to be relied on; returns their new states.

    The next backup on top of a distrusted revision reads the whole source. `verify` of a
    distrusted revision that finds all bytes as recorded makes it verified again.
    """

    def judged(state: State) -> State:
        return replace(state, trust=Trust.DISTRUSTED, verified_at=None, why=why)

    return [repository.update_state(record.id, judged) for record in records]


def verified(repository: Repository, record: Record, at: datetime) -> State:
    """Mark a revision as read and found sound at time `at`."""

    def judged(state: State) -> State:
        return replace(state, trust=Trust.VERIFIED, verified_at=at, why="")

    return repository.update_state(record.id, judged)
