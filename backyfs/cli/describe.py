"""Revisions as values for --json; the keys are documented in docs/cli.md and only ever grow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from backyfs.model import Extent
from backyfs.store.format import Damage
from backyfs.store.record import Record, State, timestamp


def revision(record: Record, state: State) -> dict[str, Any]:
    """What a revision is; without its damage, which costs a look at its files."""
    stats = record.stats
    return {
        "id": record.id,
        "seq": record.seq,
        "time": timestamp(record.time),
        "parent": record.parent or None,
        "tags": list(state.tags),
        "trust": str(state.trust),
        "verified_at": timestamp(state.verified_at) if state.verified_at else None,
        "why": state.why,
        "consistency": str(record.consistency),
        "reason": record.reason,
        "verification": record.verification,
        "size": record.size,
        "read": stats.read,
        "changed": stats.changed,
        "stored": stats.stored,
        "verified": stats.verified,
        "torn_frames": stats.torn_frames,
        "seconds": stats.seconds,
        "disks": [
            {"name": disk.name, "size": disk.size, "digest": disk.digest}
            for disk in record.disks.values()
        ],
    }


def damage(items: Iterable[Damage]) -> list[dict[str, Any]]:
    """Known damage: disk, range (None: all of the disk) and reason."""
    return [
        {
            "disk": item.disk,
            "offset": item.extent.offset if item.extent else None,
            "length": item.extent.length if item.extent else None,
            "reason": item.reason,
        }
        for item in items
    ]


def extents(items: Iterable[Extent]) -> list[dict[str, int]]:
    """Byte ranges of a disk."""
    return [{"offset": item.offset, "length": item.length} for item in items]
