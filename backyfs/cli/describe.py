"""Revisions as values for --json; the keys are documented in docs/cli.md and only ever grow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from backyfs.errors import Corrupt
from backyfs.model import Extent
from backyfs.store.format import Damage
from backyfs.store.record import Record, State, timestamp
from backyfs.store.reports import Report, Reports


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
        "quiescing": record.quiescing.result,
        "freeze_seconds": record.quiescing.frozen_s,
        "verification": record.verification,
        "size": record.size,
        "read": stats.read,
        "changed": stats.changed,
        "stored": stats.stored,
        "verified": stats.verified,
        "torn_frames": stats.torn_frames,
        "believed": stats.believed,
        "sampled": stats.sampled,
        "sampled_frames": stats.sampled_frames,
        "sample_cut": stats.sample_cut,
        "wrong_frames": stats.wrong_frames,
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


def reports(found: Reports) -> list[dict[str, Any]]:
    """Reports of frames that differ from the source; of one that cannot be read only its place."""
    return [_report(found, revision) for revision in found.revisions()]


def _report(found: Reports, revision: str) -> dict[str, Any]:
    report: Report | None = None
    with contextlib.suppress(Corrupt):
        report = found.read(revision)
    return {
        "revision": revision,
        "path": str(found.path(revision)),
        "found": report.found if report else None,
        "sampled_frames": report.sampled_frames if report else None,
        "wrong_frames": report.wrong_frames if report else None,
        "doubted": list(report.doubted) if report else None,
    }


def extents(items: Iterable[Extent]) -> list[dict[str, int]]:
    """Byte ranges of a disk."""
    return [{"offset": item.offset, "length": item.length} for item in items]
