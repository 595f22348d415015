"""An image in memory that keeps the contract of stored ones, damage included."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

from hypothesis import strategies as st

from backyfs.errors import Corrupt
from backyfs.extents import merged
from backyfs.model import FRAME, Extent
from backyfs.store.cow.blocks import frame_hashes
from backyfs.store.digest import FAN_OUT, HASH, node


class MemoryImage:
    """`content` as an image; `filled` are extents that are no holes, `bad` unreadable frames."""

    def __init__(self, content: bytes, filled: Iterable[Extent], bad: Iterable[int] = ()) -> None:
        self.content = content
        self.filled = list(merged(filled))
        self.bad = frozenset(bad)

    @property
    def size(self) -> int:
        return len(self.content)

    def read(self, offset: int, length: int) -> bytes:
        if not 0 <= offset <= offset + length <= self.size:
            raise ValueError(f"{length} bytes at {offset} of {self.size}")
        for number in sorted(self.bad):
            if number * FRAME < offset + length and offset < (number + 1) * FRAME:
                raise Corrupt("test", offset=number * FRAME, length=FRAME)
        return self.content[offset : offset + length]

    def read_sound(self, offset: int, length: int) -> bytes | None:
        return None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read(offset, len(buffer))

    def try_read(self, offset: int, length: int) -> bytes | None:
        return None

    def extents(self) -> Iterator[Extent]:
        return iter(self.filled)

    def raw_fd(self) -> int | None:
        return None

    def hold(self) -> None:
        pass

    def close(self) -> None:
        pass

    @property
    def digest(self) -> str:
        return ""

    @property
    def data(self) -> int:
        return sum(extent.length for extent in self.extents())

    def hashes(self, first: int, count: int) -> bytes:
        return frame_hashes(self.content[first * FRAME : (first + count) * FRAME])

    def groups(self) -> bytes:
        hashes = self.hashes(0, -(-self.size // FRAME))
        step = FAN_OUT * HASH
        return b"".join(node(hashes[at : at + step]) for at in range(0, len(hashes), step))

    def check(self, first: int, count: int) -> list[int]:
        return [number for number in range(first, first + count) if number in self.bad]

    def check_all(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        return [number for first, count in ranges for number in self.check(first, count)]

    def shared_with(self, other: object) -> bool:
        return self is other

    def salvaged(self) -> bytes:
        """What a salvaging restore makes of it."""
        content = bytearray(self.content)
        for number in self.bad:
            end = min((number + 1) * FRAME, self.size)
            content[number * FRAME : end] = bytes(end - number * FRAME)
        return bytes(content)


def made(size: int, frames: Iterable[int], bad: Iterable[int] = (), seed: int = 0) -> MemoryImage:
    """An image of `size` bytes with random data in these frames and holes elsewhere."""
    rng = random.Random(seed)
    content = bytearray(size)
    extents = []
    for number in frames:
        offset, length = number * FRAME, min(FRAME, size - number * FRAME)
        content[offset : offset + length] = rng.randbytes(length)
        extents.append(Extent(offset, length))
    return MemoryImage(bytes(content), extents, bad)


@st.composite
def images(draw: st.DrawFn, *, damaged: bool = False) -> MemoryImage:
    """Images of up to 5 MiB, of any size, with data and holes in every arrangement."""
    size = draw(st.integers(0, 5 << 20) | st.sampled_from([0, 1, 511, FRAME, 2 << 20, 4 << 20]))
    count = -(-size // FRAME)
    run = st.tuples(st.integers(0, max(0, count - 1)), st.integers(1, 40))
    runs = draw(st.lists(run, max_size=5 if count else 0))
    frames = sorted({n for first, length in runs for n in range(first, min(first + length, count))})
    bad = draw(st.sets(st.sampled_from(frames), max_size=4)) if frames and damaged else set()
    return made(size, frames, bad, seed=draw(st.integers(0, 3)))
