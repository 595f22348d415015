"""The extent map of a disk: which stored frame each frame of the image is.

A map names (segment, number), never bytes, so data can move without touching a map. A gap is zeros.
"""

from __future__ import annotations

import itertools
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple
from uuid import UUID

import zstandard

from backyfs.errors import Corrupt
from backyfs.store.digest import HASH, frame_count, group_count
from backyfs.store.header import HEADER, MAP_MAGIC, Header

GAP = -1

_FIXED = struct.Struct("<QQQI36x")
"""size, extents, groups, segments"""
_SECTION = struct.Struct("<IIQQQ")
"""kind, flags (1 = zstd), offset, stored bytes, bytes"""
_SEGMENT = struct.Struct("<32sI12x32s")
_KINDS = (1, 2, 3)
_SEGMENTS, _EXTENTS, _GROUPS = _KINDS
_ZSTD = 1
_COLUMNS = 4
"""Gaps, counts, segments, numbers: each of 32 bits an extent."""


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """A segment as a map authenticates it."""

    name: str
    count: int
    root: bytes


class Run(NamedTuple):
    """Consecutive frames: `span` from `first`, stored as `number` and on in segment `segment`.

    `segment` is GAP for frames that are zero.
    """

    first: int
    span: int
    segment: int
    number: int


