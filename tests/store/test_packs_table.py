"""The table at the end of a pack file: written, found again, and found although damaged."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backyfs.errors import Corrupt, Unsupported
from backyfs.store.digest import HASH
from backyfs.store.header import Header
from backyfs.store.packs import codec
from backyfs.store.packs.packfile import PAGE, PackFile, Pages, Segment
from backyfs.store.packs.table import (
    ENTRY,
    NO_BASE,
    PACK_HEADER_BYTES,
    PACK_MAGIC,
    SEGMENT_FRAMES_MAX,
    SegmentTable,
    encode_table,
    footer_length,
    pack_header,
)

ID = UUID(int=9)


def segment(name: str, count: int, names: list[str], seed: int = 0) -> SegmentTable:
    """A table with entries that tell their number."""
    rng = random.Random(seed)
    table = SegmentTable(name, names)
    for number in range(count):
        table.entries += ENTRY.pack(96 + number, 1, codec.ZSTD, 0, 0, NO_BASE, 0, number)
        table.hashes += rng.randbytes(HASH)
        table.stored += 1
    return table


def write_pack(path: Path, tables: list[SegmentTable], names: list[str], body: bytes) -> Path:
    data = pack_header(ID, bytes(32)) + body
    for piece in encode_table(len(data), tables, names):
        data += piece
    path.write_bytes(data)
    return path


def segments(path: Path) -> tuple[PackFile, list[Segment]]:
    pack = PackFile(path)
    return pack, [Segment(pack, descriptor) for descriptor in pack.footer.segments]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=5),
    st.integers(0, 4),
    st.integers(0, 70),
)
def test_what_was_written(tmp_path: Path, counts: list[int], others: int, body: int) -> None:
    names = [f"20260101T000000Z-{n:04d}-0" for n in range(len(counts) + others)]
    tables = [segment(names[n], count, names, n) for n, count in enumerate(counts)]
    path = write_pack(tmp_path / "x.pack", tables, names, b"." * body)
    pack, found = segments(path)
    assert pack.footer.names == tuple(names)
    assert pack.footer.table_at == PACK_HEADER_BYTES + body
    for table, read in zip(tables, found, strict=True):
        assert (read.name, read.count, read.root) == (table.name, table.count, table.root)
        assert read.hashes(0, read.count) == bytes(table.hashes)
        assert blake3(read.hashes(0, read.count)).digest() == read.root
        assert [entry[7] for entry in read.all_entries()] == list(range(table.count))
        assert not read.cut_off
    pack.close()


def test_sections_are_aligned_and_the_table_is_a_skippable_frame(tmp_path: Path) -> None:
    names = ["20260101T000000Z-0000-0"]
    path = write_pack(tmp_path / "x.pack", [segment(names[0], 5, names)], names, b"12345")
    data = path.read_bytes()
    pack, _ = segments(path)
    at = pack.footer.table_at
    assert int.from_bytes(data[at : at + 4], "little") == 0x184D2A5C
    assert at + 8 + int.from_bytes(data[at + 4 : at + 8], "little") == len(data)
    assert int.from_bytes(data[4:8], "little") == 88
    (descriptor,) = pack.footer.segments
    assert descriptor.entries_at % 16 == descriptor.hashes_at % 16 == 0
    pack.close()


def test_many_pages(tmp_path: Path) -> None:
    names = ["20260101T000000Z-0000-0"]
    table = segment(names[0], 3 * PAGE + 17, names)
    pack, (read,) = segments(write_pack(tmp_path / "x.pack", [table], names, b""))
    rng = random.Random(1)
    for _ in range(50):
        first = rng.randrange(read.count)
        count = min(rng.randrange(2 * PAGE), read.count - first)
        numbers = [entry[7] for entry in read.entries(first, count)]
        assert numbers == list(range(first, first + count))
        expected = bytes(table.hashes[first * HASH : (first + count) * HASH])
        assert read.hashes(first, count) == expected
        assert read.entry(first)[7] == first
    for bad in ((-1, 1), (read.count, 1), (0, read.count + 1)):
        with pytest.raises(ValueError, match="no frames"):
            read.entries(*bad)
        with pytest.raises(ValueError, match="no frames"):
            read.hashes(*bad)
    with pytest.raises(ValueError, match="no frame"):
        read.entry(read.count)
    pack.close()


def test_patches_against(tmp_path: Path) -> None:
    names = [f"20260101T000000Z-{n:04d}-0" for n in range(600)]
    table = SegmentTable(names[0], names)
    for number in range(2 * PAGE):
        base = number % 599 + 1  # among them indices that differ in their high byte only
        kind = codec.ZSTD if number % 7 == 0 else codec.PATCH
        table.entries += ENTRY.pack(96, 1, kind, 0, 0, base, 0, number % 5)
        table.hashes += bytes(HASH)
    pack, (read,) = segments(write_pack(tmp_path / "x.pack", [table], names, b""))
    wanted = {3: {1, 2}, 259: range(1 << 32), 400: set[int]()}
    expected = [
        number
        for number, entry in enumerate(read.all_entries())
        if entry[2] == codec.PATCH and (entry[5] == 259 or (entry[5] == 3 and entry[7] in {1, 2}))
    ]
    assert list(read.patches_against(wanted)) == expected
    assert expected
    assert list(read.patches_against({})) == []
    pack.close()


def spoil(path: Path, at: int, length: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + length] = bytes(255 - byte for byte in data[at : at + length])
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path, int], object]] = {
    "tail": lambda path, size: spoil(path, size - 4),
    "length in the tail": lambda path, size: spoil(path, size - 16, 4),
    "second footer": lambda path, size: spoil(path, size - 60),
    "magic of the second footer": lambda path, size: spoil(path, size - 16 - footer_of(path)),
    "first footer": lambda path, size: spoil(path, PackFile(path).footer.table_at + 40),
    "header": lambda path, size: spoil(path, 0, 96),
    "garbage behind the end": lambda path, size: path.write_bytes(path.read_bytes() + b"x" * 5000),
    "tail cut off": lambda path, size: path.write_bytes(path.read_bytes()[:-10]),
}


def footer_of(path: Path) -> int:
    length = footer_length(path.read_bytes()[-16:])
    assert length
    return length


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_end_costs_nothing(tmp_path: Path, what: str) -> None:
    names = ["20260101T000000Z-0000-0", "20260101T000000Z-0001-0"]
    table = segment(names[0], 30, names)
    path = write_pack(tmp_path / "x.pack", [table], names, random.Random(2).randbytes(3000))
    DAMAGE[what](path, path.stat().st_size)
    pack, (read,) = segments(path)
    assert read.hashes(0, 30) == bytes(table.hashes)
    assert [entry[7] for entry in read.all_entries()] == list(range(30))
    pack.close()


def test_both_footers_damaged(tmp_path: Path) -> None:
    names = ["20260101T000000Z-0000-0"]
    path = write_pack(tmp_path / "x.pack", [segment(names[0], 30, names)], names, b"")
    DAMAGE["first footer"](path, path.stat().st_size)
    DAMAGE["second footer"](path, path.stat().st_size)
    with pytest.raises(Corrupt, match=r"x\.pack: its table is damaged"):
        PackFile(path)


@pytest.mark.parametrize("length", [0, 1, 63, 96, 5000])
def test_files_that_are_no_packs(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.pack"
    path.write_bytes(b"bfs-tbl\n" * (length // 8) + b"x" * (length % 8))
    with pytest.raises(Corrupt, match=r"x\.pack"):
        PackFile(path)


def test_a_pack_of_a_newer_version(tmp_path: Path) -> None:
    names = ["20260101T000000Z-0000-0"]
    path = write_pack(tmp_path / "x.pack", [segment(names[0], 3, names)], names, b"")
    data = path.read_bytes()
    path.write_bytes(Header(PACK_MAGIC, ID, length=96, version=2).encode() + data[64:])
    with pytest.raises(Unsupported, match="version 2"):
        PackFile(path)


def lying(path: Path, at: int, lie: bytes) -> None:
    """Change both copies of a pack's footer, which has one segment; their checksums are right."""
    data = path.read_bytes()
    length = footer_length(data[-16:])
    assert length is not None
    old = data[-16 - length : -16]
    body = old[:at] + lie + old[at + len(lie) : -HASH]
    path.write_bytes(data.replace(old, body + blake3(body).digest()))


