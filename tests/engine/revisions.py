"""Records and states made by hand, for what needs no store."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from backyfs.engine.retention import Candidate
from backyfs.model import Consistency, Trust
from backyfs.store.record import Record, State, Stats


def clock(at: datetime) -> Callable[[], datetime]:
    """A clock that stands still."""
    return lambda: at


START = datetime(2026, 1, 1, tzinfo=UTC)


def record(seq: int, time: datetime, *, torn: bool = False) -> Record:
    return Record(
        seq=seq,
        id=f"{time:%Y%m%dT%H%M%SZ}-{seq % 10000:04d}",
        time=time,
        parent="",
        tool="",
        consistency=Consistency.TORN if torn else Consistency.CRASH,
        reason="",
        tags=(),
        trust=Trust.TRUSTED,
        verification="none",
        stats=Stats(),
        disks={},
    )


def candidate(
    seq: int,
    hours: float,
    *tags: str,
    torn: bool = False,
    damaged: bool = False,
    trust: Trust = Trust.TRUSTED,
) -> Candidate:
    """Revision `seq`, `hours` after START."""
    time = START + timedelta(hours=hours)
    return Candidate.of(record(seq, time, torn=torn), State(tags, trust), damaged=damaged)
