"""Bringing a target to a revision by writing only what differs.

Frames of the target are hashed and compared with the hashes that the store keeps, so that the
store is read only where they differ. What was written is not written again: after an interruption
a second run does the rest. The head of the disk goes away before the first change and comes back
last, as in any restore in place.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass

from backyfs.allocator import keep_freed_blocks
from backyfs.extents import before, behind, joined, merged, union
from backyfs.model import FRAME, Extent
from backyfs.restore.reading import (
    Advance,
    Batch,
    Buffers,
    Reader,
    batches,
    ignore,
    in_order,
    length_of,
)
from backyfs.restore.target import Rewritable
from backyfs.store.contract import StoredImage
from backyfs.store.cow.blocks import frame_hashes
from backyfs.store.digest import HASH, ZERO_HASH

_THREADS = 6
"""They wait for the target most of the time."""


@dataclass(frozen=True, slots=True)
class DeltaReport:
    """Bytes of the disk, bytes of the target that were compared, written and zeroed."""

    size: int
    compared: int
    written: int
    zeroed: int
    bad: tuple[Extent, ...]


def candidates(image: StoredImage, target: Rewritable) -> list[Extent]:
    """What may differ: whole frames where the image or the target may hold data. TargetError."""
    return list(union(image.extents(), target.data(), image.size))


def update(
    image: StoredImage,
    target: Rewritable,
    where: Sequence[Extent],
    *,
    salvage: bool = False,
    advance: Advance = ignore,
) -> DeltaReport:
    """Make `target` equal to `image`, of which it may differ in `where` only, and finish it.

    With `salvage` frames that differ and are damaged in the store become zeros. `advance` is told
    the bytes compared. Corrupt, NoSpace, TargetError, OSError.
    """
    keep_freed_blocks()
    head = list(before(where, target.head_bytes))
    rest = list(behind(where, target.head_bytes))
    delta = _Delta(image, target, Reader(image, salvage))
    if delta.differs(head):
        delta.take_head_away()
    delta.apply(rest, advance)
    if delta.headless:
        target.settle()
        delta.apply(head, advance)
    else:
        advance(length_of(head))
    target.finish()
    bad = tuple(merged(delta.reader.bad))
    return DeltaReport(image.size, length_of(where), delta.written, delta.zeroed, bad)


class _Delta:
    """The work on one target, and how much it was; many threads."""

    def __init__(self, image: StoredImage, target: Rewritable, reader: Reader) -> None:
        self.reader = reader
        self.written = self.zeroed = 0
        self._image, self._target = image, target
        self._buffers = Buffers()
        self._lock = threading.Lock()
        self.headless = False

    def differs(self, extents: Sequence[Extent]) -> bool:
        """Whether anything differs in there."""
        return any(self._stale(extent) != ([], []) for b in batches(extents) for extent in b)

    def take_head_away(self) -> None:
        """Make the head zeros, durably, unless that is done."""
        with self._lock:
            if not self.headless:
                self._target.zero(0, min(self._target.head_bytes, self._image.size))
                self._target.settle()
                self.headless = True

    def apply(self, extents: Sequence[Extent], advance: Advance) -> None:
        """Change what differs in there."""
        with closing(in_order(self._apply, batches(extents), _THREADS)) as results:
            for count in results:
                advance(count)

    def _apply(self, batch: Batch) -> int:
        for extent in batch:
            data, zeros = self._stale(extent)
            if data or zeros:
                self.take_head_away()
                self._write(data)
                self._zero(zeros)
        return length_of(batch)

    def _stale(self, extent: Extent) -> tuple[list[Extent], list[Extent]]:
        """What differs in an extent of whole frames: where data belongs, and where zeros do."""
        found = frame_hashes(self._target.read(extent.offset, extent.length))
        first = extent.offset // FRAME
        wanted = self._image.hashes(first, len(found) // HASH)
        stale: tuple[list[Extent], list[Extent]] = [], []
        for at in range(0, len(found), HASH):
            if (hash_ := wanted[at : at + HASH]) != found[at : at + HASH]:
                stale[hash_ == ZERO_HASH].append(self._frame(first + at // HASH))
        return stale

    def _frame(self, number: int) -> Extent:
        offset = number * FRAME
        return Extent(offset, min(FRAME, self._image.size - offset))

    def _write(self, frames: Iterable[Extent]) -> None:
        buffer = self._buffers.take()
        for extent in joined(frames):
            self._target.write(extent.offset, self.reader.read(extent, buffer))
            self._count(written=extent.length)
        self._buffers.give(buffer)

    def _zero(self, frames: Iterable[Extent]) -> None:
        for extent in joined(frames):
            self._target.zero(extent.offset, extent.length)
            self._count(zeroed=extent.length)

    def _count(self, *, written: int = 0, zeroed: int = 0) -> None:
        with self._lock:
            self.written += written
            self.zeroed += zeroed
