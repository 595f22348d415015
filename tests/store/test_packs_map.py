"""Extent maps against the simplest model of one: a list with a place for each frame."""

from __future__ import annotations

import random
import struct
from array import array
from itertools import pairwise
from uuid import UUID

import pytest
import zstandard
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from backyfs.errors import Corrupt, Unsupported
from backyfs.model import FRAME
from backyfs.store.digest import group_count
from backyfs.store.header import MAP_MAGIC, Header
from backyfs.store.packs.extents import ExtentMap, SegmentRef
from backyfs.store.packs.runs import GAP, Run, Runs, overlaid

ID = UUID(int=7)
SPAN = 40
Place = tuple[int, int] | None
"""Segment and number of a frame; None: zeros."""


@st.composite
def runs(draw: st.DrawFn, *, gaps: bool = False, segments: int = 3) -> list[Run]:
    """Sorted, disjoint runs within SPAN frames."""
    edges = sorted(draw(st.sets(st.integers(0, SPAN), max_size=12)))
    found = []
    for first, end in pairwise(edges):
        if draw(st.booleans()):
            continue
        segment = draw(st.integers(GAP if gaps else 0, segments - 1))
        number = 0 if segment == GAP else draw(st.integers(0, 30))
        found.append(Run(first, end - first, segment, number))
    return found


def model(found: list[Run], frames: int = SPAN) -> list[Place]:
    places: list[Place] = [None] * max(frames, SPAN)
    for run in found:
        for index in range(run.span):
            place = None if run.segment == GAP else (run.segment, run.number + index)
            places[run.first + index] = place
    return places[:frames]


@given(runs(), runs(gaps=True), st.integers(0, SPAN))
def test_changes_on_top_of_a_map(base: list[Run], changes: list[Run], frames: int) -> None:
    expected = model(base)
    for run in changes:
        expected[run.first : run.first + run.span] = model([run])[run.first : run.first + run.span]
    found = list(overlaid(Runs(base), changes, frames))
    assert model(found, frames) == expected[:frames]
    assert all(run.span > 0 and run.segment != GAP for run in found)
    for one, other in pairwise(found):
        assert one.first + one.span <= other.first
        touching = one.first + one.span == other.first
        continuing = one.segment == other.segment and one.number + one.span == other.number
        assert not (touching and continuing), "two runs that are one"


def as_written_by_others(found: list[Run]) -> Runs:
    """With runs of no frames, and some that could be one."""
    gaps = [run.first - end for run, end in zip(found, [0, *(r.end for r in found)], strict=False)]
    columns = (gaps, *zip(*(run[1:] for run in found), strict=True))
    return Runs.decode(b"".join(array("I", column).tobytes() for column in columns), len(found))


@given(st.lists(st.integers(0, 999), max_size=8), st.integers(1, 3000), st.randoms())
def test_few_changes_of_a_disk_in_many_pieces(
    changed: list[int], frames: int, rng: random.Random
) -> None:
    base = [Run(n * 3, rng.randint(0, 3), n % 2, rng.randrange(100)) for n in range(1000)]
    changes = [Run(n * 3 + 1, 1, rng.choice([GAP, 2]), n) for n in sorted(set(changed))]
    expected = model(base, 3000)
    for run in changes:
        expected[run.first] = None if run.segment == GAP else (run.segment, run.number)
    found = overlaid(as_written_by_others(base), changes, frames)
    assert model(list(found), frames) == expected[:frames]
    assert found.end <= frames


def made(found: list[Run], frames: int = SPAN, size: int | None = None) -> ExtentMap:
    refs = [SegmentRef(f"20260101T000000Z-{n:04d}-0", 100, bytes([n]) * 32) for n in range(3)]
    size = frames * FRAME if size is None else size
    return ExtentMap(size, refs, Runs(found), bytes(range(32)) * group_count(size))


