"""The .sum file beside an image: the hash of each frame, and the level-1 hashes above them.

    0      header (store/header.py), then disk size u64, frame u32, extents when fresh u64, zeros;
           at 4064 the BLAKE3 of the first 4064 bytes
    4096   hashes of all frames, 32 bytes each; a zero frame's hash is zero and usually a hole
    behind level-1 hashes, 32 bytes per 1024 frames

A record names the BLAKE3 over the first 4096 bytes and the level-1 section. Level 1 authenticates
the frame hashes, so opening a table and patching it cost what they touch. A group of frame hashes
is 32 KiB at a multiple of 4 KiB: an untouched one shares its blocks with the parent's.
"""

from __future__ import annotations

import heapq
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from uuid import UUID

from blake3 import blake3

from backyfs.errors import Corrupt
from backyfs.model import FRAME, Extent
from backyfs.store.cow.blocks import runs
from backyfs.store.cow.fiemap import apart
from backyfs.store.cow.reflink import data_extents
from backyfs.store.digest import (
    FAN_OUT,
    HASH,
    ZERO_HASH,
    digest,
    frame_count,
    group_count,
    node,
)
from backyfs.store.fs import read_exactly
from backyfs.store.header import SUM_MAGIC, Header

HEAD = 4096
"""Where the frame hashes begin; what lies before is the head."""

GROUP_BYTES = FAN_OUT * HASH
_FIELDS = struct.Struct("<QIQ")
_CHECKED = HEAD - HASH
_NOBODY = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Head:
    """What a .sum file says of its image.

    `fresh_extents`: how many extents the image had when it was last written as a fresh file; the
    clones made from it keep the number.
    """

    repository: UUID
    size: int
    fresh_extents: int = 0

    def encode(self) -> bytes:
        """The first 4096 bytes of the file."""
        fields = _FIELDS.pack(self.size, FRAME, self.fresh_extents)
        body = (Header(SUM_MAGIC, self.repository).encode() + fields).ljust(_CHECKED, b"\0")
        return body + blake3(body).digest()

    @classmethod
    def decode(cls, data: bytes, what: str) -> Head:
        """The head in the first 4096 bytes of a file; Corrupt, Unsupported."""
        # First the header, which all versions share: a newer one is not damage.
        header = Header.decode(data, SUM_MAGIC, what)
        if len(data) < HEAD or blake3(data[:_CHECKED]).digest() != data[_CHECKED:HEAD]:
            raise Corrupt(f"the head of {what} fails its checksum")
        size, frame, extents = _FIELDS.unpack_from(data, header.length)
        if frame != FRAME:
            raise Corrupt(f"{what} is about frames of {frame} bytes")
        return cls(header.repository, size, extents)


def hash_at(frame: int) -> int:
    """Where a frame's hash lies."""
    return HEAD + frame * HASH


def level1_at(size: int) -> int:
    """Where the level-1 hashes of an image of `size` bytes begin."""
    return hash_at(frame_count(size))


def table_bytes(size: int) -> int:
    """Length of the .sum file of an image of `size` bytes."""
    return level1_at(size) + group_count(size) * HASH


def checksum(head: bytes, level1: bytes) -> str:
    """What a record says of a .sum file."""
    return blake3(head + level1).hexdigest()


def group_frames(group: int, size: int) -> tuple[int, int]:
    """The frames [first, end) of a group in an image of `size` bytes."""
    return group * FAN_OUT, min((group + 1) * FAN_OUT, frame_count(size))


def used_groups(fd: int, size: int) -> Iterator[int]:
    """Groups whose frame hashes are not wholly a hole in the .sum file, ascending."""
    return _groups_at(data_extents(fd, HEAD, level1_at(size)), size)


