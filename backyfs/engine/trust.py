"""Trust: what an operator or a verification thinks of a revision; kept in its state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime

from backyfs.model import Trust
from backyfs.store.record import Record, State
from backyfs.store.repository import Repository


def distrust(
    repository: Repository, records: Sequence[Record], why: str, *, lasting: bool = False
) -> list[State]:
    """Mark revisions as not to be relied on; returns their new states.

    The next backup on top of a distrusted revision reads the whole source. `verify` of a
    distrusted revision that finds all bytes as recorded makes it verified again, unless the
    distrust is `lasting`: then only `trust` does.
    """

    def judged(state: State) -> State:
        return replace(
            state,
            trust=Trust.DISTRUSTED,
            verified_at=None,
            why=why,
            lasting=lasting or state.lasting,
        )

    return _judge(repository, records, judged)


def trust(repository: Repository, records: Sequence[Record]) -> list[State]:
    """Take back a distrust, also a lasting one: an operator knows better. Returns the states."""

    def judged(state: State) -> State:
        if state.trust is not Trust.DISTRUSTED:
            return state
        return replace(state, trust=Trust.TRUSTED, why="", lasting=False)

    return _judge(repository, records, judged)


def _judge(
    repository: Repository, records: Sequence[Record], judged: Callable[[State], State]
) -> list[State]:
    return [repository.update_state(record.id, judged) for record in records]


def verified(repository: Repository, record: Record, at: datetime) -> State:
    """Mark a revision as read and found as recorded at time `at`; a lasting distrust stays."""

    def judged(state: State) -> State:
        if state.lasting:
            return replace(state, verified_at=at)
        return replace(state, trust=Trust.VERIFIED, verified_at=at, why="")

    return repository.update_state(record.id, judged)
