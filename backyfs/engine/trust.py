"""Trust: what an operator or a verification thinks of a revision; kept in its state."""

from __future__ import annotations

from collections.abc import Sequence
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
    distrust is `lasting`: then only `trust` does. A damaged state is made anew, with the tags of
    the backup; such a distrust is lasting.
    """

    def judged(state: State) -> State:
        return replace(
            state,
            trust=Trust.DISTRUSTED,
            verified_at=None,
            why=why,
            lasting=lasting or state.lasting,
        )

    return [repository.update_state(record.id, judged, anew=True) for record in records]


def trust(repository: Repository, records: Sequence[Record]) -> list[State]:
    """Take back a distrust, also a lasting one: an operator knows better. Returns the states.

    Corrupt where the state is damaged: `distrust` comes first.
    """

    def judged(state: State) -> State:
        if state.trust is not Trust.DISTRUSTED:
            return state
        return replace(state, trust=Trust.TRUSTED, why="", lasting=False)

    return [repository.update_state(record.id, judged) for record in records]


def verified(repository: Repository, record: Record, at: datetime) -> State:
    """Mark a revision as read and found as recorded at time `at`; a lasting distrust stays.

    Corrupt where the state is damaged.
    """

    def judged(state: State) -> State:
        if state.lasting:
            return replace(state, verified_at=at)
        return replace(state, trust=Trust.VERIFIED, verified_at=at, why="")

    return repository.update_state(record.id, judged)
