"""Stores with many revisions and no data, to measure what listing them costs.

The records are the store's own, sealed and complete; only the files they name are missing, which
nothing that lists a tree ever opens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from backyfs.model import Consistency, Partition, Trust
from backyfs.store.record import DiskRecord, Record, Stats
from backyfs.store.repository import Repository

NEWEST = datetime(2026, 11, 21, 2, 30, tzinfo=UTC)
_GIB = 1 << 30
_SIZE = 40 * _GIB
_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_EFI, _LINUX = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "0fc63daf-8483-4772-8e79-3d69d8477de4"
_PARTITIONS = (
    Partition(1, 1 << 20, _GIB // 2, _EFI, "EFI", "vfat"),
    Partition(2, _GIB, 38 * _GIB, _LINUX, "root", "ext4"),
)


def make(base: Path, vms: int, revisions: int, *, seed: int = 0) -> None:
    """VMs vm0000, vm0001 … in `base`, each with one backup a day; the newest is of NEWEST."""
    for number in range(vms):
        repository = Repository.create(base / f"vm{number:04}", "packs")
        for record in history(random.Random(seed + number), revisions):
            repository.layout.record(record.id).write_bytes(record.encode())


def history(rng: random.Random, count: int) -> Iterator[Record]:
    """The records of one VM, oldest first."""
    parent = ""
    for seq in range(1, count + 1):
        time = NEWEST - timedelta(days=count - seq, minutes=-rng.randrange(30))
        suffix = "".join(rng.choices(_ALPHABET, k=4))
        record = _record(rng, seq, f"{time:%Y%m%dT%H%M%SZ}-{suffix}", time, parent)
        parent = record.id
        yield record


def _record(rng: random.Random, seq: int, revision: str, time: datetime, parent: str) -> Record:
    tags = ("daily", "weekly") if seq % 7 == 0 else ("daily",)
    changed = rng.randrange(_GIB)
    return Record(
        seq=seq,
        id=revision,
        time=time,
        parent=parent,
        tool="bench",
        consistency=Consistency.FILESYSTEM,
        reason="",
        tags=tags,
        trust=Trust.TRUSTED,
        verification="full",
        stats=Stats(read=changed, changed=changed, stored=changed // 2, seconds=12.5),
        disks={"disk": _disk(rng, revision)},
    )


def _disk(rng: random.Random, revision: str) -> DiskRecord:
    return DiskRecord(
        name="disk",
        size=_SIZE,
        digest=rng.randbytes(32).hex(),
        files={f"{revision}-0.map": rng.randbytes(32).hex()},
        source={"type": "ceph-rbd", "bookmark": {"snapshot": f"backyfs-{revision}"}},
        partitions=_PARTITIONS,
        data=rng.randrange(_SIZE),
    )
