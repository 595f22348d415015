"""The stream that `rbd import-diff` takes, version 1, made from two revisions.

Its format is Ceph's (doc/dev/rbd-diff.rst): the line "rbd diff v1", then records of one letter and
little-endian integers: `f` and `t` name the snapshot to start from and the one to make at the end
(32-bit length, name), `s` the size (64 bit), `w` data (offset, length, bytes), `z` zeros (offset,
length), `e` the end. Without its end a stream is refused, though what came before it was applied.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

from backyfs.allocator import keep_freed_blocks
from backyfs.model import Extent
from backyfs.restore.difference import Change
from backyfs.restore.reading import Advance, Buffers, Reader, batches, ignore, in_order
from backyfs.restore.target import Target
from backyfs.store.contract import StoredImage

HEADER = b"rbd diff v1\n"
_END = b"e"
_ZERO_BYTES_MAX = 1 << 30  # librbd takes less than 2 GiB in one call


@dataclass(frozen=True, slots=True)
class Names:
    """Snapshots of the target: the one it must have, the one it gets; "" = none."""

    start: str
    end: str


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What a stream holds: bytes of data, bytes of zeros, and its length."""

    data: int
    zeros: int
    length: int


def write(
    image: StoredImage,
    changes: Iterable[Change],
    names: Names,
    target: Target,
    *,
    advance: Advance = ignore,
) -> StreamReport:
    """Write the stream that applies `changes`, whose bytes are `image`'s, and finish `target`.

    `advance` is told the bytes of data done. Corrupt, NoSpace, OSError.
    """
    keep_freed_blocks()
    out = _Writer(target)
    out.put(_preamble(names, image.size))
    data = zeros = 0
    buffers, reader = Buffers(), Reader(image)

    def read(change: Change) -> tuple[Change, memoryview, memoryview]:
        buffer = buffers.take()
        return change, buffer, buffer[:0] if change.zero else reader.read(change.extent, buffer)

    with closing(in_order(read, _pieces(changes))) as results:
        for change, buffer, content in results:
            out.put(struct.pack("<cQQ", b"z" if change.zero else b"w", *change.extent))
            out.put(content)
            buffers.give(buffer)
            data += len(content)
            zeros += change.extent.length if change.zero else 0
            advance(len(content))
    out.put(_END)
    target.finish()
    return StreamReport(data, zeros, out.position)


def _preamble(names: Names, size: int) -> bytes:
    snapshots = b"".join([*_named(b"f", names.start), *_named(b"t", names.end)])
    return HEADER + snapshots + struct.pack("<cQ", b"s", size)


def _named(kind: bytes, name: str) -> Iterator[bytes]:
    if name:
        yield struct.pack("<cI", kind, len(name.encode())) + name.encode()


def _pieces(changes: Iterable[Change]) -> Iterator[Change]:
    """Changes cut to what one task reads, or librbd zeroes, at once."""
    for extent, zero in changes:
        if zero:
            for offset in range(extent.offset, extent.end, _ZERO_BYTES_MAX):
                yield Change(Extent(offset, min(_ZERO_BYTES_MAX, extent.end - offset)), True)
        else:
            yield from (Change(piece, False) for batch in batches([extent]) for piece in batch)


class _Writer:
    """Writes to a target one byte after the other."""

    def __init__(self, target: Target) -> None:
        self.position = 0
        self._target = target

    def put(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        if data:
            self._target.write(self.position, memoryview(data))
            self.position += len(data)
