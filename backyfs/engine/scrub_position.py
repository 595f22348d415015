"""How far the scrub of a repository is: the file `scrub.json` in it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from backyfs.errors import Corrupt
from backyfs.store import lock
from backyfs.store.fs import publish, read_file
from backyfs.store.layout import TEMPORARY_SUFFIX
from backyfs.store.record import parse_time, sealed, timestamp, unsealed
from backyfs.store.repository import Repository

STATE_NAME = "scrub.json"


@dataclass(frozen=True, slots=True)
class Position:
    """How far the present pass is: all before `offset` of `disk` in revision `seq` was read.

    `seq` -1: a pass begins. `finished`: when the last complete pass ended.
    """

    seq: int = -1
    disk: str = ""
    offset: int = 0
    started: datetime | None = None
    finished: datetime | None = None


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
        )
    except (OSError, Corrupt, KeyError, TypeError, ValueError):
        return Position()


def _time(text: Any) -> datetime | None:
    return parse_time(text) if text else None


def save(repository: Repository, at: Position) -> None:
    """Remember `at`, durably."""
    value = {
        "seq": at.seq,
        "disk": at.disk,
        "offset": at.offset,
        "started": timestamp(at.started) if at.started else None,
        "finished": timestamp(at.finished) if at.finished else None,
    }
    path = repository.path / STATE_NAME
    with lock.meta(repository.layout.meta_lock):
        for stray in path.parent.glob(f"{STATE_NAME}.*{TEMPORARY_SUFFIX}"):
            repository.fs.unlink(stray)  # of a scrub that was killed: nobody else is in here
        publish(path, sealed(value), repository.fs)
