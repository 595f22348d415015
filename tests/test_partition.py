"""Partition tables: those that real programs write, and those that nobody should believe."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backyfs.model import Partition
from backyfs.partition import Table, parse, recognise
from tests.parts import require

MIB = 1 << 20
SIZE = 64 * MIB


def run(*command: str | Path, text: str = "") -> str:
    done = subprocess.run(
        [str(part) for part in command],
        input=text, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def blank(path: Path, size: int = SIZE) -> Path:
    with open(path, "wb") as stream:
        stream.truncate(size)
    return path


def table_of(path: Path, sector: int = 512) -> Table:
    return table_in(path.read_bytes(), sector)


def table_in(data: bytes, sector: int = 512) -> Table:
    """Parse, with a reader that objects to anything outside of the disk."""
    table = parse(strict(data), len(data), sector)
    for partition in table.partitions:
        assert 0 < partition.start < partition.start + partition.length <= len(data)
    for one, other in itertools.pairwise(sorted(table.partitions, key=lambda p: p.start)):
        assert one.start + one.length <= other.start
    assert not (table.reason and table.partitions)
    return table


def strict(data: bytes) -> Callable[[int, int], bytes]:
    calls = 0

    def read(offset: int, length: int) -> bytes:
        nonlocal calls
        calls += 1
        assert calls < 2000
        assert 0 <= offset <= offset + length <= len(data)
        assert length <= MIB
        return data[offset : offset + length]

    return read


def as_sfdisk_says(path: Path) -> list[tuple[int, int, int]]:
    """(number, start, length) of what holds bytes: not of extended partitions."""
    dump = json.loads(run(require("sfdisk"), "--json", path))["partitiontable"]
    sector = dump.get("sectorsize", 512)
    return [
        (
            int(entry["node"].removeprefix(str(path))),
            entry["start"] * sector,
            entry["size"] * sector,
        )
        for entry in dump.get("partitions", [])
        if entry["type"].lower() not in ("5", "f", "85")
    ]


def places(table: Table) -> list[tuple[int, int, int]]:
    return [(entry.number, entry.start, entry.length) for entry in table.partitions]


GPT_SCRIPT = """\
label: gpt
size=8MiB, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name="EFI system"
size=16MiB, type=linux, name="Wurzel äöü"
size=4MiB, type=swap
"""
MBR_SCRIPT = """\
label: dos
size=8MiB, type=c, bootable
size=8MiB, type=83
size=32MiB, type=f
size=4MiB, type=82
size=4MiB, type=83
size=6MiB, type=8e
size=8MiB, type=83
"""


@pytest.fixture
def gpt(tmp_path: Path) -> Path:
    path = blank(tmp_path / "gpt.img")
    run(require("sfdisk"), "-q", path, text=GPT_SCRIPT)
    return path


@pytest.fixture
def mbr(tmp_path: Path) -> Path:
    path = blank(tmp_path / "mbr.img")
    run(require("sfdisk"), "-q", path, text=MBR_SCRIPT)
    return path


# ---- what real programs write ------------------------------------------------------------------


def test_a_gpt_of_sfdisk(gpt: Path) -> None:
    table = table_of(gpt)
    assert (table.scheme, table.reason) == ("gpt", "")
    assert table.partitions[1] == Partition(
        2, 9 * MIB, 16 * MIB, "0fc63daf-8483-4772-8e79-3d69d8477de4", "Wurzel äöü", ""
    )
    assert places(table) == as_sfdisk_says(gpt)


def test_an_mbr_of_sfdisk_with_logical_partitions(mbr: Path) -> None:
    table = table_of(mbr)
    assert (table.scheme, table.reason) == ("mbr", "")
    assert [(entry.number, entry.type) for entry in table.partitions] == [
        (1, "0c"), (2, "83"), (4, "82"), (5, "83"), (6, "8e"), (7, "83"),
    ]  # fmt: skip
    assert places(table) == sorted(as_sfdisk_says(mbr))


def test_an_extended_partition_that_was_never_filled(tmp_path: Path) -> None:
    path = blank(tmp_path / "disk")
    run(require("sfdisk"), "-q", path, text="label: dos\nsize=8MiB, type=83\nsize=8MiB, type=5\n")
    assert [entry.number for entry in table_of(path).partitions] == [1]


@pytest.mark.parametrize("label", ["gpt", "msdos"])
def test_tables_of_parted(tmp_path: Path, label: str) -> None:
    path = blank(tmp_path / "disk")
    parted = require("parted")
    run(parted, "-s", path, "mklabel", label, "mkpart", "primary", "1MiB", "9MiB",
        "mkpart", "primary", "10MiB", "20MiB")  # fmt: skip
    assert [(p.start, p.length) for p in table_of(path).partitions] == [
        (MIB, 8 * MIB), (10 * MIB, 10 * MIB),
    ]  # fmt: skip
    assert places(table_of(path)) == as_sfdisk_says(path)


@contextlib.contextmanager
def loop_device(path: Path, *options: str) -> Iterator[str]:
    losetup = require("loop") and require("losetup")
    device = run(losetup, "-f", "--show", *options, path).strip()
    try:
        yield device
    finally:
        run(losetup, "-d", device)


def test_a_gpt_for_large_sectors_is_found_without_being_told(tmp_path: Path) -> None:
    path = blank(tmp_path / "disk")
    with loop_device(path, "-b", "4096") as device:
        run(require("sfdisk"), "-q", device, text=GPT_SCRIPT)
    assert table_of(path) == table_of(path, 4096)
    assert [(p.start, p.length) for p in table_of(path).partitions] == [
        (MIB, 8 * MIB), (9 * MIB, 16 * MIB), (25 * MIB, 4 * MIB),
    ]  # fmt: skip


def test_an_mbr_for_large_sectors(tmp_path: Path) -> None:
    path = blank(tmp_path / "disk")
    with loop_device(path, "-b", "4096") as device:
        run(require("sfdisk"), "-q", device, text=MBR_SCRIPT)
    table = table_of(path, 4096)
    assert [entry.number for entry in table.partitions] == [1, 2, 4, 5, 6, 7]
    assert [entry.start for entry in table.partitions][:2] == [MIB, 9 * MIB]
    assert table_of(path) != table, "nothing in it tells"
    with open(path, "r+b") as stream:
        stream.seek(table.partitions[3].start)
        stream.write(b"hsqs")  # in a logical one
    assert table_of(path) == table_of(path, 4096)
    assert table_of(path).partitions[3].filesystem == "squashfs"


def test_an_mbr_whose_place_is_known_stays(mbr: Path) -> None:
    start = table_of(mbr).partitions[0].start
    with open(mbr, "r+b") as stream:
        for place in (start, start * 8):
            stream.seek(place)
            stream.write(b"hsqs")
    assert table_of(mbr).partitions[0].start == start


def test_partitions_as_the_kernel_sees_them(gpt: Path, mbr: Path) -> None:
    for path in (gpt, mbr):
        with loop_device(path, "-r", "-P") as device:
            name = Path(device).name
            seen = sorted(
                (
                    int((entry / "partition").read_text()),
                    int((entry / "start").read_text()) * 512,
                    int((entry / "size").read_text()) * 512,
                )
                for entry in Path(f"/sys/block/{name}").glob(f"{name}p*")
            )
        if not seen:
            pytest.skip("this kernel reads no partition tables of loop devices")
        # It shows an extended partition too, 1 KiB long.
        assert places(table_of(path)) == [part for part in seen if part[2] > 1024]


MKFS = [
    ("ext2", "mkfs.ext4", ["-q", "-F", "-t", "ext2"]),
    ("ext3", "mkfs.ext4", ["-q", "-F", "-t", "ext3"]),
    ("ext4", "mkfs.ext4", ["-q", "-F"]),
    ("xfs", "mkfs.xfs", ["-q", "-f"]),
    ("btrfs", "mkfs.btrfs", ["-q", "-f"]),
    ("vfat", "mkfs.vfat", []),
    ("vfat", "mkfs.vfat", ["-F", "32"]),
    ("swap", "mkswap", ["-q"]),
]


@pytest.mark.parametrize(
    ("name", "program", "options"), MKFS, ids=[f"{n}-{''.join(o)}" for n, _, o in MKFS]
)
def test_file_systems_as_their_own_programs_make_them(
    tmp_path: Path, name: str, program: str, options: list[str]
) -> None:
    path = blank(tmp_path / "fs", 320 * MIB)
    run(require(program), *options, path)
    with open(path, "rb") as stream:
        head = stream.read(MIB)
    assert recognise(strict(head), 0, len(head)) == name
    # With the whole disk in its hands there is no table, whatever stands in its boot sector.
    assert table_in(head) == Table()
    # And behind something else it is found at its place.
    assert recognise(strict(b"\xff" * 4096 + head), 4096, len(head)) == name


def test_file_systems_inside_partitions(gpt: Path, tmp_path: Path) -> None:
    root = blank(tmp_path / "root", 16 * MIB)
    run(require("mkfs.ext4"), "-q", "-F", root)
    with open(gpt, "r+b") as stream:
        stream.seek(9 * MIB)
        stream.write(root.read_bytes())
    assert [entry.filesystem for entry in table_of(gpt).partitions] == ["", "ext4", ""]


@pytest.mark.parametrize(
    ("name", "offset", "magic"),
    [
        ("LVM2_member", 512, b"LABELONE" + bytes(16) + b"LVM2 001"),
        ("crypto_LUKS", 0, b"LUKS\xba\xbe\0\x02"),
        ("linux_raid_member", 4096, b"\xfc\x4e\x2b\xa9"),
        ("ntfs", 0, b"\xeb\x52\x90NTFS    "),
        ("iso9660", 32768, b"\x01CD001\x01\0"),
        ("", 0, b""),
    ],
)
def test_other_contents(name: str, offset: int, magic: bytes) -> None:
    data = bytes(offset) + magic
    data += bytes(MIB - len(data))
    assert recognise(strict(data), 0, len(data)) == name


@given(st.integers(0, 70_000), st.integers(0, 2**32))
def test_recognition_of_noise_of_any_length(length: int, seed: int) -> None:
    data = random.Random(seed).randbytes(length)
    recognise(strict(data), 0, length)


# ---- damage and lies ---------------------------------------------------------------------------


def test_a_disk_without_a_table() -> None:
    for size in (0, 1, 511, 512, 513, 4096, MIB):
        assert table_in(bytes(size)) == Table()
        assert table_in(bytes(size), 4096) == Table()


def test_the_copy_at_the_end_serves_when_the_first_is_damaged(gpt: Path) -> None:
    good, data = table_of(gpt), bytearray(gpt.read_bytes())
    for place in (512, 512 + 40, 1024 + 5):  # signature, a field of the header, the entries
        damaged = data.copy()
        damaged[place] ^= 0xFF
        assert table_in(bytes(damaged)) == good
    data[512:1024] = bytes(512)
    data[-512] ^= 0xFF
    table = table_in(bytes(data))
    assert table.scheme == "gpt"
    assert "the GPT header is missing; and in the copy at the end" in table.reason


def test_a_gpt_is_believed_only_behind_its_protective_mbr(gpt: Path) -> None:
    data = bytearray(gpt.read_bytes())
    data[446:512] = bytes(66)
    assert table_in(bytes(data)) == Table()


def test_a_grown_disk_keeps_its_table_and_a_cut_one_loses_it(gpt: Path, mbr: Path) -> None:
    for path in (gpt, mbr):
        data, good = path.read_bytes(), table_of(path)
        assert table_in(data + bytes(MIB + 100)) == good
        cut = table_in(data[: 20 * MIB])
        assert "is not inside the disk of 40960 sectors" in cut.reason


def gpt_header(data: bytearray, **fields: int) -> None:
    """Set fields of the primary header and make both its checksums right."""
    places = {"own": 24, "start": 72, "count": 80, "size": 84, "length": 12}
    for name, value in fields.items():
        struct.pack_into(
            "<Q" if name in ("own", "start") else "<I", data, 512 + places[name], value
        )
    start, count, size = struct.unpack_from("<QII", data, 512 + 72)
    array = data[start * 512 : start * 512 + min(count * size, 2 * MIB)]
    struct.pack_into("<I", data, 512 + 88, zlib.crc32(array))
    length = struct.unpack_from("<I", data, 512 + 12)[0]
    data[512 + 16 : 512 + 20] = bytes(4)
    struct.pack_into("<I", data, 512 + 16, zlib.crc32(data[512 : 512 + min(length, 512)]))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"own": 7}, "says that it is in 7"),
        ({"start": 2**63}, "beyond the end of the disk"),
        ({"start": 2**40}, "beyond the end of the disk"),
        ({"count": 2**32 - 1}, "4294967295 entries"),
        ({"size": 2**32 - 8}, "entries of 4294967288 bytes"),
        ({"size": 0}, "entries of 0 bytes"),
        ({"size": 129}, "entries of 129 bytes"),
        ({"length": 2**32 - 1}, "does not match its checksum"),
        ({"length": 0}, "does not match its checksum"),
    ],
)
def test_a_gpt_header_that_lies_with_right_checksums(
    gpt: Path, fields: dict[str, int], reason: str
) -> None:
    data = bytearray(gpt.read_bytes())
    data[-512:] = bytes(512)
    gpt_header(data, **fields)
    assert reason in table_in(bytes(data)).reason


def test_gpt_entries_that_lie(gpt: Path) -> None:
    data = bytearray(gpt.read_bytes())
    data[-512:] = bytes(512)
    for entry, first, last, reason in [
        (0, 2048, 40_000, "partitions 1 and 2 overlap"),
        (1, 0, 100, "partition 2 (sectors 0 to 100) is not inside"),
        (1, 2000, 1000, "partition 2 (sectors 2000 to 1000) is not inside"),
        (2, 60_000, 2**64 - 1, "is not inside the disk of 131072 sectors"),
    ]:
        changed = data.copy()
        struct.pack_into("<QQ", changed, 1024 + 128 * entry + 32, first, last)
        gpt_header(changed)
        assert reason in table_in(bytes(changed)).reason


def test_a_whole_table_that_lies_is_not_replaced_by_its_copy(gpt: Path) -> None:
    data = bytearray(gpt.read_bytes())
    struct.pack_into("<QQ", data, 1024 + 32, 2048, 40_000)
    assert table_in(bytes(data)) == table_of(gpt)  # damaged: its checksum is wrong
    gpt_header(data)
    table = table_in(bytes(data))
    assert "partitions 1 and 2 overlap" in table.reason
    assert not table.partitions


def test_a_gpt_with_an_absurd_number_of_partitions(gpt: Path) -> None:
    data = bytearray(gpt.read_bytes())
    data[-512:] = bytes(512)
    array = b"".join(
        data[1024:1040] + bytes(16) + struct.pack("<QQ", 3000 + n, 3000 + n) + bytes(80)
        for n in range(1000)
    )
    data[1024 : 1024 + len(array)] = array
    gpt_header(data, count=1000)
    assert "it has 1000 partitions" in table_in(bytes(data)).reason


def test_a_name_that_cannot_be_shown(gpt: Path) -> None:
    data = bytearray(gpt.read_bytes())
    data[1024 + 56 : 1024 + 64] = "a\n".encode("utf-16-le") + b"\x00\xd8" + b"b\0"
    gpt_header(data)
    name = table_in(bytes(data)).partitions[0].name
    assert name.startswith("a\ufffd")
    assert name.isprintable()
    name.encode()


def mbr_with(*entries: tuple[int, int, int], size: int = 8 * MIB) -> bytearray:
    data = bytearray(size)
    write_slots(data, 0, *entries)
    return data


def write_slots(data: bytearray, sector: int, *entries: tuple[int, int, int]) -> None:
    for n, (kind, start, count) in enumerate(entries):
        struct.pack_into("<B3xB3xII", data, sector * 512 + 446 + 16 * n, 0, kind, start, count)
    data[sector * 512 + 510 : sector * 512 + 512] = b"\x55\xaa"


def test_a_chain_that_bites_its_tail() -> None:
    data = mbr_with((5, 100, 5000))
    write_slots(data, 100, (0x83, 10, 20), (5, 200, 100))
    write_slots(data, 300, (0x83, 10, 20), (5, 0, 100))
    assert "has no end" in table_in(bytes(data)).reason


def test_a_chain_without_partitions_and_without_end() -> None:
    data = mbr_with((5, 100, 16_000))
    for n in range(100, 16_000):
        write_slots(data, n, (0, 0, 0), (5, n - 100 + 1, 1))
    assert "has no end" in table_in(bytes(data)).reason


@pytest.mark.parametrize(
    ("link", "logical", "reason"),
    [
        ((5, 6000, 10), (0x83, 1, 1), "leaves the extended one"),
        ((5, 2**32 - 1, 10), (0x83, 1, 1), "leaves the extended one"),
        ((5, 700, 10), (0x83, 1, 1), "is broken"),
        ((0, 0, 0), (0x83, 0, 10), "partition 5 is not inside the extended one"),
        ((0, 0, 0), (0x83, 10, 6000), "partition 5 is not inside the extended one"),
        ((0, 0, 0), (0x83, 2**32 - 1, 2**32 - 1), "partition 5 is not inside the extended one"),
    ],
)
def test_a_link_that_lies(
    link: tuple[int, int, int], logical: tuple[int, int, int], reason: str
) -> None:
    data = mbr_with((0x83, 50, 10), (5, 100, 5000))
    write_slots(data, 100, logical, link)
    assert reason in table_in(bytes(data)).reason


def test_primary_partitions_that_lie() -> None:
    for entries, reason in [
        ([(0x83, 1, 100), (0x83, 100, 50)], "partitions 1 and 2 overlap"),
        ([(0x83, 1, 100), (5, 50, 500)], "partitions 1 and 2 overlap"),
        ([(0x83, 1, 2**32 - 1)], "is not inside the disk of 16384 sectors"),
        ([(0x83, 0, 10)], "partition 1 (sectors 0 to 9) is not inside"),
    ]:
        assert reason in table_in(bytes(mbr_with(*entries))).reason


def test_a_boot_sector_of_a_file_system_is_no_table() -> None:
    data = mbr_with((0x83, 1, 100))
    data[446] = 0x41  # neither active nor inactive
    assert table_in(bytes(data)) == Table()


def test_what_reading_raises_passes_through() -> None:
    def read(offset: int, length: int) -> bytes:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        parse(read, MIB)


# ---- any bytes at all --------------------------------------------------------------------------


SMALL_GPT = "label: gpt\nsize=1MiB\nsize=2MiB, name=x\nsize=1MiB\n"
SMALL_MBR = """\
label: dos
size=1MiB, type=83
size=1MiB, type=83
size=5MiB, type=5
size=512KiB, type=83
size=512KiB, type=83
"""


_flips = st.lists(st.tuples(st.integers(0, 40 * 512), st.integers(0, 255)), min_size=1, max_size=20)


@settings(deadline=None)
@given(
    flips=_flips, at_end=st.booleans(), repaired=st.booleans(), sector=st.sampled_from([512, 4096])
)
def test_mutated_gpt_tables(
    tmp_path_factory: pytest.TempPathFactory,
    flips: list[tuple[int, int]], at_end: bool, repaired: bool, sector: int,
) -> None:  # fmt: skip
    data = bytearray(_made(tmp_path_factory, "gpt", SMALL_GPT))
    for place, value in flips:
        data[-1 - place if at_end else place] = value
    if repaired:
        gpt_header(data)
    table_in(bytes(data), sector)


_NUMBERS = st.integers(0, 40) | st.integers(16_380, 16_390) | st.integers(0, 2**64 - 1)


@settings(deadline=None)
@given(entries=st.dictionaries(st.integers(0, 15), st.tuples(_NUMBERS, _NUMBERS), max_size=6))
def test_a_gpt_is_shown_as_it_is_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[int, tuple[int, int]]
) -> None:
    """Against a model: sets of sectors that must be inside of the disk and disjoint."""
    data = bytearray(_made(tmp_path_factory, "gpt", SMALL_GPT))
    sectors = len(data) // 512
    data[1024 : 1024 + 16 * 128] = bytes(16 * 128)
    for index, (first, last) in entries.items():
        struct.pack_into("<16s16sQQ", data, 1024 + 128 * index, b"t" * 16, b"", first, last)
    gpt_header(data, count=16)
    inside = all(0 < first <= last < sectors for first, last in entries.values())
    sizes = [last - first + 1 for first, last in entries.values()]
    believable = inside and sum(sizes) == len(
        {n for first, last in entries.values() for n in range(first, last + 1)}
    )
    table = table_in(bytes(data))
    assert bool(table.reason) == (not believable)
    expected = [
        (index + 1, first * 512, (last - first + 1) * 512)
        for index, (first, last) in sorted(entries.items())
    ]
    assert places(table) == (expected if believable else [])


@st.composite
def _chains(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Logical partitions as (sectors between the link and it, its length), in order."""
    return draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=30))