@pytest.mark.parametrize("field", [16, 24])  # of the descriptor: where entries, where hashes are
@pytest.mark.parametrize("where", [2**63 - 1, 2**64 - 1])
def test_a_footer_that_points_beyond_any_file(tmp_path: Path, field: int, where: int) -> None:
    path = write_pack(tmp_path / "x.pack", [segment("one", 3, ["one"])], ["one"], b"")
    lying(path, 32 + 32 + field, where.to_bytes(8, "little"))
    pack, (found,) = segments(path)
    assert found.cut_off
    with pytest.raises(Corrupt, match="cut off"):
        found.entry(0)
    pack.close()


@pytest.mark.parametrize(
    ("segments_told", "name"), [(1, b"\xff"), (2, b"one")], ids=["no text", "more than names"]
)
def test_a_footer_that_names_impossible_segments(
    tmp_path: Path, segments_told: int, name: bytes
) -> None:
    # Two names take the place of one segment's descriptor, so that the length is right.
    names = ["one", "two", "three"] if segments_told == 2 else ["one"]
    path = write_pack(tmp_path / "x.pack", [segment("one", 3, names)], names, b"")
    if segments_told == 2:
        lying(path, 12, (2).to_bytes(4, "little") + (1).to_bytes(4, "little"))
    else:
        lying(path, 32, name)
    with pytest.raises(Corrupt, match="its table is damaged"):
        PackFile(path)


