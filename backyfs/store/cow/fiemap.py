"""Where the blocks of a file lie on the medium, as FIEMAP tells: who shares what with whom.

Answers are about what is durable. Files are fsynced before anybody asks; what somebody else has
written into one since has no place of its own until it is written back, so that is waited for.
"""

from __future__ import annotations

import fcntl
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from backyfs.model import Extent
from backyfs.store.cow.blocks import BLOCK

_FS_IOC_FIEMAP = 0xC020660B
_REQUEST = struct.Struct("=QQIIII")  # start, length, flags, mapped, room, reserved
_EXTENT = struct.Struct("=QQQ16xI12x")  # logical, physical, length, flags
_ROOM = 1024
_SYNC = 0x001
_LAST = 0x001
_NO_PLACE = 0x002 | 0x004 | 0x200  # unknown, delayed allocation, kept inside metadata
_ENCODED = 0x008


@dataclass(frozen=True, slots=True)
class Placed:
    """A range of a file and where it lies. `encoded`: compressed, so only as a whole."""

    offset: int
    physical: int
    length: int
    encoded: bool

    @property
    def end(self) -> int:
        """The first byte of the file behind it."""
        return self.offset + self.length


def extent_count(fd: int) -> int:
    """How many extents the file system keeps for the file: what a reflink copy costs."""
    answer = fcntl.ioctl(fd, _FS_IOC_FIEMAP, _REQUEST.pack(0, 2**64 - 1, 0, 0, 0, 0))
    return int(_REQUEST.unpack(answer)[3])


def placed(fd: int, start: int, end: int) -> Iterator[Placed]:
    """What lies where, for the parts of [start, end) that are no holes and have a place."""
    while start < end:
        answer = bytearray(_REQUEST.pack(start, end - start, _SYNC, 0, _ROOM, 0))
        answer += bytes(_ROOM * _EXTENT.size)
        fcntl.ioctl(fd, _FS_IOC_FIEMAP, answer)
        count = _REQUEST.unpack_from(answer)[3]
        if not count:
            return
        for number in range(count):
            at = _REQUEST.size + number * _EXTENT.size
            logical, physical, length, flags = _EXTENT.unpack_from(answer, at)
            if not flags & _NO_PLACE:
                yield Placed(logical, physical, length, bool(flags & _ENCODED))
            if flags & _LAST:
                return
            start = logical + length


def places(fd: int, offset: int, length: int) -> set[int]:
    """Physical block numbers behind a small range; of compressed extents only the first."""
    found: set[int] = set()
    for extent in placed(fd, offset, offset + length):
        if extent.encoded:
            found.add(extent.physical // BLOCK)
            continue
        first, end = max(extent.offset, offset), min(extent.end, offset + length)
        start = extent.physical + first - extent.offset
        found.update(range(start // BLOCK, -(-(start + end - first) // BLOCK)))
    return found


def apart(fd: int, other_fd: int, size: int) -> Iterator[Extent]:
    """What the first file, up to `size`, does not hold in the same place as the second."""
    theirs = placed(other_fd, 0, size)
    behind = next(theirs, None)
    for mine in placed(fd, 0, size):
        position = mine.offset
        while behind is not None and behind.offset < mine.end:
            if behind.end > position and _together(mine, behind):
                if behind.offset > position:
                    yield Extent(position, behind.offset - position)
                position = min(behind.end, mine.end)
            if behind.end > mine.end:
                break
            behind = next(theirs, None)
        if position < mine.end:
            yield Extent(position, mine.end - position)


def _together(one: Placed, other: Placed) -> bool:
    """Whether two ranges that overlap in their files are the same bytes of the medium."""
    if one.encoded or other.encoded:
        return one == other
    return one.physical - one.offset == other.physical - other.offset
