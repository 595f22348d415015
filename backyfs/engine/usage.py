"""What VMs store and move, over a span of time: the numbers of a bill.

From each VM's meter, which goes on when revisions are removed. For the time before its first
reading (a store of an older version) the revisions that are still there stand in: each adds what
it stored, at its time, and what was removed by then is not known. `estimated` tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from typing import NamedTuple

from backyfs.store.meter import Reading
from backyfs.store.record import Record
from backyfs.store.repository import Repository

GB = 10**9


@dataclass(frozen=True, slots=True)
class Usage:
    """What one VM, or (`vm` "") all VMs of a tenant, used from `since` to `until`. Bytes.

    `logical`: size of the disks of the newest revision · `stored`: on disk, what revisions share
    counted once; removing the VM would free it · `exclusive`: of that, what one revision alone
    needs, all revisions together (None: not looked into) · `read`, `written`: moved from the source
    and into the store within the span, by `backups` many · `byte_seconds`: stored, summed over
    time. Logical and stored are as of `until`, exclusive is as of now.
    """

    vm: str
    tenant: str
    logical: int = 0
    stored: int = 0
    exclusive: int | None = None
    read: int = 0
    written: int = 0
    byte_seconds: float = 0.0
    backups: int = 0
    estimated: bool = False

    @property
    def gb_hours(self) -> float:
        """Stored gigabytes (10^9 bytes) times hours."""
        return self.byte_seconds / GB / 3600


class _Level(NamedTuple):
    """What is held from a time on; bytes."""

    time: datetime
    stored: int
    logical: int


def usage_of(
    repository: Repository,
    since: datetime,
    until: datetime,
    *,
    tenant: str = "",
    exclusive: bool = False,
) -> Usage:
    """What one VM used in [since, until). Corrupt, OSError.

    `exclusive` opens every map of the VM, and takes two bytes of memory per stored frame.
    """
    readings = repository.meter.readings(since, until)
    records = _before(repository.revisions(), readings, since, until)
    levels = [*_levels(records), *(_Level(r.time, r.stored, r.logical) for r in readings)]
    held = levels[-1] if levels else _Level(since, 0, 0)
    moved = [record for record in records if record.time >= since]
    noted = [reading for reading in readings if reading.time >= since]
    return Usage(
        repository.name,
        tenant,
        logical=held.logical,
        stored=held.stored,
        exclusive=sum(repository.exclusive().values()) if exclusive else None,
        read=sum(r.read for r in noted) + sum(record.stats.read for record in moved),
        written=sum(r.written for r in noted) + sum(record.stats.stored for record in moved),
        byte_seconds=_integral(levels, since, until),
        backups=len(moved) + sum(r.event == "backup" for r in noted),
        estimated=bool(records),
    )


def _before(
    records: Sequence[Record], readings: Sequence[Reading], since: datetime, until: datetime
) -> list[Record]:
    """Revisions from before the meter was read first, where the span needs them."""
    if readings and readings[0].time < since:
        return []
    noted = {reading.revision for reading in readings}
    end = readings[0].time if readings else until
    return [record for record in records if record.time < end and record.id not in noted]


def _levels(records: Iterable[Record]) -> Iterable[_Level]:
    stored = 0
    for record in sorted(records, key=lambda record: record.time):
        stored += record.stats.stored
        yield _Level(record.time, stored, record.size)


def _integral(levels: Sequence[_Level], since: datetime, until: datetime) -> float:
    """Byte seconds in [since, until)."""
    total = 0.0
    for one, other in pairwise([*levels, _Level(until, 0, 0)]):
        span = min(other.time, until) - max(one.time, since)
        total += one.stored * max(0.0, span.total_seconds())
    return total


def by_tenant(usages: Iterable[Usage]) -> list[Usage]:
    """The sums of each tenant's VMs, by tenant's name."""
    found: dict[str, Usage] = {}
    for usage in usages:
        found[usage.tenant] = _sum(found.get(usage.tenant, Usage("", usage.tenant)), usage)
    return [found[tenant] for tenant in sorted(found)]


def _sum(total: Usage, more: Usage) -> Usage:
    exclusive = None
    if more.exclusive is not None:
        exclusive = (total.exclusive or 0) + more.exclusive
    return replace(
        total,
        logical=total.logical + more.logical,
        stored=total.stored + more.stored,
        exclusive=exclusive,
        read=total.read + more.read,
        written=total.written + more.written,
        byte_seconds=total.byte_seconds + more.byte_seconds,
        backups=total.backups + more.backups,
        estimated=total.estimated or more.estimated,
    )
