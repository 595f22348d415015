"""Sets of bytes of an image as streams of sorted extents, in bounded memory.

Only what says that it sorts holds a set in memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from backyfs.model import FRAME, Extent


def joined(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Sorted extents, which may overlap, as disjoint ones; neighbours that touch become one."""
    start = end = -1
    for extent in extents:
        if extent.offset > end:
            if end > start:
                yield Extent(start, end - start)
            start = extent.offset
        end = max(end, extent.end)
    if end > start:
        yield Extent(start, end - start)


def framed(extents: Iterable[Extent], size: int) -> Iterator[Extent]:
    """Sorted extents widened to whole frames of a disk of `size` bytes; disjoint."""
    return joined(
        Extent(first, min(-(-extent.end // FRAME) * FRAME, size) - first)
        for extent in extents
        if extent.length > 0 and (first := extent.offset // FRAME * FRAME) < size
    )


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Extents in any order, as sorted, disjoint ones; sorts them in memory."""
    return joined(sorted(extents))


def whole_frames(extents: Iterable[Extent], size: int) -> Iterator[Extent]:
    """Extents in any order, widened to whole frames; sorts them in memory."""
    return framed(sorted(extents), size)


def union(one: Iterable[Extent], other: Iterable[Extent], size: int) -> Iterator[Extent]:
    """The whole frames that either of two sorted streams touches."""
    return framed(heapq.merge(one, other), size)


def gaps(extents: Iterable[Extent], size: int) -> Iterator[Extent]:
    """What sorted, disjoint `extents` leave uncovered of [0, size)."""
    position = 0
    for extent in extents:
        if extent.offset > position:
            yield Extent(position, extent.offset - position)
        position = extent.end
    if position < size:
        yield Extent(position, size - position)
