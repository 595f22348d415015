"""Sets of bytes of an image as streams of sorted extents, in bounded memory.

Only what says that it sorts holds a set in memory.
"""

from __future__ import annotations

import heapq
import itertools
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


def before(extents: Iterable[Extent], at: int) -> Iterator[Extent]:
    """What of sorted extents lies before the byte `at`."""
    for offset, length in itertools.takewhile(lambda extent: extent.offset < at, extents):
        yield Extent(offset, min(length, at - offset))


def behind(extents: Iterable[Extent], at: int) -> Iterator[Extent]:
    """What of sorted extents lies at the byte `at` or behind it."""
    for extent in extents:
        if extent.end > at:
            start = max(extent.offset, at)
            yield Extent(start, extent.end - start)


class Gathered:
    """Extents that come in ascending order, joined where they touch; at most `most` of them.

    When there are more, the smallest gaps between them are closed: what they cover grows, what
    they need in memory does not.
    """

    def __init__(self, most: int = 1 << 17) -> None:
        self._most, self._gap = most, 0
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, offset: int, length: int) -> None:
        """Take one more; ValueError when it begins before the last one."""
        if not self._starts or offset - self._ends[-1] > self._gap:
            self._starts.append(offset)
            self._ends.append(offset + length)
            if len(self._starts) > self._most:
                self._close_gaps()
        elif offset < self._starts[-1]:
            raise ValueError(f"the extent at {offset} is out of order")
        else:
            self._ends[-1] = max(self._ends[-1], offset + length)

    def _close_gaps(self) -> None:
        starts, ends = self._starts, self._ends
        while len(self._starts) > self._most // 2:
            self._gap = max(2 * self._gap, FRAME)
            self._starts, self._ends = starts[:1], ends[:1]
            for start, end in zip(starts[1:], ends[1:], strict=True):
                if start - self._ends[-1] > self._gap:
                    self._starts.append(start)
                    self._ends.append(end)
                else:
                    self._ends[-1] = end

    def extents(self) -> list[Extent]:
        """Sorted and disjoint."""
        pairs = zip(self._starts, self._ends, strict=True)
        return [Extent(start, end - start) for start, end in pairs if end > start]
