"""Deterministic, realistic disk images, and changes to them.

    python -m bench.mkimage --size 2G --seed 1 disk.img
    python -m bench.mkimage --size 2G --seed 2 --sibling-of 1 other.img
    python -m bench.mkimage --size 1T --data 1G --seed 1 huge.img
    python -m bench.mkimage --change 0.01 --pattern random4k --seed 7 disk.img
    python -m bench.mkimage --change 0.01 --pattern clustered --extents changes.json disk.img

The same arguments (and, for --change, the same prior content) make the same bytes with any number
of --jobs. An image starts with a valid protective MBR and GPT (one partition from 1 MiB to the
end) and ends with the backup GPT; what lies between is bench/content.py.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import struct
import sys
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.content import BLOCK, PAGE, PAGES_PER_BLOCK, Random, block, fresh, rng
from bench.content import vocabulary as vocabulary_of

SECTOR = 512
PATTERNS = ("random4k", "clustered", "append")
# Neither the partition table at the start nor its backup at the end is changed.
_HEAD_PAGES, _TAIL_PAGES = 512, 16
_BOOT_GAP = 1 << 20
_MISSES_MAX = 1000
"""After so many extents in a row that found no room the hot areas count as full."""
_LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}


@dataclass(frozen=True, slots=True)
class Plan:
    """An image to be made. `size` and `data` are bytes, `size` a multiple of 512.

    The template's blocks (`data` bytes of them, default: `size`) are spread evenly over `size`.
    With `sibling_of`, about `share` of them are that template's, the others are `seed`'s own.
    """

    size: int
    seed: int = 1
    data: int = 0
    sibling_of: int | None = None
    share: float = 0.6
    sparse: bool = True

    @property
    def blocks(self) -> int:
        """Blocks of the template that the image holds."""
        return -(-min(self.data or self.size, self.size) // BLOCK)

    def place(self, number: int) -> int:
        """Offset of a template's block in the image."""
        return number * (self.size // BLOCK // self.blocks or 1) * BLOCK

    def template(self, number: int) -> int:
        """Seed of the template that a block comes from."""
        if self.sibling_of is None:
            return self.seed
        ours = rng("sibling", self.sibling_of, self.seed, number).random() >= self.share
        return self.seed if ours else self.sibling_of


def create(image: Path, plan: Plan, jobs: int = 1) -> None:
    """Make `image`, replacing what is there."""
    if plan.size <= 0 or plan.size % SECTOR:
        raise ValueError(f"size {plan.size} is not a positive multiple of {SECTOR}")
    with _opened(image, os.O_CREAT | os.O_TRUNC) as fd:
        os.ftruncate(fd, plan.size)
        for seed in {plan.seed, plan.sibling_of} - {None}:
            vocabulary_of(seed or 0)  # made once, then shared by the forked workers
        tasks = [(image, plan, first, jobs) for first in range(jobs)]
        if jobs == 1:
            _write_blocks(*tasks[0])
        else:
            with multiprocessing.get_context("fork").Pool(jobs) as pool:
                pool.starmap(_write_blocks, tasks)
        if plan.size >= 2 << 20:
            head, tail = partition_table(plan.size, plan.seed)
            os.pwrite(fd, head, 0)
            os.pwrite(fd, tail, plan.size - len(tail))


@contextmanager
def _opened(image: Path, flags: int = 0) -> Iterator[int]:
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC | flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def _write_blocks(image: Path, plan: Plan, first: int, step: int) -> None:
    """Write every `step`th block from `first` on."""
    with _opened(image) as fd:
        for number in range(first, plan.blocks, step):
            data = block(plan.template(number), number)
            if data is None and plan.sparse:
                continue
            data = data or bytes(BLOCK)
            if number == 0:
                data = bytes(_BOOT_GAP) + data[_BOOT_GAP:]
            offset = plan.place(number)
            os.pwrite(fd, data[: plan.size - offset], offset)


def partition_table(size: int, seed: int) -> tuple[bytes, bytes]:
    """First (17 KiB) and last (16.5 KiB) bytes of a disk with a GPT and one Linux partition."""
    r = rng("gpt", seed)
    disk, partition = (uuid.UUID(int=r.getrandbits(128), version=4).bytes_le for _ in range(2))
    sectors = size // SECTOR
    last = sectors - 34
    bounds = struct.pack("<QQQ", 2048, max(last // 2048 * 2048 - 1, 2048), 0)
    name = "root".encode("utf-16-le").ljust(72, b"\0")
    entries = (_LINUX.bytes_le + partition + bounds + name).ljust(128 * 128, b"\0")

    def header(own: int, other: int, table: int) -> bytes:
        places = struct.pack("<QQQQ16sQ", own, other, 34, last, disk, table)
        tail = places + struct.pack("<III", 128, 128, zlib.crc32(entries))
        start = struct.pack("<8sII", b"EFI PART", 0x10000, 92)
        crc = zlib.crc32(start + bytes(8) + tail)
        return (start + struct.pack("<II", crc, 0) + tail).ljust(SECTOR, b"\0")

    return (
        _protective_mbr(sectors) + header(1, sectors - 1, 2) + entries,
        entries + header(sectors - 1, 1, sectors - 33),
    )


def _protective_mbr(sectors: int) -> bytes:
    entry = (0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, min(sectors - 1, 0xFFFFFFFF))
    return bytes(446) + struct.pack("<B3sB3sII", *entry).ljust(64, b"\0") + b"\x55\xaa"


@dataclass(frozen=True, slots=True)
class Change:
    """A change to make in place: `fraction` (0 to 0.5) of the image's pages, in one of PATTERNS.

    random4k: single pages anywhere · clustered: extents of 64 KiB to 4 MiB in few hot areas ·
    append: blocks that were zero, lowest first.
    """

    fraction: float
    pattern: str = "random4k"
    seed: int = 1


def change(image: Path, what: Change) -> list[tuple[int, int]]:
    """Change `image` in place; return the extents written as (offset, length), sorted."""
    if not 0 < what.fraction <= 0.5:
        raise ValueError(f"fraction {what.fraction} is not between 0 and 0.5")
    with _opened(image) as fd:
        pages = os.fstat(fd).st_size // PAGE
        if pages <= _HEAD_PAGES + _TAIL_PAGES:
            raise ValueError(f"{image} is too small to be changed")
        wanted = max(1, int(pages * what.fraction + 0.5))
        r = rng("change", what.pattern, what.seed)
        written = _PLACES[what.pattern](fd, r, pages, wanted)
        words = vocabulary_of(what.seed)
        extents = []
        for page, count in written:
            os.pwrite(fd, fresh(r, words, count * PAGE), page * PAGE)
            extents.append((page * PAGE, count * PAGE))
    return sorted(extents)


def _random_pages(fd: int, r: Random, pages: int, wanted: int) -> Iterator[tuple[int, int]]:
    done: set[int] = set()
    while len(done) < wanted:
        page = _HEAD_PAGES + int(r.random() * (pages - _HEAD_PAGES - _TAIL_PAGES))
        if page not in done:
            done.add(page)
            yield page, 1


def _clusters(fd: int, r: Random, pages: int, wanted: int) -> Iterator[tuple[int, int]]:
    hot = [int(r.random() * pages) for _ in range(max(2, wanted // 4096))]
    done: set[int] = set()
    misses = 0
    while len(done) < wanted:
        count = min(wanted - len(done), 16 << int(r.random() * 7))
        page = hot[int(r.random() * len(hot))] + int(r.random() * 4096)
        room = max(1, pages - _HEAD_PAGES - _TAIL_PAGES - count)
        extent = range(_HEAD_PAGES + page % room, _HEAD_PAGES + page % room + count)
        if done.isdisjoint(extent):
            done.update(extent)
            misses = 0
            yield extent.start, count
        elif (misses := misses + 1) == _MISSES_MAX:
            hot.append(int(r.random() * pages))
            misses = 0


def _zero_blocks(fd: int, r: Random, pages: int, wanted: int) -> Iterator[tuple[int, int]]:
    zero = bytes(BLOCK)
    for number in range(1, pages // PAGES_PER_BLOCK):
        if wanted <= 0:
            return
        if os.pread(fd, BLOCK, number * BLOCK) == zero:
            count = min(wanted, PAGES_PER_BLOCK)
            yield number * PAGES_PER_BLOCK, count
            wanted -= count


_PLACES = {"random4k": _random_pages, "clustered": _clusters, "append": _zero_blocks}


def write_extents(target: Path, extents: Sequence[tuple[int, int]]) -> None:
    """List extents as `rbd diff --format json` does."""
    rows = [{"offset": offset, "length": length, "exists": "true"} for offset, length in extents]
    target.write_text(json.dumps(rows))


def parse_size(text: str) -> int:
    """Bytes in a size such as 4096, 512M or 2GiB."""
    number = text.upper().removesuffix("B").removesuffix("I")
    shift = _UNITS.get(number[-1:], 0)
    return int(float(number[:-1] if shift else number) * (1 << shift))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mkimage", description="Make or change a disk image.")
    parser.add_argument("image", type=Path)
    parser.add_argument("--size", type=parse_size, help="create: bytes, or 512M, 2G …")
    parser.add_argument("--data", type=parse_size, default=0, help="create: spread only so much")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sibling-of", type=int, metavar="SEED", help="create: same template")
    parser.add_argument("--share", type=float, default=0.6, help="share of the sibling's blocks")
    parser.add_argument("--no-sparse", action="store_true", help="write zeros instead of holes")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--change", type=float, metavar="FRACTION", help="change it in place")
    parser.add_argument("--pattern", choices=PATTERNS, default="random4k")
    parser.add_argument("--extents", type=Path, metavar="FILE", help="change: list what changed")
    arguments = parser.parse_args(argv)
    if arguments.change is None and (not arguments.size or arguments.size % SECTOR):
        parser.error(f"--size (a multiple of {SECTOR}) or --change is needed")
    return arguments


def _make(arguments: argparse.Namespace) -> int:
    """Do what the arguments say; return the bytes made or changed."""
    if arguments.change is None:
        plan = Plan(
            size=arguments.size,
            seed=arguments.seed,
            data=arguments.data,
            sibling_of=arguments.sibling_of,
            share=arguments.share,
            sparse=not arguments.no_sparse,
        )
        create(arguments.image, plan, arguments.jobs)
        return plan.size
    what = Change(arguments.change, arguments.pattern, arguments.seed)
    extents = change(arguments.image, what)
    if arguments.extents:
        write_extents(arguments.extents, extents)
    return sum(length for _, length in extents)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    arguments = _arguments(argv)
    started = time.monotonic()
    try:
        size = _make(arguments)
    except (OSError, ValueError) as exc:
        print(f"mkimage: {exc}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - started
    rate = size / seconds / 1e6
    print(f"{size} bytes in {seconds:.2f} s ({rate:.0f} MB/s)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
