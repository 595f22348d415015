"""Runs: frames of a disk that follow each other in the store, and all those of a disk in columns.

A disk in a million pieces is 16 MB that way, and a map is made from the one before by copying what
lies between two changes in one go.
"""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

GAP = -1
COLUMN_BYTES = 4
COLUMNS = 4
"""Gap before the run, span, segment, number: as a map's file has them."""


class Run(NamedTuple):
    """Consecutive frames: `span` from `first`, stored as `number` and on in segment `segment`.

    `segment` is GAP for frames that are zero.
    """

    first: int
    span: int
    segment: int
    number: int

    @property
    def end(self) -> int:
        """The frame after the last."""
        return self.first + self.span

    def cut(self, first: int, end: int) -> Run:
        """The part in [first, end); its span is not positive when there is none."""
        start = max(self.first, first)
        number = self.number if self.segment == GAP else self.number + start - self.first
        return Run(start, min(self.end, end) - start, self.segment, number)


class Scattered:
    """Runs as they come, in any order, none overlapping: 24 bytes each; read in the disk's."""

    def __init__(self) -> None:
        self._firsts, self._spans = array("Q"), array("I")
        self._segments, self._numbers = array("q"), array("I")

    def __len__(self) -> int:
        return len(self._firsts)

    def add(self, runs: Iterable[Run]) -> None:
        """Note some more."""
        for run in runs:
            self._firsts.append(run.first)
            self._spans.append(run.span)
            self._segments.append(run.segment)
            self._numbers.append(run.number)

    def __iter__(self) -> Iterator[Run]:
        columns = (self._firsts, self._spans, self._segments, self._numbers)
        for index in sorted(range(len(self)), key=self._firsts.__getitem__):
            yield Run(*(column[index] for column in columns))


class Runs:
    """Runs of stored frames, sorted; none overlap, and those that continue each other are one."""

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        """ValueError, OverflowError for what 32 bits cannot say."""
        self._gaps, self._spans, self.segments, self._numbers = (array("I") for _ in range(COLUMNS))
        self.end = 0
        for run in runs:
            self._append(run)

    @classmethod
    def decode(cls, columns: bytes, count: int) -> Runs:
        """Those of a map's file; nothing but their number is checked. ValueError."""
        length = count * COLUMN_BYTES
        if len(columns) != length * COLUMNS:
            raise ValueError("a section has the wrong length")
        found = cls()
        parts = (found._gaps, found._spans, found.segments, found._numbers)
        for index, part in enumerate(parts):
            part.frombytes(columns[index * length : (index + 1) * length])
        found.end = sum(found._gaps) + sum(found._spans)
        return found

    def encode(self) -> bytes:
        """As a map's file has them."""
        parts = (self._gaps, self._spans, self.segments, self._numbers)
        return b"".join(part.tobytes() for part in parts)

    def __len__(self) -> int:
        return len(self._spans)

    def __iter__(self) -> Iterator[Run]:
        return map(Run, self._firsts, self._spans, self.segments, self._numbers)

    def __getitem__(self, index: int) -> Run:
        return Run(
            self._firsts[index], self._spans[index], self.segments[index], self._numbers[index]
        )

    @cached_property
    def _firsts(self) -> array[int]:
        """The first frame of each; who only wants to know the segments does without."""
        steps = array("I", bytes(2 * COLUMN_BYTES * len(self)))
        steps[::2], steps[1::2] = self._gaps, self._spans
        return array("Q", itertools.accumulate(steps))[::2]

    def find(self, first: int, count: int) -> Iterator[Run]:
        """Frames [first, first + count) as runs, gaps included."""
        end = first + count
        index = self._reaching(first)
        while first < end:
            start = self._firsts[index] if index < len(self) else end
            if start >= end:
                yield Run(first, end - first, GAP, 0)
                return
            if start > first:
                yield Run(first, start - first, GAP, 0)
                first = start
            skip = first - start
            span = min(self._spans[index] - skip, end - first)
            if span > 0:
                yield Run(first, span, self.segments[index], self._numbers[index] + skip)
                first += span
            index += 1

    def _reaching(self, first: int) -> int:
        """The index of the run with a frame, or of the next."""
        return max(0, bisect_right(self._firsts, first) - 1)

    def renumber(self, segments: dict[int, int]) -> None:
        """Have other numbers for the segments."""
        self.segments = array("I", map(segments.__getitem__, self.segments))

    # While they are made: until the first look at where they begin

    def _append(self, run: Run) -> None:
        if self and self._continued_by(run):
            self._spans[-1] += run.span
        else:
            self._gaps.append(run.first - self.end)
            self._spans.append(run.span)
            self.segments.append(run.segment)
            self._numbers.append(run.number)
        self.end = run.end

    def _continued_by(self, run: Run) -> bool:
        return (
            self.end == run.first
            and self.segments[-1] == run.segment
            and self._numbers[-1] + self._spans[-1] == run.number
        )

    def _copy(self, base: Runs, first: int, end: int) -> None:
        """Append what `base` has of frames [first, end)."""
        if first >= end:
            return
        start, stop = base._reaching(first), bisect_left(base._firsts, end)
        # The first may be cut and may continue what is here; the last may be cut.
        for index in range(start, min(start + 2, stop)):
            self._append_some(base[index].cut(first, end))
        if stop - start > 3:
            self._extend(base, start + 2, stop - 1)
        if stop - start > 2:
            self._append_some(base[stop - 1].cut(first, end))

    def _append_some(self, run: Run) -> None:
        if run.span > 0:
            self._append(run)

    def _extend(self, base: Runs, start: int, stop: int) -> None:
        """Append whole runs of `base`."""
        self._gaps.append(base._firsts[start] - self.end)
        self._gaps += base._gaps[start + 1 : stop]
        self._spans += base._spans[start:stop]
        self.segments += base.segments[start:stop]
        self._numbers += base._numbers[start:stop]
        self.end = base[stop - 1].end


def overlaid(base: Runs, changes: Iterable[Run], frames: int) -> Runs:
    """`base` with `changes` on top (sorted, disjoint), clipped to `frames`.

    A change with segment GAP removes what was there.
    """
    found = Runs()
    at = 0
    for change in changes:
        found._copy(base, at, min(change.first, frames))
        if change.segment != GAP:
            found._append_some(change.cut(0, frames))
        at = change.end
    found._copy(base, at, frames)
    return found
