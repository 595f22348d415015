"""Where an image holds data, to be asked by range without a walk over the whole map.

A map is made once per open image, when somebody first needs it, and shared by its connections: two
sorted arrays, 16 bytes per extent. It knows at most `extents_max` of them: when an image has more,
the smallest holes count as data, which is always true enough (they read as zeros all the same).

Immutable once made; safe from many threads.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from backyfs.model import FRAME, Extent

EXTENTS_MAX = 1 << 20


class Piece(NamedTuple):
    """Bytes [offset, end) of an image: stored, or a hole that reads as zeros."""

    offset: int
    end: int
    stored: bool


class DataMap:
    """The extents of an image that hold data, from its sorted, disjoint `extents`."""

    def __init__(self, extents: Iterable[Extent], extents_max: int = EXTENTS_MAX) -> None:
        self._starts, self._ends = array("Q"), array("Q")
        self._extents_max = extents_max
        self._hole_min = 0
        for extent in extents:
            self._add(extent.offset, extent.end)

    def __len__(self) -> int:
        return len(self._starts)

    def _add(self, start: int, end: int) -> None:
        if self._ends and start - self._ends[-1] <= self._hole_min:
            self._ends[-1] = end
            return
        if len(self._starts) >= self._extents_max:
            self._coarsen()
            self._add(start, end)
            return
        self._starts.append(start)
        self._ends.append(end)

    def _coarsen(self) -> None:
        """Join over small holes until at most half of the extents are left."""
        while len(self._starts) > self._extents_max // 2:
            self._hole_min = max(self._hole_min * 2, FRAME)
            starts, ends = self._starts, self._ends
            self._starts, self._ends = array("Q"), array("Q")
            for start, end in zip(starts, ends, strict=True):
                self._add(start, end)

    def pieces(self, offset: int, end: int) -> Iterator[Piece]:
        """The range [offset, end) in alternating stored pieces and holes."""
        starts, ends = self._starts, self._ends
        index = bisect_right(ends, offset)
        while offset < end:
            if index == len(starts) or starts[index] >= end:
                yield Piece(offset, end, False)
                return
            if offset < starts[index]:
                yield Piece(offset, starts[index], False)
                offset = starts[index]
            stop = min(ends[index], end)
            yield Piece(offset, stop, True)
            offset = stop
            index += 1

    def stored(self, offset: int, end: int) -> bool:
        """Whether all of the range lies in one stored extent."""
        index = bisect_right(self._ends, offset)
        return (
            index < len(self._starts) and self._starts[index] <= offset and end <= self._ends[index]
        )

    def hole(self, offset: int, end: int) -> bool:
        """Whether no byte of the range is stored."""
        index = bisect_right(self._ends, offset)
        return index == len(self._starts) or self._starts[index] >= end
