"""Moving an image's bytes into a target.

Random-access targets are written by the reading threads in any order; a stream is written by the
caller's thread, so that a signal can end a write that blocks. All threads are joined before a
call returns or raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

from backyfs.allocator import keep_freed_blocks
from backyfs.extents import before, behind, gaps, merged
from backyfs.model import FRAME, Extent
from backyfs.restore.reading import (
    Advance,
    Batch,
    Buffers,
    Reader,
    Room,
    anonymous,
    batches,
    ignore,
    in_order,
    length_of,
)
from backyfs.restore.target import Target
from backyfs.store.contract import StoredImage

_HOLE_BYTES_MAX = 1 << 30  # one task's worth of zeroing

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Report:
    """What a restore did: bytes of the disk, bytes read from the store, what was zero-filled."""

    size: int
    data: int
    bad: tuple[Extent, ...]


def restore(
    image: StoredImage,
    target: Target,
    *,
    salvage: bool = False,
    advance: Advance = ignore,
    room: Room = anonymous,
) -> Report:
    """Write all of `image` to `target` and finish it. Corrupt, NoSpace, OSError.

    With `salvage` damaged frames become zeros and are listed in the report. `room`: what to read
    into (decoding.py). `advance` is told the bytes of data done since the last call, in the
    caller's thread.
    """
    keep_freed_blocks()
    reader = Reader(image, salvage)
    if target.in_order:
        _pour(reader, target, advance, Buffers(room=room))
    else:
        _scatter(reader, target, advance, Buffers(target.batch_bytes, room))
    target.finish()
    return Report(image.size, image.data, tuple(merged(reader.bad)))


def damaged(image: StoredImage, *, advance: Advance = ignore) -> list[Extent]:
    """Read everything; the extents (whole frames, clipped to the size) that cannot be read."""
    bad: list[Extent] = []

    def check(batch: Batch) -> int:
        for extent in batch:
            first = extent.offset // FRAME
            count = -(-extent.end // FRAME) - first
            bad.extend(_frame(number, image.size) for number in image.check(first, count))
        return length_of(batch)

    with closing(in_order(check, batches(image.extents()))) as done:
        for count in done:
            advance(count)
    return list(merged(bad))


def _pour(reader: Reader, target: Target, advance: Advance, buffers: Buffers) -> None:
    def read(batch: Batch) -> tuple[memoryview, list[tuple[Extent, memoryview]]]:
        buffer = buffers.take()
        return buffer, [(extent, reader.read(extent, buffer)) for extent in batch]

    position = 0
    with closing(in_order(read, batches(reader.image.extents()))) as results:
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


def _scatter(reader: Reader, target: Target, advance: Advance, buffers: Buffers) -> None:
    def copy(batch: Batch) -> int:
        buffer = buffers.take()
        for extent in batch:
            target.write(extent.offset, reader.read(extent, buffer))
        buffers.give(buffer)
        return length_of(batch)

    def blank(extent: Extent) -> int:
        target.zero(extent.offset, extent.length)
        return 0

    def run(function: Callable[[T], int], items: Iterable[T]) -> None:
        with closing(in_order(function, items, target.writers)) as results:
            for count in results:
                advance(count)

    image, head = reader.image, target.head_bytes
    target.reserve(image.extents())
    if not target.holes_are_zero:
        run(blank, _pieces(gaps(image.extents(), image.size)))
    run(copy, batches(behind(image.extents(), head), target.batch_bytes))
    if head:
        target.settle()
        run(copy, batches(before(image.extents(), head), target.batch_bytes))


def _frame(number: int, size: int) -> Extent:
    return Extent(number * FRAME, min(FRAME, size - number * FRAME))


def _pieces(extents: Iterable[Extent]) -> Iterator[Extent]:
    for extent in extents:
        for offset in range(extent.offset, extent.end, _HOLE_BYTES_MAX):
            yield Extent(offset, min(_HOLE_BYTES_MAX, extent.end - offset))
