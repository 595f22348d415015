"""The partitions of a revision's disks, as the record has them: which slices there are to show.

A revision with one disk has N.img, with several DISK-N.img (a name that always leads there, if
only the short one is listed).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from backyfs.model import Partition
from backyfs.reader.tree import inodes
from backyfs.store.record import DiskRecord, Record

SUFFIX = ".img"
_PER_DISK_MAX = inodes.DISK_LEAVES - inodes.SLICES


@dataclass(frozen=True, slots=True)
class Slice:
    """A partition of a disk, and its leaf."""

    leaf: int
    disk: DiskRecord
    partition: Partition

    @property
    def short(self) -> str:
        """Its name where there is one disk only."""
        return f"{self.partition.number}{SUFFIX}"

    @property
    def long(self) -> str:
        """Its name beside slices of other disks."""
        return f"{self.disk.name}-{self.short}"


def any_of(record: Record) -> bool:
    """Whether a revision has slices at all; cheaper than making them."""
    return any(disk.partitions for disk in record.disks.values()) and bool(of(record))


def of(record: Record) -> list[Slice]:
    """All slices of a revision, by disk and number."""
    return [
        piece
        for index, disk in enumerate(record.disks.values(), start=1)
        for piece in _of_disk(index * inodes.DISK_LEAVES + inodes.SLICES, disk)
    ]


def _of_disk(first: int, disk: DiskRecord) -> Iterator[Slice]:
    for index, partition in enumerate(disk.partitions[:_PER_DISK_MAX]):
        # The parser lets nothing else through; a record of another program's might.
        if 0 <= partition.start < partition.start + partition.length <= disk.size:
            yield Slice(first + index, disk, partition)
