"""The partition table of a disk, whichever kind it is."""

from __future__ import annotations

from typing import NamedTuple

from backyfs.model import Partition
from backyfs.partition import gpt, mbr
from backyfs.partition.disk import Damaged, Disk, Entry, Read
from backyfs.partition.filesystem import recognise

_OTHER_SECTOR = {512: 4096, 4096: 512}


class Table(NamedTuple):
    """`scheme` is "gpt", "mbr" or "" (none). `reason`: why a table yields nothing, else ""."""

    scheme: str = ""
    partitions: tuple[Partition, ...] = ()
    reason: str = ""


def parse(read: Read, size: int, sector: int = 512) -> Table:
    """The partitions of a disk of `size` bytes, by number.

    `read(offset, length)` is called only inside the disk; what it raises passes through.
    `sector`: bytes (512 or 4096) in which the table counts; the other one is tried too, because an
    image does not tell. As Linux does, a GPT is believed only when sector 0 says that the disk has
    one.
    """
    if size < max(sector, 512):
        return Table()
    slots = mbr.slots(read(0, 512))
    disk = Disk(read, size, sector)
    if any(slot.type == mbr.PROTECTIVE for slot in slots):
        return _gpt(disk)
    if not any(slot.used for slot in slots) or recognise(read, 0, 512):
        return Table()  # nothing, or the boot sector of a file system on the whole disk
    return _mbr(disk, slots)


def _mbr(disk: Disk, slots: list[mbr.Slot]) -> Table:
    """An MBR does not say what it counts in: the other size, if only there anything is known."""
    told = _mbr_counted(disk, slots)
    if not _holds_anything(told):
        other = _mbr_counted(disk._replace(sector=_OTHER_SECTOR[disk.sector]), slots)
        if _holds_anything(other):
            return other
    return told


def _mbr_counted(disk: Disk, slots: list[mbr.Slot]) -> Table:
    try:
        return Table("mbr", _partitions(disk, mbr.entries(disk, slots)))
    except Damaged as exc:
        return Table("mbr", reason=f"the partition table is not usable: {exc}")


def _holds_anything(table: Table) -> bool:
    return any(partition.filesystem for partition in table.partitions)


def _gpt(disk: Disk) -> Table:
    reason = ""
    for sector in (disk.sector, _OTHER_SECTOR[disk.sector]):
        counted = Disk(disk.read, disk.size, sector)
        try:
            return Table("gpt", _partitions(counted, gpt.entries(counted)))
        except Damaged as exc:
            reason = reason or str(exc)
    return Table("gpt", reason=f"the partition table is not usable: {reason}")


def _partitions(disk: Disk, entries: tuple[Entry, ...]) -> tuple[Partition, ...]:
    return tuple(
        Partition(
            number=entry.number,
            start=(start := entry.first * disk.sector),
            length=(length := (entry.last - entry.first + 1) * disk.sector),
            type=entry.type,
            name=entry.name,
            filesystem=recognise(disk.read, start, length),
        )
        for entry in entries
    )
