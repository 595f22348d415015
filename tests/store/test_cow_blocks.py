"""Blocks and frames in memory, and where blocks of files lie."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backyfs.errors import Corrupt
from backyfs.model import FRAME, Extent
from backyfs.store.cow import blocks
from backyfs.store.cow.blocks import BLOCK
from backyfs.store.cow.fiemap import apart, extent_count, places
from backyfs.store.cow.reflink import data_extents
from backyfs.store.cow.table import Head, hash_at, level1_at, table_bytes
from backyfs.store.digest import HASH
from backyfs.store.fs import SYSTEM
from tests.store import contract


def buffer(kinds: list[int], tail: int) -> bytes:
    """Blocks: 0 is zeros, others repeat a byte; then a short one."""
    return b"".join(bytes([kind]) * BLOCK for kind in kinds) + b"t" * tail


KINDS = st.lists(st.integers(0, 2), max_size=40)
TAILS = st.sampled_from([0, 1, BLOCK - 1])


@given(KINDS, TAILS)
def test_data_runs_are_the_blocks_that_are_not_zero(kinds: list[int], tail: int) -> None:
    data = buffer(kinds, tail)
    rebuilt = bytearray(len(data))
    end = -1
    for start, stop in blocks.data_runs(data):
        assert start > end  # neighbours would be one
        assert start % BLOCK == 0
        rebuilt[start:stop] = data[start:stop]
        end = stop
        for at in range(start, stop, BLOCK):
            assert any(data[at : min(at + BLOCK, stop)])
    assert rebuilt == data


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=40), TAILS, st.booleans())
def test_changed_runs_turn_the_old_into_the_new(
    pairs: list[tuple[int, int]], tail: int, zero_tail: bool
) -> None:
    old = buffer([pair[0] for pair in pairs], tail)
    new = buffer([pair[1] for pair in pairs], 0) + (bytes(tail) if zero_tail else b"t" * tail)
    made = bytearray(old)
    for start, end, zero in blocks.changed_runs(new, old):
        assert zero == (not any(new[start:end]))
        made[start:end] = new[start:end]
        for at in range(start, end, BLOCK):
            assert old[at : min(at + BLOCK, end)] != new[at : min(at + BLOCK, end)]
    assert made == new


@given(st.lists(st.integers(0, 5), max_size=4), st.sampled_from([0, 1, BLOCK, FRAME - 1]))
def test_frame_hashes(seeds: list[int], tail: int) -> None:
    for data in (
        contract.image_of(*seeds, tail=b"t" * tail),
        contract.image_of(*seeds, tail=bytes(tail)),
    ):
        assert blocks.frame_hashes(data) == b"".join(contract.frame_hashes(data))


@given(st.sets(st.integers(0, 60)))
def test_runs(numbers: set[int]) -> None:
    found = list(blocks.runs(sorted(numbers)))
    assert [n for first, end in found for n in range(first, end)] == sorted(numbers)
    assert all(one[1] < other[0] for one, other in itertools.pairwise(found))


def test_mended() -> None:
    frame = contract.frame(2)
    recorded = blocks.frame_hashes(frame)
    bad = frame[:5000] + b"bad" + frame[5003:]
    elsewhere = frame[:9000] + b"changed" + frame[9007:]
    same_block = frame[:5500] + b"changed" + frame[5507:]
    assert blocks.mended(bad, frame, recorded) == frame
    assert blocks.mended(frame, elsewhere, recorded) == frame
    assert blocks.mended(bad, elsewhere, recorded) == frame
    assert blocks.mended(bad, same_block, recorded) is None
    assert blocks.mended(bad, contract.frame(4), recorded) is None


def test_the_head_of_a_table() -> None:
    head = Head(uuid4(), 123456789, 42)
    data = head.encode()
    assert len(data) == 4096
    assert Head.decode(data, "it") == head
    for at in (0, 8, 30, 64, 70, 79, 2000, 4095):
        with pytest.raises(Corrupt):
            Head.decode(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "it")
    with pytest.raises(Corrupt):
        Head.decode(data[:4000], "it")


def test_the_places_in_a_table() -> None:
    assert (hash_at(0), hash_at(3)) == (4096, 4192)
    assert table_bytes(0) == 4096
    assert level1_at(1) == 4096 + HASH
    assert table_bytes(1025 * FRAME) == 4096 + 1025 * 32 + 2 * 32
    assert level1_at(1025 * FRAME) % 16 == 0


def test_who_shares_what(reflink_dir: Path) -> None:
    rng = random.Random(4)
    size = 64 * BLOCK + 100
    fds = [os.open(reflink_dir / str(n), os.O_RDWR | os.O_CREAT) for n in range(4)]
    try:
        os.pwrite(fds[0], rng.randbytes(size), 0)
        os.fsync(fds[0])
        for before, after in itertools.pairwise(fds):
            SYSTEM.clone(before, after)
            for block in rng.sample(range(60), 8):
                os.pwrite(after, rng.randbytes(BLOCK), block * BLOCK)
            SYSTEM.punch(after, rng.randrange(60) * BLOCK, 3 * BLOCK)
            os.fsync(after)
        assert extent_count(fds[3]) > 8
        for one in fds:
            for other in fds:
                assert blocks_of(apart(one, other, size)) == apart_by_block(one, other, size)
    finally:
        for fd in fds:
            os.close(fd)


def blocks_of(extents: Iterable[Extent]) -> set[int]:
    """Numbers of the blocks of extents."""
    found: set[int] = set()
    for extent in extents:
        found.update(range(extent.offset // BLOCK, -(-extent.end // BLOCK)))
    return found


def apart_by_block(one: int, other: int, size: int) -> set[int]:
    """The same by asking for each block alone."""
    data = blocks_of(data_extents(one, 0, size))
    return {n for n in data if places(one, n * BLOCK, BLOCK) != places(other, n * BLOCK, BLOCK)}
