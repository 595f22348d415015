"""The sample: which frames are drawn, how many, and what is made of them."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import pytest
import trio
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from backyfs.engine import sampling as module
from backyfs.engine.progress import QUIET
from backyfs.engine.sampling import Believed, Runs, Sampled, Sampling, sample
from backyfs.extents import joined, whole_frames
from backyfs.model import FRAME, Extent
from backyfs.store.digest import ZERO_HASH

_DATA = b"data" * (FRAME // 4)
_HASH = blake3(_DATA).digest()


class Image:
    """A disk with the same bytes in all frames that hold data (numbers [first, end), sorted)."""

    def __init__(self, size: int, data: Iterable[tuple[int, int]]) -> None:
        self.size, self._data = size, list(data)

    def extents(self) -> Iterator[Extent]:
        for first, end in self._data:
            yield Extent(first * FRAME, min(end * FRAME, self.size) - first * FRAME)

    def hashes(self, first: int, count: int) -> bytes:
        assert 0 <= first < first + count <= -(-self.size // FRAME)
        return b"".join(self._hash(number) for number in range(first, first + count))

    def _hash(self, number: int) -> bytes:
        if not self.holds(number):
            return ZERO_HASH
        length = min(FRAME, self.size - number * FRAME)
        return _HASH if length == FRAME else blake3(_DATA[:length].ljust(FRAME, b"\0")).digest()

    def holds(self, number: int) -> bool:
        return any(first <= number < end for first, end in self._data)


class Disk:
    """The source of an image; frames in `otherwise` are not as in the image."""

    def __init__(self, image: Image, otherwise: Iterable[int] = ()) -> None:
        self.image, self.otherwise = image, frozenset(otherwise)
        self.read_frames: list[int] = []

    def read(self, offset: int, length: int) -> bytes:
        assert offset % FRAME == 0
        numbers = range(offset // FRAME, -(-(offset + length) // FRAME))
        self.read_frames += numbers
        return b"".join(self._frame(number) for number in numbers)[:length]

    def _frame(self, number: int) -> bytes:
        return _DATA if self.image.holds(number) != (number in self.otherwise) else bytes(FRAME)


def believed(image: Image, disk: Disk, listed: Sequence[Extent] = ()) -> Believed:
    return Believed("disk", image, disk, listed)  # type: ignore[arg-type]


def drawn(
    image: Image, listed: Sequence[Extent] = (), otherwise: Iterable[int] = (), **how: object
) -> tuple[Sampled, list[int]]:
    """What a sample showed, and the frames it read."""
    disk = Disk(image, otherwise)
    seed = how.pop("seed", 1)
    setting = Sampling(rng=random.Random(seed), **how)  # type: ignore[arg-type]
    found = trio.run(partial(sample, [believed(image, disk, listed)], setting, QUIET))
    return found, disk.read_frames


def runs_of(numbers: Iterable[int]) -> list[Extent]:
    return list(joined(Extent(number * FRAME, FRAME) for number in sorted(numbers)))


# Which frames


frames = st.sets(st.integers(0, 59))


@settings(deadline=None)
@given(
    st.integers(1, 60 * FRAME),
    frames,
    frames,
    st.floats(0, 1),
    st.integers(0, 1 << 64),
    st.sampled_from([1, 7, 1 << 17]),
)
def test_candidates_only_each_once_and_as_many_as_asked_for(
    size: int, data: set[int], listed: set[int], share: float, seed: int, granules: int
) -> None:
    """Against a model that makes lists."""
    count = -(-size // FRAME)
    image = Image(size, [(number, number + 1) for number in sorted(data) if number < count])
    told = list(whole_frames(runs_of(listed), size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FRAMES_MIN", 3)
        patch.setattr(module, "GRANULES", granules)
        found, read = drawn(image, told, share=share, seed=seed)
    unread = set(range(count)) - listed
    assert set(read) <= unread
    assert len(read) == len(set(read)) == found.frames
    setting = Sampling(share=share)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FRAMES_MIN", 3)
        held = setting.quota(len(unread & data))
        zero = setting.quota(len(unread - data), held)
    assert sum(number in data for number in read) == held
    assert sum(number not in data for number in read) == zero
    assert found.compared_bytes == sum(min(FRAME, size - number * FRAME) for number in read)
    assert not found.wrong_frames


def test_every_candidate_is_as_likely_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FRAMES_MIN", 1)
    image = Image(400 * FRAME, [(20, 150), (300, 370)])
    listed = runs_of([*range(40, 60), *range(310, 330), 399])
    candidates = [*range(20, 40), *range(60, 150), *range(300, 310), *range(330, 370)]
    disk = Disk(image)
    counts: Counter[int] = Counter()
    for seed in range(1500):
        draw = module._draws([believed(image, disk, listed)], Sampling(share=0.1))[0]
        for _, job in draw.batches(random.Random(seed)):
            counts.update(job.args[0])  # type: ignore[attr-defined]
    assert counts.keys() == set(candidates)
    expected = 1500 * 16 / len(candidates)
    spread = (expected * 0.9) ** 0.5
    assert all(abs(counts[number] - expected) < 5 * spread for number in candidates)


@pytest.mark.parametrize(
    ("share", "candidates", "other", "quota"),
    [
        (0.01, 0, None, 0),
        (0.01, 500, None, 500),
        (0.01, 50_000, None, 1024),
        (0.01, 1_000_000, None, 10_000),
        (0.01, 1_000_001, None, 10_001),
        (0.0, 1_000_000, None, 0),
        (1.0, 1_000_000, None, 1_000_000),
        (0.01, 10**9, 20_000, 20_000),
        (0.01, 10**9, 0, 1024),
        (0.01, 500, 20_000, 500),
        (1.0, 10**9, 5, 10**9),
    ],
)
def test_how_many(share: float, candidates: int, other: int | None, quota: int) -> None:
    assert Sampling(share=share).quota(candidates, other) == quota


def test_runs_tell_frames_by_rank() -> None:
    runs = Runs([Extent(FRAME, 2 * FRAME), Extent(5 * FRAME, 100)], 5 * FRAME + 100)
    assert (runs.frames, runs.span) == (3, 3)
    assert [runs[rank] for rank in range(3)] == [1, 2, 5]


def test_runs_of_a_large_disk_have_gaps_in_them() -> None:
    size = 4 * module.GRANULES * FRAME  # a granule is four frames
    runs = Runs([Extent(9 * FRAME, FRAME), Extent(17 * FRAME, 2 * FRAME)], size)
    assert (runs.frames, runs.span) == (3, 8)
    assert [runs[rank] for rank in range(8)] == [8, 9, 10, 11, 16, 17, 18, 19]


# What it finds


def test_a_frame_that_differs_is_wrong() -> None:
    image = Image(100 * FRAME, [(0, 50)])
    found, _ = drawn(image, otherwise=[7, 70], share=1.0)
    assert found.wrong_frames == 2
    lost, new = sorted(found.wrong, key=lambda wrong: wrong.extent)
    assert (lost.extent, lost.stored, lost.source) == (
        Extent(7 * FRAME, FRAME),
        _HASH.hex(),
        ZERO_HASH.hex(),
    )
    assert (new.extent, new.stored, new.content) == (
        Extent(70 * FRAME, FRAME),
        ZERO_HASH.hex(),
        _DATA,
    )


def test_what_is_kept_is_bounded() -> None:
    image = Image(2000 * FRAME, [(0, 2000)])
    found, _ = drawn(image, otherwise=range(1500), share=1.0)
    assert found.wrong_frames == 1500
    assert len(found.wrong) == module.KEPT_MAX
    assert [bool(wrong.content) for wrong in found.wrong] == [True] * 16 + [False] * 48


class Unstable(Disk):
    """Reads a frame differently the first time."""

    def _frame(self, number: int) -> bytes:
        first = self.read_frames.count(number) == 1
        return bytes(FRAME) if number == 5 and first else super()._frame(number)


def test_a_source_that_changes_its_mind_is_no_proof() -> None:
    image = Image(10 * FRAME, [(0, 10)])
    disks = [believed(image, Unstable(image))]
    found = trio.run(partial(sample, disks, Sampling(share=1.0), QUIET))
    assert (found.unstable, found.wrong_frames, found.wrong) == (1, 0, [])


def caught(image: Image, listed: Sequence[Extent], otherwise: range) -> float:
    """How often the usual sample finds that frames were left out of the change list."""
    runs = 40
    hits = sum(
        drawn(image, listed, otherwise, seed=seed)[0].wrong_frames > 0 for seed in range(runs)
    )
    return hits / runs


def test_the_usual_sample_finds_what_ceph_lost() -> None:
    """28 MiB that became zero in a disk of 6 GiB: 448 frames of 100,000, of which 1024 are read."""
    image = Image(100_000 * FRAME, [(0, 100_000)])
    assert caught(image, [], range(40_000, 40_448)) > 0.95


def test_the_sample_is_not_spent_on_what_was_read() -> None:
    """90 % of the disk was read. Of 30 lost frames among the rest, a sample of all frames would
    find one in 27 % of the cases; that of the others does in 96 %.
    """
    image = Image(100_000 * FRAME, [(0, 100_000)])
    listed = [Extent(0, 90_000 * FRAME)]
    assert caught(image, listed, range(95_000, 95_030)) > 0.85


def test_holes_do_not_take_the_sample_of_data() -> None:
    """A thin disk of 100 GiB with 64 MiB of data: all of it is read, however many holes."""
    image = Image(1_638_400 * FRAME, [(0, 500), (1_000_000, 1_000_500)])
    found, read = drawn(image, otherwise=[1_000_123])
    assert found.wrong_frames == 1
    assert len(read) == 1000 + 1024 + 1  # the wrong one twice


# Time and memory


class Clock:
    """Goes on by a second whenever it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_the_time_limit_cuts_the_sample() -> None:
    image = Image(10_000 * FRAME, [(0, 5_000)])
    found, read = drawn(image, share=0.5, budget_s=10.5, clock=Clock())
    assert found.cut
    assert found.frames == len(read) == 10 * module.FRAMES_BATCH
    held = sum(number < 5_000 for number in read)
    assert abs(held - len(read) / 2) <= module.FRAMES_BATCH  # both kinds are equally far
    assert max(read) > 8_000
    assert min(read) < 1_000