class ExtentMap:
    """An immutable map. Extents are sorted by first frame and do not overlap."""

    def __init__(
        self, size: int, segments: list[SegmentRef], runs: Iterable[Run], groups: bytes
    ) -> None:
        self.size = size
        self.segments = segments
        self.groups = groups
        self._gaps, self._counts, self._segments, self._numbers = _columns()
        position = 0
        for run in runs:
            self._gaps.append(run.first - position)
            self._counts.append(run.span)
            self._segments.append(run.segment)
            self._numbers.append(run.number)
            position = run.first + run.span

    @property
    def frames(self) -> int:
        """Frames of the image."""
        return frame_count(self.size)

    def __len__(self) -> int:
        return len(self._counts)

    @cached_property
    def _firsts(self) -> array[int]:
        """The first frame of each extent; for who only wants to know the segments, never made."""
        steps = array("I", bytes(2 * 4 * len(self)))
        steps[::2], steps[1::2] = self._gaps, self._counts
        return array("Q", itertools.accumulate(steps))[::2]

    def runs(self) -> Iterator[Run]:
        """All extents, without gaps."""
        return map(Run, self._firsts, self._counts, self._segments, self._numbers)

    def find(self, first: int, count: int) -> Iterator[Run]:
        """Frames [first, first + count) as runs, gaps included."""
        end = first + count
        index = max(0, bisect_right(self._firsts, first) - 1)
        while first < end:
            if index >= len(self._firsts):
                yield Run(first, end - first, GAP, 0)
                return
            start, n = self._firsts[index], self._counts[index]
            if start >= end:
                yield Run(first, end - first, GAP, 0)
                return
            if start > first:
                yield Run(first, start - first, GAP, 0)
                first = start
            skip = first - start
            if skip < n:
                take = min(n - skip, end - first)
                yield Run(first, take, self._segments[index], self._numbers[index] + skip)
                first += take
            index += 1

    # The file

    def encode(self, repository: UUID) -> bytes:
        """The bytes of the map's file."""
        columns = b"".join(
            column.tobytes() for column in (self._gaps, self._counts, self._segments, self._numbers)
        )
        segments = b"".join(_SEGMENT.pack(s.name.encode(), s.count, s.root) for s in self.segments)
        fixed = _FIXED.pack(self.size, len(self), len(self.groups) // HASH, len(self.segments))
        return _assembled(repository, fixed, (segments, columns, self.groups))

    @classmethod
    def decode(cls, data: bytes, what: str, *, section_max: int = 1 << 30) -> ExtentMap:
        """The map in a file whose hash was checked. Corrupt, Unsupported.

        `section_max`: more bytes than any of its sections can have.
        """
        Header.decode(data, MAP_MAGIC, what)
        try:
            return cls._decoded(data, section_max)
        except (struct.error, ValueError, LookupError, ArithmeticError, zstandard.ZstdError) as exc:
            raise Corrupt(f"{what} is malformed: {exc}") from exc

    @classmethod
    def _decoded(cls, data: bytes, section_max: int) -> ExtentMap:
        size, extents, groups, segments = _FIXED.unpack_from(data, HEADER.size)
        sections = dict(_sections(data, section_max))
        if len(sections[_GROUPS]) != groups * HASH or groups != group_count(size):
            raise ValueError("wrong number of groups")
        refs = [
            SegmentRef(name.rstrip(b"\0").decode("ascii"), count, root)
            for name, count, root in _SEGMENT.iter_unpack(sections[_SEGMENTS])
        ]
        if len(refs) != segments or len(sections[_EXTENTS]) != extents * 4 * _COLUMNS:
            raise ValueError("a section has the wrong length")
        found = cls(size, refs, (), sections[_GROUPS])
        found._load(sections[_EXTENTS], extents)
        return found

    def _load(self, columns: bytes, count: int) -> None:
        parts = (self._gaps, self._counts, self._segments, self._numbers)
        for index, part in enumerate(parts):
            part.frombytes(columns[index * 4 * count : (index + 1) * 4 * count])
        end = sum(self._gaps) + sum(self._counts)
        if end > self.frames or max(self._segments, default=-1) >= len(self.segments):
            raise ValueError("an extent lies outside the disk or its segments")


def _columns() -> Iterator[array[int]]:
    return (array("I") for _ in range(_COLUMNS))


def _assembled(repository: UUID, fixed: bytes, sections: tuple[bytes, ...]) -> bytes:
    position = HEADER.size + _FIXED.size + len(sections) * _SECTION.size
    table, bodies = [], []
    for kind, body in zip(_KINDS, sections, strict=True):
        packed = zstandard.ZstdCompressor(level=1).compress(body)
        flags, stored = (_ZSTD, packed) if len(packed) < len(body) else (0, body)
        position = -(-position // 16) * 16
        table.append(_SECTION.pack(kind, flags, position, len(stored), len(body)))
        bodies.append((position, stored))
        position += len(stored)
    result = bytearray(Header(MAP_MAGIC, repository).encode() + fixed + b"".join(table))
    for at, body in bodies:
        result += bytes(at - len(result)) + body
    return bytes(result)


def _sections(data: bytes, most: int) -> Iterator[tuple[int, bytes]]:
    for index in range(len(_KINDS)):
        at = HEADER.size + _FIXED.size + index * _SECTION.size
        kind, flags, offset, stored, length = _SECTION.unpack_from(data, at)
        body = data[offset : offset + stored]
        if flags & _ZSTD:
            # What is said here and in the zstd frame is allocated before a byte is decoded.
            if max(length, zstandard.frame_content_size(body)) > most:
                raise ValueError("a section has an impossible length")
            body = zstandard.ZstdDecompressor().decompress(body, max_output_size=length)
        if len(body) != length:
            raise ValueError("a section is cut off")
        yield kind, body


def overlaid(base: Iterable[Run], changes: Iterable[Run], frames: int) -> Iterator[Run]:
    """`base` with `changes` on top (both sorted, disjoint), clipped to `frames`, gaps left out.

    A change with segment GAP removes what was there. Runs that continue each other become one.
    """
    return _joined(run for run in _laid(iter(base), iter(changes), frames) if run.segment != GAP)


def _laid(base: Iterator[Run], changes: Iterator[Run], frames: int) -> Iterator[Run]:
    below = next(base, None)
    for change in changes:
        while below is not None and below.first < change.first:
            head = _part(below, below.first, min(below.first + below.span, change.first))
            yield from _clipped(head, frames)
            rest = below.span - head.span
            below = (
                _part(below, change.first, below.first + below.span) if rest else next(base, None)
            )
        yield from _clipped(change, frames)
        end = change.first + change.span
        while below is not None and below.first < end:
            last = below.first + below.span
            below = _part(below, end, last) if last > end else next(base, None)
    while below is not None:
        yield from _clipped(below, frames)
        below = next(base, None)


def _part(run: Run, first: int, end: int) -> Run:
    skip = first - run.first
    number = run.number if run.segment == GAP else run.number + skip
    return Run(first, end - first, run.segment, number)


def _clipped(run: Run, frames: int) -> Iterator[Run]:
    if run.first + run.span <= frames:
        yield run
    elif run.first < frames:
        yield _part(run, run.first, frames)


def _joined(runs: Iterable[Run]) -> Iterator[Run]:
    last: Run | None = None
    for run in runs:
        if (
            last is not None
            and last.first + last.span == run.first
            and last.segment == run.segment
            and last.number + last.span == run.number
        ):
            last = Run(last.first, last.span + run.span, last.segment, last.number)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last
