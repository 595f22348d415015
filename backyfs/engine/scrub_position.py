"""How far the scrub of a repository is, and what reading stored data found: the file `scrub.json`.

Damaged frames are in quarantine. That a revision's own files are damaged (its map, its table) only
who opens them knows; it is noted here for those who do not, like `check`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from backyfs.errors import Corrupt
from backyfs.store import lock
from backyfs.store.format import Damage
from backyfs.store.fs import publish, read_file
from backyfs.store.layout import TEMPORARY_SUFFIX
from backyfs.store.record import parse_time, sealed, timestamp, unsealed
from backyfs.store.repository import Repository

STATE_NAME = "scrub.json"


@dataclass(frozen=True, slots=True)
class Position:
    """How far the present pass is: all before `offset` of `disk` in revision `seq` was read.

    `seq` -1: a pass begins. `finished`: when the last complete pass ended. `damaged`: the revisions
    whose files scrub or verify last found to be.
    """

    seq: int = -1
    disk: str = ""
    offset: int = 0
    started: datetime | None = None
    finished: datetime | None = None
    damaged: frozenset[str] = frozenset()


def position(repository: Repository) -> Position:
    """Where the present pass is; its beginning when nothing (readable) is known of it."""
    path = repository.path / STATE_NAME
    try:
        value = unsealed(read_file(path), str(path))
        return Position(
            seq=int(value["seq"]),
            disk=str(value["disk"]),
            offset=int(value["offset"]),
            started=_time(value["started"]),
            finished=_time(value["finished"]),
            damaged=frozenset(map(str, value.get("damaged", ()))),
        )
    except (OSError, Corrupt, KeyError, TypeError, ValueError):
        return Position()


def _time(text: Any) -> datetime | None:
    return parse_time(text) if text else None


def save(repository: Repository, at: Position) -> None:
    """Remember how far the pass is, durably; who verified meanwhile may have noted damage."""
    with lock.meta(repository.layout.meta_lock):
        _publish(repository, replace(at, damaged=position(repository).damaged))


def note_damage(repository: Repository, found: Mapping[str, Sequence[Damage]]) -> None:
    """Remember what was found of these revisions; of others nothing new is known."""
    with lock.meta(repository.layout.meta_lock):
        at = position(repository)
        if (damaged := at.damaged - found.keys() | of_files(found)) != at.damaged:
            _publish(repository, replace(at, damaged=damaged))


def of_files(found: Mapping[str, Sequence[Damage]]) -> frozenset[str]:
    """Revisions of which whole files are damaged: no backup heals that, no quarantine has it."""
    return frozenset(
        revision
        for revision, items in found.items()
        if any(item.disk and item.extent is None for item in items)
    )


def _publish(repository: Repository, at: Position) -> None:
    value = {
        "seq": at.seq,
        "disk": at.disk,
        "offset": at.offset,
        "started": timestamp(at.started) if at.started else None,
        "finished": timestamp(at.finished) if at.finished else None,
        "damaged": sorted(at.damaged),
    }
    path = repository.path / STATE_NAME
    for stray in path.parent.glob(f"{STATE_NAME}.*{TEMPORARY_SUFFIX}"):
        repository.fs.unlink(stray)  # of a scrub that was killed: nobody else is in here
    publish(path, sealed(value), repository.fs)