def test_a_footer_of_an_impossible_number_of_frames(tmp_path: Path) -> None:
    """Who marks them takes memory for each."""
    path = write_pack(tmp_path / "x.pack", [segment("one", 3, ["one"])], ["one"], b"")
    lying(path, 32 + 32, (SEGMENT_FRAMES_MAX + 1).to_bytes(4, "little"))
    with pytest.raises(Corrupt, match="its table is damaged"):
        PackFile(path)


@pytest.mark.parametrize("where", ["tail", "footer"])
def test_an_impossible_length_takes_no_memory(tmp_path: Path, where: str) -> None:
    """Of a file that a damaged inode has made larger than that."""
    path = write_pack(tmp_path / "x.pack", [segment("one", 3, ["one"])], ["one"], b"")
    size = path.stat().st_size
    with open(path, "r+b") as stream:
        stream.truncate(5 << 30)
        stream.seek((5 << 30) - 24 if where == "footer" else (5 << 30) - 16)
        told = (2**32 - 1).to_bytes(4, "little")
        stream.write(b"bfs-tbl\n" + told if where == "footer" else told + bytes(4) + b"bfs-end\n")
    tracemalloc.start()
    try:
        PackFile(path).close()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < most < 64 << 20


@pytest.mark.parametrize("offset", [1 << 40, 2**63 - 1, 2**64 - 1])
def test_bytes_beyond_the_end_are_none(tmp_path: Path, offset: int) -> None:
    """An entry has no checksum of its own: its offset may be anything."""
    pack, _ = segments(write_pack(tmp_path / "x.pack", [segment("one", 3, ["one"])], ["one"], b""))
    assert pack.pread(100, offset) == b""
    pack.close()


@pytest.mark.parametrize("size", [60, 600, 60_000])
def test_cached_pages_take_no_more_memory_than_they_may(size: int) -> None:
    tracemalloc.start()
    try:
        pages = Pages(1 << 20)
        for number in range(30_000):
            pages.put((number, number % 3), bytes(size))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 1 << 19 < kept < 5 << 18
    assert pages.get((29_999, 29_999 % 3)) == bytes(size)
    assert pages.get((0, 0)) is None
