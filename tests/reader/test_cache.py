from __future__ import annotations

import gc
import itertools
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backyfs.errors import Corrupt
from backyfs.model import FRAME, Extent
from backyfs.reader.cache import Block, CachedImage, FrameCache, ReadAhead
from tests.reader.stores import content


class Bytes:
    """An image in memory that counts how often each frame is read, and can be damaged or slow."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)
        self.reads: list[int] = []
        self.bad: set[int] = set()
        self.gate: threading.Event | None = None
        self.entered = threading.Event()
        self.closed = False

    def read(self, offset: int, length: int) -> bytes:
        assert offset % FRAME == 0
        frames = range(offset // FRAME, -(-(offset + length) // FRAME))
        self.reads += frames
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(10)
        for frame in frames:
            if frame in self.bad:
                raise Corrupt("a test", offset=frame * FRAME, length=FRAME)
        return self._data[offset : offset + length]

    def read_sound(self, offset: int, length: int) -> bytes | None:
        try:
            return self.read(offset, length)
        except Corrupt:
            return None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read(offset, len(buffer))

    def try_read(self, offset: int, length: int) -> bytes | None:
        first, end = offset // FRAME * FRAME, -(-(offset + length) // FRAME) * FRAME
        return None if any(self._data[first:end]) else bytes(length)

    def extents(self) -> Iterator[Extent]:
        yield Extent(0, self.size)

    def raw_fd(self) -> int | None:
        return None

    def hold(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


DATA = content(40, seed=5, tail=1234)


def cached(data: bytes = DATA, bytes_max: int = 64 << 20) -> tuple[Bytes, CachedImage]:
    image = Bytes(data)
    return image, CachedImage(image, "digest", FrameCache(bytes_max))


ranges = st.tuples(st.integers(0, len(DATA)), st.integers(0, 5 * FRAME))


@settings(max_examples=60, deadline=None)
@given(st.lists(ranges, max_size=20), st.sampled_from([1, FRAME, 3 * FRAME, 64 << 20]))
def test_reads_are_the_images_bytes(wanted: list[tuple[int, int]], bytes_max: int) -> None:
    _, image = cached(bytes_max=bytes_max)
    for offset, length in wanted:
        length = min(length, len(DATA) - offset)
        expected = DATA[offset : offset + length]
        assert image.try_read(offset, length) in (None, expected)
        assert image.read_unless_reserved(offset, length) == expected
        assert image.read(offset, length) == expected
        image.prefetch(Extent(offset, length + 1))


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (0, -1), (len(DATA), 1), (0, len(DATA) + 1), (1 << 70, 0)]
)
def test_outside_the_image(offset: int, length: int) -> None:
    _, image = cached()
    for read in (image.read, image.try_read, image.read_unless_reserved):
        with pytest.raises(ValueError, match="outside"):
            read(offset, length)


def test_a_frame_is_decoded_once() -> None:
    source, image = cached()
    for offset in range(0, len(DATA), 4096):
        image.read(offset, min(4096, len(DATA) - offset))
    assert sorted(source.reads) == list(range(41))
    assert image.try_read(0, len(DATA)) == DATA


def test_equal_disks_share_frames() -> None:
    first, second = Bytes(DATA), Bytes(DATA)
    cache = FrameCache()
    CachedImage(first, "same", cache).read(0, FRAME)
    CachedImage(second, "same", cache).read(0, FRAME)
    CachedImage(second, "other", cache).read(FRAME, FRAME)
    assert first.reads == [0]
    assert second.reads == [1]


def test_holes_cost_no_decoding() -> None:
    source, image = cached(bytes(3 * FRAME))
    assert image.try_read(100, 2 * FRAME) == bytes(2 * FRAME)
    assert source.reads == []


def test_bytes_are_bounded() -> None:
    source = Bytes(DATA)
    cache = FrameCache(4 * FRAME)
    image = CachedImage(source, "d", cache)
    for frame in range(40):
        image.read(frame * FRAME, FRAME)
        assert cache.bytes <= 4 * FRAME
    assert image.try_read(39 * FRAME, FRAME) is not None
    assert image.read(0, 20 * FRAME) == DATA[: 20 * FRAME]  # more than fits
    assert cache.bytes <= 4 * FRAME


def test_what_was_used_last_stays() -> None:
    source, image = cached(random.Random(0).randbytes(8 * FRAME), 4 * FRAME)
    image.read(0, FRAME)
    for frame in range(1, 8):
        image.read(frame * FRAME, FRAME)
        image.try_read(0, FRAME)
    assert source.reads.count(0) == 1


def test_many_threads_one_decode() -> None:
    data = random.Random(3).randbytes(8 * FRAME)
    source, image = cached(data)
    source.gate = threading.Event()
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(image.read, 100, 3 * FRAME) for _ in range(8)]
        assert source.entered.wait(10)
        assert image.read_unless_reserved(0, FRAME) is None
        assert image.try_read(0, FRAME) is None
        image.prefetch(Extent(0, FRAME))
        source.gate.set()
        for each in waiting:
            assert each.result(10) == data[100 : 100 + 3 * FRAME]
    assert sorted(source.reads) == [0, 1, 2, 3]


def test_overlapping_readers_do_not_wait_for_each_other() -> None:
    _, image = cached(bytes_max=2 * FRAME)  # so little that frames vanish before waiters see them

    def walk(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            offset = rng.randrange(len(DATA))
            length = min(rng.randrange(6 * FRAME), len(DATA) - offset)
            assert image.read(offset, length) == DATA[offset : offset + length]

    with ThreadPoolExecutor(8) as pool:
        for each in [pool.submit(walk, seed) for seed in range(8)]:
            each.result(60)


def test_an_error_keeps_nothing_that_was_decoded() -> None:
    """Whoever raised it may be kept until garbage is collected, which takes hundreds of errors."""
    source, image = cached(random.Random(3).randbytes(8 * FRAME), bytes_max=FRAME)
    source.bad = {3}
    gc.collect()
    gc.disable()
    try:
        before = _blocks()
        with pytest.raises(Corrupt) as caught:
            image.read(0, 8 * FRAME)
        assert caught.value.offset == 3 * FRAME
        assert _blocks() <= before + 1, "the one that is cached"
    finally:
        gc.enable()


def _blocks() -> int:
    return sum(isinstance(each, Block) for each in gc.get_objects())


def test_damage_is_an_error_for_its_frame_only() -> None:
    source, image = cached()
    source.bad = {5}
    with pytest.raises(Corrupt) as caught:
        image.read(3 * FRAME, 4 * FRAME)
    assert caught.value.offset == 5 * FRAME
    for frame in (3, 4, 6):
        assert image.try_read(frame * FRAME, FRAME) is not None, "the good ones are kept"
    assert image.read(4 * FRAME + 100, FRAME - 100) == DATA[4 * FRAME + 100 : 5 * FRAME]
    image.prefetch(Extent(4 * FRAME, 3 * FRAME))
    source.bad = set()
    assert image.read(5 * FRAME, 10) == DATA[5 * FRAME : 5 * FRAME + 10], "healed meanwhile"


def test_who_waited_for_a_failed_decode_tries_itself() -> None:
    source, image = cached()
    source.gate = threading.Event()
    source.bad = {0}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(image.read, 0, FRAME)
        assert source.entered.wait(10)
        second = pool.submit(image.read, 0, FRAME)
        source.gate.set()
        for each in (first, second):
            with pytest.raises(Corrupt):
                each.result(10)
    assert source.reads == [0, 0]


def test_an_unexpected_failure_leaves_no_reservation(monkeypatch: pytest.MonkeyPatch) -> None:
    source, image = cached()

    def fail(offset: int, length: int) -> bytes:
        raise OSError("a test")

    with monkeypatch.context() as patch:
        patch.setattr(source, "read", fail)
        for _ in range(2):
            with pytest.raises(OSError, match="a test"):
                image.read(0, 3 * FRAME)
    assert image.read(0, 3 * FRAME) == DATA[: 3 * FRAME]


def test_closing_closes_the_image() -> None:
    source, image = cached()
    image.close()
    assert source.closed


# ---- read-ahead ----------------------------------------------------------------------------------

MIB = 1 << 20


def test_no_guess_without_a_proven_sequence() -> None:
    ahead = ReadAhead(1 << 40)
    rng = random.Random(1)
    for _ in range(1000):
        ahead.note(rng.randrange(1 << 28) * 4096, 4096)
        assert ahead.due(4 * MIB, MIB) is None
    for offset in (0, 4096, 8192, 4096, 8192, 16384):
        ahead.note(offset, 4096)
        assert ahead.due(4 * MIB, MIB) is None


@pytest.mark.parametrize("step", [4096, 128 * 1024, MIB])
def test_a_sequence_is_prefetched_once_and_not_too_far(step: int) -> None:
    size = 40 * MIB + 5
    ahead = ReadAhead(size)
    wanted: list[Extent] = []
    for offset in range(0, size, step):
        length = min(step, size - offset)
        ahead.note(offset, length)
        while (found := ahead.due(4 * MIB, MIB)) is not None:
            assert offset + length <= found.offset < found.end <= offset + length + 4 * MIB
            wanted.append(found)
    for before, after in itertools.pairwise(wanted):
        assert after.offset == before.end
    assert wanted[-1].end == size
    assert wanted[0].offset <= 4 * step


def test_far_ahead_only_after_much_was_read() -> None:
    ahead = ReadAhead(1 << 40)
    start = 77 * MIB
    for index in range(40):
        ahead.note(start + index * MIB, MIB)
        read = (index + 1) * MIB
        while (found := ahead.due(16 * MIB, MIB)) is not None:
            assert found.end <= start + read + max(4 * MIB, min(read, 16 * MIB))
    assert ahead.due(17 * MIB, MIB) == Extent(start + 56 * MIB, MIB)


def test_a_jump_ends_the_sequence() -> None:
    ahead = ReadAhead(1 << 40)
    for index in range(8):
        ahead.note(index * MIB, MIB)
    assert ahead.due(4 * MIB, MIB)
    for offset in (0, MIB):
        ahead.note(offset, MIB)
        assert ahead.due(4 * MIB, MIB) is None


def test_a_hole_that_is_left_out_belongs_to_the_sequence() -> None:
    ahead = ReadAhead(1 << 40)
    for index in range(8):
        ahead.note(index * MIB, MIB)
    assert ahead.due(4 * MIB, MIB) == Extent(8 * MIB, MIB)
    ahead.skip(20 * MIB)
    assert ahead.note(20 * MIB, MIB)
    assert ahead.due(4 * MIB, MIB) == Extent(21 * MIB, MIB)
    assert not ahead.note(30 * MIB, MIB)


@pytest.mark.parametrize("window", [0, FRAME, MIB])
def test_a_small_window_is_respected(window: int) -> None:
    ahead = ReadAhead(1 << 40)
    for index in range(8):
        ahead.note(index * MIB, MIB)
    found = ahead.due(window, MIB)
    assert found == (Extent(8 * MIB, window) if window else None)
    assert ahead.due(window, MIB) is None
