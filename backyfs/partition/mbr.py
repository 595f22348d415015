"""MBR: four entries in sector 0; one may be an extended partition, a chain of logical ones.

Logical partitions are numbered from 5, as Linux does. The extended partition itself is no slice
that anybody wants: it is left out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from backyfs.partition.disk import PARTITIONS_MAX, Damaged, Disk, Entry, checked

PROTECTIVE = 0xEE
_EXTENDED = (0x05, 0x0F, 0x85)
_ENTRY = struct.Struct("<B3xB3xII")
_TABLE = 446
_SIGNATURE = b"\x55\xaa"
_FIRST_LOGICAL = 5


@dataclass(frozen=True, slots=True)
class Slot:
    """One of the four entries in a sector; `start` and `count` in sectors."""

    status: int
    type: int
    start: int
    count: int

    @property
    def used(self) -> bool:
        """Whether it describes anything."""
        return self.type != 0 and self.count != 0


def slots(sector: bytes) -> list[Slot]:
    """The four entries of sector 0, if it holds a table; else none.

    A boot sector of a file system has the same signature; there, other bytes stand where the
    entries would have 0 or 0x80.
    """
    if sector[510:512] != _SIGNATURE:
        return []
    found = _slots(sector)
    return found if all(slot.status in (0, 0x80) for slot in found) else []


def _slots(sector: bytes) -> list[Slot]:
    return [Slot(*_ENTRY.unpack_from(sector, _TABLE + 16 * n)) for n in range(4)]


def entries(disk: Disk, primary: list[Slot]) -> tuple[Entry, ...]:
    """All partitions by the slots of sector 0; Damaged when they cannot be believed."""
    used = [(number, slot) for number, slot in enumerate(primary, 1) if slot.used]
    outer = checked((_entry(number, slot) for number, slot in used), disk)
    found = [entry for entry in outer if not _is_extended(entry)]
    for entry in outer:
        if _is_extended(entry):
            found += _logical(disk, entry, _FIRST_LOGICAL + len(found) - _primary(found))
    return checked(found, disk)


def _entry(number: int, slot: Slot, base: int = 0) -> Entry:
    first = base + slot.start
    return Entry(number, first, first + slot.count - 1, f"{slot.type:02x}")


def _is_extended(entry: Entry) -> bool:
    return int(entry.type, 16) in _EXTENDED


def _primary(found: list[Entry]) -> int:
    return sum(entry.number < _FIRST_LOGICAL for entry in found)


def _logical(disk: Disk, extended: Entry, number: int) -> Iterator[Entry]:
    """Follow the chain through an extended partition.

    Each link is a sector with a table: slot 0 is a logical partition, counted from that sector,
    slot 1 the next link, counted from the start of the extended partition.
    """
    met: set[int] = set()
    at = extended.first
    while True:
        if at in met or len(met) > PARTITIONS_MAX:
            raise Damaged("the chain of logical partitions has no end")
        if not extended.first <= at <= extended.last:
            raise Damaged("the chain of logical partitions leaves the extended one")
        met.add(at)
        sector = disk.sector_at(at)
        if sector[510:512] != _SIGNATURE:
            if at == extended.first:
                return  # an extended partition that was never filled
            raise Damaged("the chain of logical partitions is broken")
        logical, link = _slots(sector)[:2]
        if logical.used:
            entry = _entry(number, logical, at)
            if not at < entry.first <= entry.last <= extended.last:
                raise Damaged(f"partition {number} is not inside the extended one")
            yield entry
            number += 1
        if not link.used or link.type not in _EXTENDED:
            return
        at = extended.first + link.start
