"""Moving an image's bytes into a target: threads read and decode, batches stay bounded.

A few batches of at most BATCH bytes each are in memory. Random-access targets are written by
the reading threads in any order; a stream is written by the caller's thread, so that a signal
can end a write that blocks. All threads are joined before a call returns or raises.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from contextvars import copy_context
from dataclasses import dataclass
from typing import TypeVar

from backyfs.allocator import keep_freed_blocks
from backyfs.errors import Corrupt
from backyfs.extents import gaps, merged
from backyfs.model import FRAME, Extent
from backyfs.restore.target import Target
from backyfs.store.contract import StoredImage

BATCH = 2 << 20
"""Bytes of image one task covers."""

THREADS = 2
"""Decoding keeps that many busy; those that also write wait for the medium most of the time."""
WRITING_THREADS = 6
_AHEAD = 3
"""Tasks per thread that may have begun or be waiting before the oldest one's result is used."""
_HOLE_BYTES_MAX = 1 << 30  # one task's worth of zeroing

T = TypeVar("T")
R = TypeVar("R")
Advance = Callable[[int], None]
Batch = tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What a restore did: bytes of the disk, bytes read from the store, what was zero-filled."""

    size: int
    data: int
    bad: tuple[Extent, ...]


def _ignore(count: int) -> None:
    """Progress nobody looks at."""


def restore(
    image: StoredImage,
    target: Target,
    *,
    salvage: bool = False,
    advance: Advance = _ignore,
) -> Report:
    """Write all of `image` to `target` and finish it. Corrupt, NoSpace, OSError.

    With `salvage` damaged frames become zeros and are listed in the report. `advance` is told
    the bytes of data done since the last call, in the caller's thread.
    """
    keep_freed_blocks()
    reader = _Reader(image, salvage)
    if target.in_order:
        _pour(reader, target, advance)
    else:
        _scatter(reader, target, advance)
    target.finish()
    data = sum(extent.length for extent in image.extents())
    return Report(image.size, data, tuple(merged(reader.bad)))


def damaged(image: StoredImage, *, advance: Advance = _ignore) -> list[Extent]:
    """Read everything; the extents (whole frames, clipped to the size) that cannot be read."""
    bad: list[Extent] = []

    def check(batch: Batch) -> int:
        for extent in batch:
            first = extent.offset // FRAME
            count = -(-extent.end // FRAME) - first
            bad.extend(_frame(number, image.size) for number in image.check(first, count))
        return _length(batch)

    with closing(_in_order(check, batches(image.extents()), THREADS)) as done:
        for count in done:
            advance(count)
    return list(merged(bad))


def batches(extents: Iterable[Extent]) -> Iterator[Batch]:
    """Sorted extents cut at multiples of BATCH; those of one such window form a batch."""
    window: list[Extent] = []
    for extent in extents:
        offset = extent.offset
        while offset < extent.end:
            if window and offset // BATCH != window[0].offset // BATCH:
                yield tuple(window)
                window.clear()
            end = min(extent.end, (offset // BATCH + 1) * BATCH)
            window.append(Extent(offset, end - offset))
            offset = end
    if window:
        yield tuple(window)


class _Buffers:
    """Memory for batches, used again and again; each begins at a page's start."""

    def __init__(self) -> None:
        self._free: deque[memoryview] = deque()

    def take(self) -> memoryview:
        """BATCH bytes of whatever content, the caller's until `give`."""
        try:
            return self._free.pop()
        except IndexError:
            return memoryview(mmap.mmap(-1, BATCH))

    def give(self, buffer: memoryview) -> None:
        """Take a buffer back."""
        self._free.append(buffer)


class _Reader:
    """Reads extents; with `salvage` what is damaged becomes zeros and is remembered in `bad`."""

    def __init__(self, image: StoredImage, salvage: bool) -> None:
        self.image = image
        self.bad: list[Extent] = []
        self._salvage = salvage

    def read(self, extent: Extent, buffer: memoryview) -> memoryview:
        """The bytes of an extent of one batch, at their place in the batch's buffer."""
        start = extent.offset % BATCH
        place = buffer[start : start + extent.length]
        try:
            self.image.read_into(extent.offset, place)
        except Corrupt:
            if not self._salvage:
                raise
            for part in _frames(extent):
                self._read_frame(part, buffer)
        return place

    def _read_frame(self, extent: Extent, buffer: memoryview) -> None:
        start = extent.offset % BATCH
        place = buffer[start : start + extent.length]
        try:
            self.image.read_into(extent.offset, place)
        except Corrupt:
            self.bad.append(extent)
            place[:] = bytes(extent.length)


def _pour(reader: _Reader, target: Target, advance: Advance) -> None:
    buffers = _Buffers()

    def read(batch: Batch) -> tuple[memoryview, list[tuple[Extent, memoryview]]]:
        buffer = buffers.take()
        return buffer, [(extent, reader.read(extent, buffer)) for extent in batch]

    position = 0
    with closing(_in_order(read, batches(reader.image.extents()), THREADS)) as results:
        for buffer, batch in results:
            for extent, data in batch:
                if extent.offset > position:
                    target.zero(position, extent.offset - position)
                target.write(extent.offset, data)
                position = extent.end
                advance(extent.length)
            buffers.give(buffer)
    if position < reader.image.size:
        target.zero(position, reader.image.size - position)


def _scatter(reader: _Reader, target: Target, advance: Advance) -> None:
    buffers = _Buffers()

    def copy(batch: Batch) -> int:
        buffer = buffers.take()
        for extent in batch:
            target.write(extent.offset, reader.read(extent, buffer))
        buffers.give(buffer)
        return _length(batch)

    def blank(extent: Extent) -> int:
        target.zero(extent.offset, extent.length)
        return 0

    image, head = reader.image, target.head_bytes
    target.reserve(image.extents())
    if not target.holes_are_zero:
        _run(blank, _pieces(gaps(image.extents(), image.size)), advance)
    later = (batch for batch in batches(image.extents()) if batch[0].offset >= head)
    _run(copy, later, advance)
    if head:
        target.settle()
        first = (e for e in image.extents() if e.offset < head)
        _run(copy, (b for b in batches(first) if b[0].offset < head), advance)


def _run(function: Callable[[T], int], items: Iterable[T], advance: Advance) -> None:
    with closing(_in_order(function, items, WRITING_THREADS)) as results:
        for count in results:
            advance(count)


def _in_order(
    function: Callable[[T], R], items: Iterable[T], threads: int
) -> Generator[R, None, None]:
    """`function` of each item, computed by `threads` threads, given back in the items' order.

    To be closed: that ends the threads.
    """
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads, "restore") as pool:
        try:
            for item in items:
                # What is logged in there is about the same VM.
                pending.append(pool.submit(copy_context().run, function, item))
                if len(pending) >= _AHEAD * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _frames(extent: Extent) -> Iterator[Extent]:
    """An extent cut at frame borders."""
    offset = extent.offset
    while offset < extent.end:
        end = min(extent.end, (offset // FRAME + 1) * FRAME)
        yield Extent(offset, end - offset)
        offset = end


def _frame(number: int, size: int) -> Extent:
    return Extent(number * FRAME, min(FRAME, size - number * FRAME))


def _pieces(extents: Iterable[Extent]) -> Iterator[Extent]:
    for extent in extents:
        for offset in range(extent.offset, extent.end, _HOLE_BYTES_MAX):
            yield Extent(offset, min(_HOLE_BYTES_MAX, extent.end - offset))


def _length(extents: Sequence[Extent]) -> int:
    return sum(extent.length for extent in extents)
