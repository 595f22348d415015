"""The partition tables of a revision's disks, read from what was stored."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from backyfs.model import Partition
from backyfs.partition import parse
from backyfs.store.staging import Staging

log = logging.getLogger(__name__)


def tables(staging: Staging, disks: Iterable[str]) -> dict[str, tuple[Partition, ...]]:
    """By disk; a disk without a table, or with one that makes no sense, has no partitions.

    Tables are the guest's bytes: whatever is in them, the backup goes on.
    """
    return {name: _table(staging, name) for name in disks}


def _table(staging: Staging, name: str) -> tuple[Partition, ...]:
    values = {"revision": staging.revision, "disk": name}
    try:
        image = staging.image(name)
        table = parse(image.read, image.size)
    except Exception as exc:
        log.warning("partition table not read", {**values, "reason": str(exc)})
        return ()
    if table.reason:
        log.info("partition table makes no sense", {**values, "reason": table.reason})
    return table.partitions
