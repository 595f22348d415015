"""Extended attributes: what is known of a revision, where `getfattr -d` finds it.

All begin with user.backyfs. and hold text. What is not known (no parent, never checked) is left
out.
"""

from __future__ import annotations

from backyfs.model import Partition
from backyfs.reader.catalog import Revision, Vm
from backyfs.store.record import DiskRecord, timestamp

PREFIX = "user.backyfs."

Attributes = dict[str, str]
"""By name, without the prefix."""


def of_revision(vm: Vm, revision: Revision, *, wait: bool) -> Attributes:
    """Of a revision as a whole. BlockingIOError, see the package."""
    record, state = revision.record, revision.state
    checked = state.verified_at or (record.time if record.verification == "full" else None)
    found = {
        "vm": vm.name,
        "revision": record.id,
        "time": timestamp(record.time),
        "tags": ",".join(state.tags),
        "trust": str(state.trust),
        "consistency": str(record.consistency),
        "checked": timestamp(checked) if checked else "",
        "parent": record.parent,
        "health": "damaged" if vm.damage(record, wait=wait) else "ok",
    }
    return {name: value for name, value in found.items() if value}


def of_disk(disk: DiskRecord) -> Attributes:
    """What an image has beside."""
    return {"disk": disk.name, "digest": disk.digest}


def of_slice(disk: DiskRecord, partition: Partition) -> Attributes:
    """What a slice has beside; the digest of its disk would not be its own."""
    found = {
        "disk": disk.name,
        "partition": str(partition.number),
        "offset": str(partition.start),
        "type": partition.type,
        "name": partition.name,
        "filesystem": partition.filesystem,
    }
    return {name: value for name, value in found.items() if value}
