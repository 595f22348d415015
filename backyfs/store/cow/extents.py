"""Streams of sorted extents: joined and widened as they come, never held in memory."""

from __future__ import annotations

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
        if (first := extent.offset // FRAME * FRAME) < size
    )
