"""What to read of a disk: a stream of steps in the order of the disk, cut into batches.

Pure, lazy, and bounded in memory whatever the size of the disk. Steps are whole frames (the last
one clipped to the disk's size), so that a writer never needs to read before it writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from backyfs.engine.pipeline import BATCH_BYTES
from backyfs.extents import framed
from backyfs.model import Extent

STEPS_MAX = 512
"""Steps of one batch, however small they are."""


class Step(NamedTuple):
    """Read an extent, or (zero) know without reading that it is zero."""

    extent: Extent
    zero: bool = False


Batch = tuple[Step, ...]


def reading(extents: Iterable[Extent]) -> Iterator[Step]:
    """Read these extents and leave the rest as it is."""
    return (Step(extent) for extent in extents)


def scanning(data: Iterable[Extent], size: int) -> Iterator[Step]:
    """Read the frames that may hold data; all others of the disk are zero."""
    position = 0
    for extent in framed(data, size):
        if extent.offset > position:
            yield Step(Extent(position, extent.offset - position), zero=True)
        yield Step(extent)
        position = extent.end
    if position < size:
        yield Step(Extent(position, size - position), zero=True)


def pieces(extent: Extent, length: int = BATCH_BYTES) -> Iterator[Extent]:
    """An extent in pieces of at most `length` bytes, cut at multiples of it."""
    offset = extent.offset
    while offset < extent.end:
        end = min(offset - offset % length + length, extent.end)
        yield Extent(offset, end - offset)
        offset = end


def batches(steps: Iterable[Step]) -> Iterator[Batch]:
    """Steps grouped so that one batch reads at most BATCH_BYTES."""
    batch: list[Step] = []
    read = 0
    for step in steps:
        for part in [step] if step.zero else map(Step, pieces(step.extent)):
            length = 0 if part.zero else part.extent.length
            if batch and (read + length > BATCH_BYTES or len(batch) >= STEPS_MAX):
                yield tuple(batch)
                batch, read = [], 0
            batch.append(part)
            read += length
    if batch:
        yield tuple(batch)


def in_batches(extents: Iterable[Extent]) -> Iterator[tuple[Extent, ...]]:
    """Extents in batches of at most BATCH_BYTES: large ones cut, small ones together."""
    return (tuple(step.extent for step in batch) for batch in batches(reading(extents)))


def size_of(extents: Iterable[Extent]) -> int:
    """Bytes of all extents together."""
    return sum(extent.length for extent in extents)