@given(_chains(), st.integers(1, 50))
def test_a_chain_of_logical_partitions(chain: list[tuple[int, int]], first: int) -> None:
    """Every one is found, at its place and with its number, wherever the chain begins."""
    lengths = [gap + length for gap, length in chain]
    data = mbr_with((0x0F, first, sum(lengths) + 1), size=MIB)
    expected, at = [], first
    for index, (gap, length) in enumerate(chain):
        behind = at + gap + length
        more = index + 1 < len(chain)
        link = (5, behind - first, sum(chain[index + 1])) if more else (0, 0, 0)
        write_slots(data, at, (0x83, gap, length), link)
        expected.append((5 + index, (at + gap) * 512, length * 512))
        at = behind
    assert places(table_in(bytes(data))) == expected


@settings(deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 3), st.integers(446, 511), st.integers(0, 255))),
    sector=st.sampled_from([512, 4096]),
)
def test_mutated_mbr_tables(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int, int]], sector: int
) -> None:
    data = bytearray(_made(tmp_path_factory, "mbr", SMALL_MBR))
    extended = [n for n in range(512, len(data), 512) if data[n + 510 : n + 512] == b"\x55\xaa"]
    links = [0, *extended]
    for link, place, value in flips:
        data[links[link % len(links)] + place] = value
    table_in(bytes(data), sector)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 5, 0x0F, 0x83, 0xEE]),
            st.integers(0, 70) | st.integers(0, 2**32 - 1),
            st.integers(0, 70) | st.integers(0, 2**32 - 1),
        ),
        max_size=4 * 64,
    )
)
def test_a_disk_full_of_tables(entries: list[tuple[int, int, int]]) -> None:
    data = bytearray(64 * 512)
    for sector in range(64):
        write_slots(data, sector, *entries[4 * sector : 4 * sector + 4])
    table_in(bytes(data))


_cache: dict[str, bytes] = {}


def _made(factory: pytest.TempPathFactory, name: str, script: str) -> bytes:
    if name not in _cache:
        path = blank(factory.mktemp(name) / "disk", 8 * MIB)
        run(require("sfdisk"), "-q", path, text=script)
        _cache[name] = path.read_bytes()
    return _cache[name]
