"""Decoded frames, kept for all open images of the process and bounded in bytes.

A block is what one read of the store decoded: a few consecutive frames. Blocks are found by the
disk's digest, so equal disks (an unchanged one in the next revision, a re-opened one) share them.

Invariants: a frame is decoded by one thread at a time, however many want it; the thread that
reserved a frame decodes it itself and gives the reservation back whatever happens, before it waits
for frames of others: so no two threads ever wait for each other; cached bytes never exceed
`bytes_max`.

Synchronous and safe from many threads; knows no trio.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from backyfs.errors import Corrupt
from backyfs.model import FRAME, Extent
from backyfs.store.contract import Buffer, Image

CACHE_BYTES_MAX = 64 << 20
_BLOCK_FRAMES_MAX = 16
"""1 MiB: what the kernel asks for at once; more would only raise the peak of memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Decoded bytes of consecutive frames from number `first`; the last one may be partial."""

    disk: str
    first: int
    data: Buffer

    @property
    def frames(self) -> range:
        """The numbers of its frames."""
        return range(self.first, self.first - (-len(self.data) // FRAME))


class FrameCache:
    """An LRU of blocks. Frames are named by (digest of the disk, number).

    `room` gives memory of a length, for a block that is decoded next.
    """

    def __init__(
        self,
        bytes_max: int = CACHE_BYTES_MAX,
        room: Callable[[int], memoryview] = lambda length: memoryview(bytearray(length)),
    ) -> None:
        self.room = room
        self._bytes_max = bytes_max
        self._bytes = 0
        self._blocks: OrderedDict[Block, None] = OrderedDict()
        self._index: dict[tuple[str, int], Block] = {}
        self._reserved: set[tuple[str, int]] = set()
        self._changed = threading.Condition(threading.Lock())
        self._waiters = 0

    @property
    def bytes(self) -> int:
        """Bytes of all blocks."""
        return self._bytes

    @property
    def bytes_max(self) -> int:
        """The bound of `bytes`."""
        return self._bytes_max

    def one(self, disk: str, frame: int) -> Block | None:
        """The block that holds a frame; None if it is not there."""
        with self._changed:
            block = self._index.get((disk, frame))
            if block is not None:
                self._blocks.move_to_end(block)
            return block

    def found(self, disk: str, frames: range) -> list[Block] | None:
        """The blocks that hold all of `frames`, in order; None if a frame is not there."""
        blocks: list[Block] = []
        with self._changed:
            for frame in frames:
                block = self._index.get((disk, frame))
                if block is None:
                    return None
                if not blocks or blocks[-1] is not block:
                    self._blocks.move_to_end(block)
                    blocks.append(block)
        return blocks

    def reserve(self, disk: str, frames: range, have: dict[int, Block]) -> list[int]:
        """Add what is there to `have`; reserve for the caller, and return, what nobody decodes."""
        mine: list[int] = []
        with self._changed:
            for frame in frames:
                if frame in have:
                    continue
                key = (disk, frame)
                block = self._index.get(key)
                if block is not None:
                    self._blocks.move_to_end(block)
                    have[frame] = block
                elif key not in self._reserved:
                    self._reserved.add(key)
                    mine.append(frame)
        return mine

    def put(self, block: Block) -> None:
        """Keep a block whose frames the caller had reserved; that ends the reservation."""
        with self._changed:
            for frame in block.frames:
                key = (block.disk, frame)
                self._index[key] = block
                self._reserved.discard(key)
            self._blocks[block] = None
            self._bytes += len(block.data)
            while self._bytes > self._bytes_max:
                self._drop(self._blocks.popitem(last=False)[0])
            if self._waiters:
                self._changed.notify_all()

    def _drop(self, block: Block) -> None:
        self._bytes -= len(block.data)
        for frame in block.frames:
            if self._index.get((block.disk, frame)) is block:
                del self._index[block.disk, frame]

    def give_back(self, disk: str, frames: Iterable[int]) -> None:
        """End the caller's reservations of frames it did not decode."""
        with self._changed:
            self._reserved.difference_update((disk, frame) for frame in frames)
            if self._waiters:
                self._changed.notify_all()

    def wait(self, disk: str, frames: range) -> None:
        """Until nobody holds a reservation of any of `frames`."""
        with self._changed:
            self._waiters += 1
            try:
                self._changed.wait_for(
                    lambda: not any((disk, frame) in self._reserved for frame in frames)
                )
            finally:
                self._waiters -= 1