@given(runs(), st.integers(0, SPAN - 1), st.integers(0, SPAN))
def test_finding_frames(found: list[Run], first: int, count: int) -> None:
    count = min(count, SPAN - first)
    parts = list(made(found).runs.find(first, count))
    assert sum(run.span for run in parts) == count
    position = first
    for run in parts:
        assert run.first == position
        position += run.span
    moved = [Run(run.first - first, *run[1:]) for run in parts]
    assert model(moved, count) == model(found)[first : first + count]


@given(runs(), st.integers(-FRAME + 1, 0))
def test_a_map_survives_its_file(found: list[Run], less: int) -> None:
    original = made(found, size=SPAN * FRAME + less)
    data = original.encode(ID)
    read = ExtentMap.decode(data, "map")
    assert (read.size, read.segments, read.groups) == (
        original.size,
        original.segments,
        original.groups,
    )
    assert list(read.runs) == list(original.runs) == list(Runs(found))
    assert read.encode(ID) == data
    assert Header.decode(data, MAP_MAGIC, "map").repository == ID


def test_a_large_sparse_map_is_small() -> None:
    one_by_one = [Run(n * 3, 1, 0, n) for n in range(50_000)]
    extent_map = ExtentMap(
        1 << 40, made([]).segments, Runs(one_by_one), bytes(group_count(1 << 40) * 32)
    )
    data = extent_map.encode(ID)
    assert len(data) < 200_000
    assert list(ExtentMap.decode(data, "map").runs) == one_by_one


def test_an_empty_disk() -> None:
    data = ExtentMap(0, [], Runs(), b"").encode(ID)
    read = ExtentMap.decode(data, "map")
    assert (read.size, read.frames, len(read.runs), list(read.runs)) == (0, 0, 0, [])


@given(runs(), st.data())
def test_damage_that_no_hash_caught(found: list[Run], data: st.DataObject) -> None:
    """Whatever the bytes, an error or a map whose extents lie inside the disk and its segments."""
    encoded = bytearray(made(found).encode(ID))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(64, len(encoded) - 1))
        encoded[at] = data.draw(st.integers(0, 255))
    try:
        read = ExtentMap.decode(bytes(encoded), "map")
    except (Corrupt, Unsupported):
        return
    for run in read.runs:
        assert 0 <= run.first <= run.first + run.span <= read.frames
        assert run.segment < len(read.segments)


def test_a_header_of_a_newer_version() -> None:
    data = made([]).encode(ID)
    for change in ({"version": 2}, {"incompat": 1}):
        newer = Header(MAP_MAGIC, ID, **change).encode() + data[64:]
        with pytest.raises(Unsupported, match="knows version"):
            ExtentMap.decode(newer, "map")
    later = Header(MAP_MAGIC, ID, ro_compat=1).encode() + data[64:]
    assert ExtentMap.decode(later, "map").size == SPAN * FRAME
    assert blake3(later[:56]).digest()[:8] == later[56:64]


@pytest.mark.parametrize("told", ["by the map", "by zstd"])
def test_a_section_that_would_unpack_to_more_than_there_is_memory(told: str) -> None:
    encoded = bytearray(ExtentMap(SPAN * FRAME, [], Runs(), bytes(32)).encode(ID))
    packed = zstandard.ZstdCompressor().compress(bytes(64))
    if told == "by zstd":  # a header with a content size of eight bytes, and an empty last block
        packed = b"\x28\xb5\x2f\xfd\xe0" + (1 << 50).to_bytes(8, "little") + b"\1\0\0"
    length = 1 << 50 if told == "by the map" else 0
    struct.pack_into("<IIQQQ", encoded, 128, 1, 1, len(encoded), len(packed), length)
    with pytest.raises(Corrupt, match="impossible length"):
        ExtentMap.decode(bytes(encoded + packed), "map")


def test_a_segment_of_more_frames_than_any_has() -> None:
    refs = [SegmentRef("20260101T000000Z-0000-0", (1 << 18) + 1, bytes(32))]
    data = ExtentMap(FRAME, refs, Runs([Run(0, 1, 0, 0)]), bytes(32)).encode(ID)
    with pytest.raises(Corrupt, match="an impossible number of frames"):
        ExtentMap.decode(data, "map")
