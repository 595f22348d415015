"""Frames as they are stored: whatever comes in, the same comes out or an error."""

from __future__ import annotations

import random
import subprocess
import threading

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from backyfs.model import FRAME
from backyfs.store.packs import codec
from tests.parts import require
from tests.store.faults import frame, patched

FRAMES = {
    "zeros": bytes(FRAME),
    "noise": random.Random(1).randbytes(FRAME),
    "text": (b"backups are for restoring " * 3000)[:FRAME],
    "mixed": frame(1),
    "one letter": b"x" * FRAME,
}


@pytest.mark.parametrize("name", FRAMES)
def test_plain_frames(name: str) -> None:
    stored = codec.compress(FRAMES[name])
    assert codec.decompress(stored) == FRAMES[name]
    assert len(stored) <= codec.STORED_BYTES_MAX


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("base", FRAMES)
def test_patches(name: str, base: str) -> None:
    stored = codec.compress_patch(FRAMES[name], FRAMES[base])
    assert codec.decompress_patch(stored, FRAMES[base]) == FRAMES[name]
    assert len(stored) <= codec.STORED_BYTES_MAX


def test_a_patch_is_as_small_as_the_change() -> None:
    base = FRAMES["noise"]
    stored = codec.compress_patch(patched(base, 0, 1, length=500), base)
    assert len(stored) < 700


def test_frames_with_something_in_common_are_related() -> None:
    base = FRAMES["noise"]
    one_block_left = random.Random(2).randbytes(FRAME - 4096) + base[-4096:]
    moved = random.Random(2).randbytes(4099) + base[:-4099]
    assert codec.related(one_block_left, base)
    assert codec.related(moved, base)
    assert codec.related(FRAMES["zeros"], FRAMES["zeros"])
    assert not codec.related(random.Random(2).randbytes(FRAME), base)


@given(st.integers(0, 15), st.integers(0, 2**32))
def test_a_frame_is_related_to_what_it_kept_a_block_of(block: int, seed: int) -> None:
    base = random.Random(seed).randbytes(FRAME)
    kept = bytearray(random.Random(seed + 1).randbytes(FRAME))
    kept[block * 4096 : block * 4096 + 4096] = base[block * 4096 : block * 4096 + 4096]
    assert codec.related(bytes(kept), base)


def test_the_program_zstd_reads_plain_frames() -> None:
    done = subprocess.run(
        [require("zstd"), "-dc"], input=codec.compress(FRAMES["mixed"]), capture_output=True
    )
    assert done.stdout == FRAMES["mixed"]


@given(st.binary(max_size=300))
def test_garbage_is_an_error(data: bytes) -> None:
    for decode in (codec.decompress, lambda d: codec.decompress_patch(d, FRAMES["text"])):
        try:
            assert len(decode(data)) == FRAME
        except ValueError as exc:
            assert str(exc)


@pytest.mark.parametrize("size", [0, 1, FRAME - 1, FRAME + 1, 1 << 40])
def test_other_sizes_are_refused_before_memory_is_taken(size: int) -> None:
    whole = zstandard.ZstdCompressor(write_content_size=True).compress(b"x" * min(size, FRAME * 2))
    if size > FRAME * 2:  # a header that promises a tebibyte
        whole = bytes.fromhex("28b52ffd") + b"\xe0" + size.to_bytes(8, "little") + b"\x01\x00\x00"
    with pytest.raises(ValueError, match="bytes"):
        codec.decompress(whole)


def test_a_frame_without_its_size_is_refused() -> None:
    nameless = zstandard.ZstdCompressor(write_content_size=False).compress(FRAMES["text"])
    with pytest.raises(ValueError, match="bytes"):
        codec.decompress(nameless)


def test_many_threads() -> None:
    wrong: list[str] = []

    def work(seed: int) -> None:
        for number in range(40):
            mine, base = frame(seed * 100 + number), frame(number)
            if codec.decompress(codec.compress(mine)) != mine:
                wrong.append("plain")
            if codec.decompress_patch(codec.compress_patch(mine, base), base) != mine:
                wrong.append("patch")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