class CachedImage:
    """An image (contract.Image) whose frames are decoded once and kept. Owns no descriptor."""

    def __init__(self, image: Image, digest: str, cache: FrameCache) -> None:
        self._image, self._disk, self._cache = image, digest, cache
        self._size = image.size

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._size

    def extents(self) -> Iterator[Extent]:
        """As the image's."""
        return self._image.extents()

    def raw_fd(self) -> int | None:
        """None: the bytes are decoded."""
        return None

    def close(self) -> None:
        """Close the image; its frames stay in the cache."""
        self._image.close()

    def try_read(self, offset: int, length: int) -> Buffer | None:
        """The bytes if they are cached or a hole, else None; never blocks."""
        frames = self._frames(offset, length)
        if len(frames) == 1:  # a small read: the usual case of a guest's file system
            block = self._cache.one(self._disk, frames[0])
            if block is None:
                return self._image.try_read(offset, length)
            start = offset - block.first * FRAME
            return block.data[start : start + length]
        blocks = self._cache.found(self._disk, frames)
        if blocks is None:
            return self._image.try_read(offset, length)
        return _assembled(blocks, offset, length)

    def read(self, offset: int, length: int) -> Buffer:
        """Exactly `length` bytes. ValueError outside the image; Corrupt when a frame is damaged."""
        frames = self._frames(offset, length)
        have: dict[int, Block] = {}
        self._fill(frames, have)
        while len(have) < len(frames):
            self._cache.wait(self._disk, frames)
            self._fill(frames, have)
        return _assembled(_in_order(frames, have), offset, length)

    def read_unless_reserved(self, offset: int, length: int) -> Buffer | None:
        """As `read`, but None where that may take long: a thread decodes the same frames, or they
        are damaged, which is to be recorded.
        """
        frames = self._frames(offset, length)
        have: dict[int, Block] = {}
        self._fill(frames, have, quiet=True)
        if len(have) < len(frames):
            return None
        return _assembled(_in_order(frames, have), offset, length)

    def prefetch(self, extent: Extent) -> None:
        """Decode what is missing of an extent (clipped to the image) and waits for nobody.

        Damage is left for the read that really wants the frame.
        """
        end = min(extent.end, self._size)
        if extent.offset < end:
            with contextlib.suppress(Corrupt):
                self._fill(self._frames(extent.offset, end - extent.offset), {})

    def _frames(self, offset: int, length: int) -> range:
        if offset < 0 or length < 0 or offset + length > self._size:
            raise ValueError(f"bytes {offset}+{length} lie outside the disk's {self._size}")
        if not length:
            return range(0)
        return range(offset // FRAME, -(-(offset + length) // FRAME))

    def _fill(self, frames: range, have: dict[int, Block], *, quiet: bool = False) -> None:
        """Add to `have` what is cached, and what is not and nobody else decodes.

        Corrupt: then `have` is empty, lest the error's frames keep it. `quiet`: what is damaged is
        left out.
        """
        mine = self._cache.reserve(self._disk, frames, have)
        if not mine:
            return
        error: Corrupt | None = None
        try:
            for first, count in _runs(mine):
                error = self._decode(first, count, have, quiet) or error
        finally:
            undone = [frame for frame in mine if frame not in have]
            if undone:
                self._cache.give_back(self._disk, undone)
        if error is not None:
            have.clear()
            try:
                raise _bare(error)
            finally:
                del error  # it refers to this frame

    def _decode(
        self, first: int, count: int, have: dict[int, Block], quiet: bool
    ) -> Corrupt | None:
        """Decode a run into `have`; an error after all good frames of the run were kept."""
        try:
            data = self._read(first, count, quiet)
        except Corrupt as exc:
            if count == 1:
                return exc
            errors = [self._decode(first + index, 1, have, quiet) for index in range(count)]
            try:
                return next((error for error in errors if error is not None), None)
            finally:
                errors.clear()  # they refer to this frame
        if data is None:
            return None
        block = Block(self._disk, first, data)
        self._cache.put(block)
        for frame in block.frames:
            have[frame] = block
        return None

    def _read(self, first: int, count: int, quiet: bool) -> Buffer | None:
        offset = first * FRAME
        length = min(count * FRAME, self._size - offset)
        if quiet:
            return self._image.read_sound(offset, length)
        if count == 1:
            return self._image.read(offset, length)
        hole = self._image.try_read(offset, length)
        if hole is not None:
            return hole
        data = self._cache.room(length)
        self._image.read_into(offset, data)
        return data.toreadonly()


def _bare(error: Corrupt) -> Corrupt:
    """The error alone: frames that it refers to have what was decoded.

    Who keeps it would keep that, and trio keeps what a thread raised until garbage is collected.
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _runs(frames: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Sorted frame numbers as (first, count) of consecutive ones, bounded in length."""
    first = count = 0
    for frame in frames:
        if count and frame == first + count and count < _BLOCK_FRAMES_MAX:
            count += 1
            continue
        if count:
            yield first, count
        first, count = frame, 1
    if count:
        yield first, count


def _in_order(frames: range, have: dict[int, Block]) -> list[Block]:
    blocks: list[Block] = []
    for frame in frames:
        block = have[frame]
        if not blocks or blocks[-1] is not block:
            blocks.append(block)
    return blocks


def _assembled(blocks: list[Block], offset: int, length: int) -> Buffer:
    """Bytes [offset, offset + length) of consecutive blocks; no copy when they are one block's."""
    if not blocks:
        return b""
    if len(blocks) == 1:
        start = offset - blocks[0].first * FRAME
        return blocks[0].data[start : start + length]
    parts: list[memoryview] = []
    end = offset + length
    for block in blocks:
        base = block.first * FRAME
        stop = min(end, base + len(block.data))
        parts.append(memoryview(block.data)[offset - base : stop - base])
        offset = stop
    return b"".join(parts)


_PROVEN = 3
_PIECES_MIN = 4


class ReadAhead:
    """Tells from the reads of one handle what to decode next; one per handle.

    Nothing before three reads that each began where the one before ended: a guess at a random
    reader's next read costs it more than it can gain. One thread notes; any may ask what is due.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._began = self._position = 0
        self._sequential = 0
        self._horizon = 0

    def note(self, offset: int, length: int) -> bool:
        """`length` bytes at `offset` are being read; whether that is part of a sequence."""
        with self._lock:
            if offset == self._position:
                self._sequential += 1
            else:
                self._sequential = self._horizon = 0
                self._began = offset
            self._position = offset + length
            return self._sequential > _PROVEN

    def skip(self, offset: int) -> None:
        """The reader leaves out what lies before `offset`, a hole: a sequence goes on there."""
        with self._lock:
            self._began += offset - self._position
            self._position = offset

    def due(self, window: int, piece: int) -> Extent | None:
        """What to decode now, to be up to `window` bytes ahead; it counts as done from here on.

        At most `piece` bytes; None while there is no room for them. Where reads are as long as a
        piece, each finds all it needs in one. More than a few pieces ahead only as far as was read
        in sequence before: who stops has cost no more than was of use.
        """
        piece = min(piece, window)
        with self._lock:
            if self._sequential <= _PROVEN or piece <= 0:
                return None
            window = min(window, max(_PIECES_MIN * piece, self._position - self._began))
            start = max(self._horizon, self._position)
            stop = min(start + piece, self._size)
            if stop <= start or start - self._position > window - piece:
                return None
            self._horizon = stop
            return Extent(start, stop - start)