def _groups_at(extents: Iterable[Extent], size: int) -> Iterator[int]:
    """Groups whose frame hashes lie in these sorted extents of a .sum file, ascending."""
    behind = 0
    for extent in extents:
        first = (max(extent.offset, HEAD) - HEAD) // GROUP_BYTES
        end = -(-(min(extent.end, level1_at(size)) - HEAD) // GROUP_BYTES)
        yield from range(max(first, behind), end)
        behind = max(end, behind)


def nonzero_frames(fd: int, first: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs [first, end) of frames whose hash in an open .sum file is not zero, or unreadable."""
    return runs(_nonzero(fd, first, end))


def _nonzero(fd: int, first: int, end: int) -> Iterator[int]:
    for extent in data_extents(fd, hash_at(first), hash_at(end)):
        start = max(first, (extent.offset - HEAD) // HASH)
        stop = min(end, -(-(extent.end - HEAD) // HASH))
        for at in range(start, stop, FAN_OUT):
            count = min(FAN_OUT, stop - at)
            try:
                column = read_exactly(fd, count * HASH, hash_at(at))
            except OSError:  # not to be told: whoever reads these frames finds out
                yield from range(at, at + count)
                continue
            for number in range(count):
                if not column.startswith(ZERO_HASH, number * HASH):
                    yield at + number


class Table:
    """An open .sum file whose level-1 hashes are what the record says.

    `problem`: what is wrong with head or level 1 in the file, in words; "" if they are as written.
    Safe from many threads. Does not close its descriptor.
    """

    def __init__(self, fd: int, head: Head, level1: bytes, problem: str = "") -> None:
        self.fd, self.head, self.level1, self.problem = fd, head, level1, problem

    @classmethod
    def load(cls, fd: int, size: int, recorded: str, what: str) -> Table:
        """Read and check head and level 1. Corrupt, Unsupported."""
        try:
            head = read_exactly(fd, HEAD, 0)
            decoded = Head.decode(head, what)
            level1 = _stored_level1(fd, size)
        except (OSError, EOFError) as exc:
            raise Corrupt(f"{what} cannot be read: {exc}") from exc
        if os.fstat(fd).st_size != table_bytes(size):
            raise Corrupt(f"{what} has {os.fstat(fd).st_size} bytes, not {table_bytes(size)}")
        if decoded.size != size or checksum(head, level1) != recorded:
            raise Corrupt(f"{what} is not what the record says")
        return cls(fd, decoded, level1)

    @classmethod
    def recovered(cls, fd: int, size: int, proof: str, problem: str) -> Table | None:
        """The table in spite of a `problem`, if the digest `proof` confirms its level-1 hashes.

        They are those of the file, or computed again from the frame hashes, all of which this
        reads. The head says nothing that cannot be done without.
        """
        for level1 in (_stored_level1, _computed_level1):
            try:
                found = level1(fd, size)
            except (OSError, EOFError):
                continue
            if digest(size, found) == proof:
                return cls(fd, Head(_NOBODY, size), found, problem)
        return None

    @property
    def size(self) -> int:
        """Bytes of the image."""
        return self.head.size

    def recorded(self, group: int) -> bytes:
        """The level-1 hash of a group."""
        return self.level1[group * HASH : (group + 1) * HASH]

    def column(self, group: int) -> bytes:
        """The frame hashes of a group as they stand in the file, unchecked; OSError, EOFError."""
        first, end = group_frames(group, self.size)
        return read_exactly(self.fd, (end - first) * HASH, hash_at(first))

    def readable(self, group: int) -> bool:
        """Whether the medium gives the frame hashes of a group, right or wrong."""
        try:
            self.column(group)
        except (OSError, EOFError):
            return False
        return True

    def checked_column(self, group: int) -> bytes | None:
        """The frame hashes of a group, None when they fail their level-1 hash."""
        try:
            column = self.column(group)
        except (OSError, EOFError):
            return None
        return column if node(column) == self.recorded(group) else None

    def bad_groups(self) -> list[int]:
        """Groups whose frame hashes fail their level-1 hash; reads what is no hole."""
        zero = bytes(HASH)
        used = set(used_groups(self.fd, self.size))
        suspects = used | {
            at // HASH
            for at in range(0, len(self.level1), HASH)
            if not self.level1.startswith(zero, at)
        }
        return self._failing(sorted(suspects))

    def bad_groups_apart(self, other: Table) -> list[int]:
        """As `bad_groups`, but only those whose hashes do not lie where those of `other` do."""
        end = level1_at(self.size)
        here, there = apart(self.fd, other.fd, end), apart(other.fd, self.fd, end)
        return self._failing(_groups_at(heapq.merge(here, there), self.size))

    def _failing(self, groups: Iterable[int]) -> list[int]:
        return [group for group in groups if self.checked_column(group) is None]


def _stored_level1(fd: int, size: int) -> bytes:
    return read_exactly(fd, group_count(size) * HASH, level1_at(size))


def _computed_level1(fd: int, size: int) -> bytes:
    level1 = bytearray(group_count(size) * HASH)
    for group in used_groups(fd, size):
        level1[group * HASH : (group + 1) * HASH] = level1_of(fd, size, group)
    return bytes(level1)


def level1_of(fd: int, size: int, group: int) -> bytes:
    """The level-1 hash over a group's frame hashes in an open .sum file."""
    first, end = group_frames(group, size)
    return node(read_exactly(fd, (end - first) * HASH, hash_at(first)))
