"""What is read of a disk: whole frames, in order, in bounded batches."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from backyfs.engine.pipeline import BATCH_BYTES
from backyfs.engine.plan import STEPS_MAX, Step, batches, pieces, reading, scanning
from backyfs.extents import framed, joined, union
from backyfs.model import FRAME, Extent

sizes = st.integers(0, 300 * FRAME)


@st.composite
def disks(draw: st.DrawFn) -> tuple[int, list[Extent]]:
    """A size, and sorted disjoint extents inside it."""
    size = draw(sizes)
    cuts = sorted(draw(st.sets(st.integers(0, size), max_size=20)))
    return size, [Extent(a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]


def frames_of(extents: Iterable[Extent]) -> set[int]:
    return {n for e in extents for n in range(e.offset // FRAME, -(-e.end // FRAME))}


@given(disks())
def test_framed_covers_exactly_the_touched_frames(disk: tuple[int, list[Extent]]) -> None:
    size, extents = disk
    found = list(framed(extents, size))
    assert frames_of(found) == frames_of(extents)
    for extent in found:
        assert extent.offset % FRAME == 0
        assert extent.end % FRAME == 0 or extent.end == size
    assert all(a.end < b.offset for a, b in pairwise(found))


@given(disks())
def test_scanning_covers_every_byte_once_in_order(disk: tuple[int, list[Extent]]) -> None:
    size, extents = disk
    steps = list(scanning(extents, size))
    position = 0
    for step in steps:
        assert step.extent.offset == position
        position = step.extent.end
    assert position == size
    assert frames_of(s.extent for s in steps if not s.zero) == frames_of(extents)


@given(disks(), disks())
def test_union_touches_what_either_touches(
    one: tuple[int, list[Extent]], other: tuple[int, list[Extent]]
) -> None:
    size = max(one[0], other[0])
    assert frames_of(union(one[1], other[1], size)) == frames_of(one[1]) | frames_of(other[1])


@given(disks())
def test_batches_keep_order_and_bounds(disk: tuple[int, list[Extent]]) -> None:
    size, extents = disk
    steps = list(scanning(extents, size))
    found = list(batches(steps))
    for batch in found:
        assert 0 < len(batch) <= STEPS_MAX
        assert sum(s.extent.length for s in batch if not s.zero) <= BATCH_BYTES
    flat = [step for batch in found for step in batch]
    assert list(joined(s.extent for s in flat if not s.zero)) == list(framed(extents, size))
    assert [s for s in flat if s.zero] == [s for s in steps if s.zero]


def test_scattered_frames_share_a_batch() -> None:
    extents = [Extent(n * 10 * FRAME, FRAME) for n in range(64)]
    assert [len(batch) for batch in batches(reading(extents))] == [32, 32]


def test_pieces_are_cut_at_multiples() -> None:
    extent = Extent(BATCH_BYTES - FRAME, BATCH_BYTES)
    assert list(pieces(extent)) == [
        Extent(BATCH_BYTES - FRAME, FRAME),
        Extent(BATCH_BYTES, BATCH_BYTES - FRAME),
    ]


def test_an_empty_disk_has_no_steps() -> None:
    assert list(scanning([], 0)) == []


def test_a_disk_of_zeros_is_one_step_whatever_its_size() -> None:
    size = 1 << 50
    assert list(batches(scanning([], size))) == [(Step(Extent(0, size), zero=True),)]
