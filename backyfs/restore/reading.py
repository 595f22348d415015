"""Reading a stored image in batches, by threads, in bounded memory.

A few batches of some MiB each are in memory. All threads are joined when a generator
of `in_order` is closed.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from backyfs import signals
from backyfs.errors import Corrupt
from backyfs.model import FRAME, Extent
from backyfs.restore.target import BATCH_BYTES
from backyfs.store.contract import StoredImage

BATCH = BATCH_BYTES
"""Bytes of image one task covers, unless a target wants more."""

THREADS = 2
"""Decoding keeps that many busy."""
_AHEAD = 3
"""Tasks per thread that may have begun or be waiting before the oldest one's result is used."""

T = TypeVar("T")
R = TypeVar("R")
Advance = Callable[[int], None]
Batch = tuple[Extent, ...]


def ignore(count: int) -> None:
    """Progress nobody looks at."""


def batches(extents: Iterable[Extent], bytes_max: int = BATCH) -> Iterator[Batch]:
    """Sorted extents cut at multiples of `bytes_max`; those of one such window form a batch."""
    window: list[Extent] = []
    for extent in extents:
        offset = extent.offset
        while offset < extent.end:
            if window and offset // bytes_max != window[0].offset // bytes_max:
                yield tuple(window)
                window.clear()
            end = min(extent.end, (offset // bytes_max + 1) * bytes_max)
            window.append(Extent(offset, end - offset))
            offset = end
    if window:
        yield tuple(window)


def length_of(extents: Sequence[Extent]) -> int:
    """Bytes of all of them."""
    return sum(extent.length for extent in extents)


Room = Callable[[int], memoryview]
"""Makes so many bytes of memory, which begin at a page's start."""


def anonymous(length: int) -> memoryview:
    """Memory of this process."""
    return memoryview(mmap.mmap(-1, length))


class Buffers:
    """Memory for batches, used again and again; each begins at a page's start."""

    def __init__(self, length: int = BATCH, room: Room = anonymous) -> None:
        self._length, self._room = length, room
        self._free: deque[memoryview] = deque()

    def take(self) -> memoryview:
        """`length` bytes of whatever content, the caller's until `give`."""
        try:
            return self._free.pop()
        except IndexError:
            return self._room(self._length)

    def give(self, buffer: memoryview) -> None:
        """Take a buffer back."""
        self._free.append(buffer)


class Reader:
    """Reads extents; with `salvage` what is damaged becomes zeros and is remembered in `bad`."""

    def __init__(self, image: StoredImage, salvage: bool = False) -> None:
        self.image = image
        self.bad: list[Extent] = []
        self._salvage = salvage

    def read(self, extent: Extent, buffer: memoryview) -> memoryview:
        """The bytes of an extent of one batch, at their place in the batch's buffer."""
        start = extent.offset % len(buffer)
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
        start = extent.offset % len(buffer)
        place = buffer[start : start + extent.length]
        try:
            self.image.read_into(extent.offset, place)
        except Corrupt:
            self.bad.append(extent)
            place[:] = bytes(extent.length)


def in_order(
    function: Callable[[T], R], items: Iterable[T], threads: int = THREADS
) -> Generator[R, None, None]:
    """`function` of each item, computed by `threads` threads, given back in the items' order.

    To be closed: that ends the threads.
    """
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads, "restore") as pool:
        try:
            for item in items:
                # None may come between a thread's start and the pool's knowing of it: nobody would
                # wait for its end. What is logged in there is about the same VM.
                with signals.held():
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