def test_a_sample_that_ends_in_time_is_not_cut() -> None:
    found, _ = drawn(Image(320 * FRAME, [(0, 320)]), budget_s=11.5, clock=Clock())
    assert (found.frames, found.cut) == (320, False)


def test_no_time_at_all() -> None:
    found, read = drawn(Image(320 * FRAME, [(0, 320)]), budget_s=0.5, clock=Clock())
    assert (found.frames, found.cut, read) == (0, True, [])


def test_memory_is_bounded_on_an_enormous_disk() -> None:
    """100 TiB with 20,000 pieces of data, of which lists of frames would take gigabytes."""

    class Enormous(Image):
        def extents(self) -> Iterator[Extent]:
            return (Extent(number * 80_000 * FRAME, 2 * FRAME) for number in range(20_000))

        def holds(self, number: int) -> bool:
            return number % 80_000 < 2 and number < 1_600_000_000

    image = Enormous((100 << 40) + 5000, [])
    disk = Disk(image)
    setting = Sampling(share=0.01, budget_s=4.5, clock=Clock(), rng=random.Random(1))
    tracemalloc.start()
    try:
        found = trio.run(partial(sample, [believed(image, disk)], setting, QUIET))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.cut
    assert not found.wrong_frames
    assert peak < 8 << 20


async def test_cancelling_ends_the_sample_soon() -> None:
    image = Image(1_000_000 * FRAME, [(0, 1_000_000)])

    class Slow(Disk):
        def read(self, offset: int, length: int) -> bytes:
            if len(self.read_frames) == 100:
                trio.from_thread.run_sync(scope.cancel)
            return super().read(offset, length)

    disk = Slow(image)
    with trio.CancelScope() as scope:
        await sample([believed(image, disk)], Sampling(share=1.0), QUIET)
    assert scope.cancelled_caught
    assert len(disk.read_frames) < 100 + 20 * module.FRAMES_BATCH
