"""What the parsers see of a disk: sectors, and the entries they find in a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

Read = Callable[[int, int], bytes]
"""read(offset, length) -> exactly that many bytes, inside the disk."""

PARTITIONS_MAX = 256
"""As many partitions of one disk as Linux uses; a table that has more is absurd."""


class Damaged(Exception):
    """There is a partition table, but it cannot be believed; the text says why."""


class Disk(NamedTuple):
    """`size` bytes behind `read`, in sectors of `sector` bytes."""

    read: Read
    size: int
    sector: int = 512

    @property
    def sectors(self) -> int:
        """Whole sectors; a rest of the disk that is none cannot hold anything."""
        return self.size // self.sector

    def sector_at(self, number: int) -> bytes:
        """One sector; Damaged when it is outside of the disk."""
        return self.at(number, self.sector)

    def at(self, number: int, length: int) -> bytes:
        """`length` bytes from the start of sector `number`; Damaged outside of the disk."""
        offset = number * self.sector
        if number < 0 or offset + length > self.size:
            raise Damaged(f"it points to sector {number}, beyond the end of the disk")
        return self.read(offset, length)


class Entry(NamedTuple):
    """A partition as its table has it: sectors `first`..`last`, both included."""

    number: int
    first: int
    last: int
    type: str
    name: str = ""


def checked(entries: Iterable[Entry], disk: Disk) -> tuple[Entry, ...]:
    """The entries by number; Damaged when they cannot all be slices of the disk."""
    found = tuple(entries)
    if len(found) > PARTITIONS_MAX:
        raise Damaged(f"it has {len(found)} partitions")
    for entry in found:
        if not 0 < entry.first <= entry.last < disk.sectors:
            raise Damaged(
                f"partition {entry.number} (sectors {entry.first} to {entry.last}) "
                f"is not inside the disk of {disk.sectors} sectors"
            )
    for one, other in pairwise(sorted(found, key=lambda entry: entry.first)):
        if other.first <= one.last:
            raise Damaged(f"partitions {one.number} and {other.number} overlap")
    return tuple(sorted(found, key=lambda entry: entry.number))
