"""From a SPEC to revisions of a repository, with a word about those that cannot be read."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from backyfs.cli import output
from backyfs.errors import Corrupt, NoRevision, UsageError
from backyfs.reader.spec import select, select_one
from backyfs.store.record import Record, State

if TYPE_CHECKING:
    from backyfs.store.repository import Repository


def pick(repository: Repository, spec: str, *, as_json: bool = False) -> list[Record]:
    """The revisions SPEC names. UsageError, NoRevision; Corrupt if it is one without a record."""
    pairs = _pairs(repository, spec, as_json=as_json)
    return select(spec, pairs, now=datetime.now(UTC))


def pick_one(repository: Repository, spec: str, *, as_json: bool = False) -> Record:
    """As `pick`, for a SPEC that must name exactly one revision."""
    pairs = _pairs(repository, spec, as_json=as_json)
    return select_one(spec, pairs, now=datetime.now(UTC))


def disk_of(record: Record, disk: str | None) -> str:
    """The disk `disk` of a revision; None means its only one. UsageError, NoRevision."""
    names = ", ".join(record.disks)
    if disk is None and len(record.disks) > 1:
        raise UsageError(
            f"{record.id} has {len(record.disks)} disks: {names}", hint="choose one with --disk"
        )
    if disk is not None and disk not in record.disks:
        raise NoRevision(f"{record.id} has no disk {disk!r}", hint=f"it has: {names}")
    return disk or next(iter(record.disks))


def check_structure(repository: Repository, record: Record, disk: str) -> None:
    """Corrupt when files of a revision's disk are missing or broken; reads no data."""
    for item in repository.structure(record):
        if item.disk in ("", disk):
            raise Corrupt(item.reason, vm=repository.name, revision=record.id, disk=disk)


def _pairs(repository: Repository, spec: str, *, as_json: bool) -> list[tuple[Record, State]]:
    records, unreadable = repository.listing()
    if spec in unreadable:
        raise unreadable[spec]
    for error in unreadable.values():
        # `latest` must not silently mean an older one than the operator thinks.
        output.warn(f"left out: {error.message}", as_json=as_json)
    return [(record, repository.state(record)) for record in records]
