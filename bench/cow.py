"""The `cow` store measured on file systems that share blocks: btrfs and XFS on loop devices.

The floor is what an administrator would do by hand: `cp --reflink` of the previous state, then
write the changed blocks. Stored bytes are the growth of the file system in use.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import floors
from bench.backups import LISTED, OURS, OWN_FULL
from bench.command import command, durable, run
from bench.footprint import SpaceGrowth
from bench.imagefs import PASSTHROUGH, ImageFs, Passthrough
from bench.mounts import (
    DEEP,
    IMAGE,
    RANDOM,
    SEQUENTIAL,
    read_all,
    read_pages,
    read_pages_at_once,
    take_mount,
    take_plain,
)
from bench.systems import Backyfs, System
from bench.workbench import Workbench

FILE_SYSTEMS = {"btrfs": ("mkfs.btrfs", "-q"), "xfs": ("mkfs.xfs", "-q", "-m", "reflink=1")}
PATTERNS = ("random4k", "clustered")
# Smaller ones are refused (XFS) or differ in layout (btrfs).
_LEAST_BYTES = 2 << 30
_IMAGES_HELD = 5


def line(file_system: str, what: str) -> str:
    """Name of a line of this group."""
    return f"cow {file_system} {what}"


def cow(bench: Workbench) -> None:
    """Full backups, increments and mounts of a `cow` store, on each file system."""
    for name, mkfs in FILE_SYSTEMS.items():
        if os.geteuid() != 0 or not shutil.which(mkfs[0]):
            bench.ledger.fail(line(name, "random4k"), OURS, f"needs root and {mkfs[0]}")
            continue
        with bench.group(f"cow-{name}") as home, file_system(bench, home, mkfs) as place:
            _measure(bench, name, place)


@contextmanager
def file_system(bench: Workbench, home: Path, mkfs: tuple[str, ...]) -> Iterator[Path]:
    """A new file system on a loop device, mounted."""
    backing, place = home / "backing", home / "fs"
    place.mkdir()
    with backing.open("wb") as stream:
        stream.truncate(_LEAST_BYTES + _IMAGES_HELD * bench.options.size)
    run([command(*mkfs, backing), command("mount", "-o", "loop", backing, place)])
    try:
        yield place
    finally:
        run([command("umount", place)])


def _measure(bench: Workbench, name: str, place: Path) -> None:
    scan = Backyfs(place / "scan", bench.disk, store="cow")
    listed = Backyfs(place / "changes", bench.disk, store="cow")
    by_hand = place / "by-hand.img"
    for system in (scan, listed):
        system.prepare()
        run([system.backup()])
    run([floors.copy(bench.disk, by_hand), durable(place)])
    for pattern in PATTERNS:
        for number in range(bench.options.rounds):
            listed.changes = bench.change(pattern, number + 1)
            _take_full(bench, line(name, pattern), place)
            _take_clone(bench, line(name, pattern), by_hand, listed.changes)
            for side, system in ((OURS, scan), (LISTED, listed)):
                steps = [system.backup(), durable(place)]
                bench.take(line(name, pattern), side, steps, SpaceGrowth(place))
    _measure_mounts(bench, name, scan, by_hand)


def _measure_mounts(bench: Workbench, name: str, store: Backyfs, plain: Path) -> None:
    """Our mount beside a C program that hands out the same bytes; and the file itself."""
    at = plain.parent.parent
    floor = Passthrough(at / "passthrough", plain, "threads")
    floor.prepare()
    sides: dict[str, System | ImageFs] = {OURS: store, PASSTHROUGH: floor}
    readings = {SEQUENTIAL: read_all, RANDOM: read_pages, DEEP: read_pages_at_once}
    for number in range(bench.options.rounds):
        for what, reads in readings.items():
            with bench.attempt(line(name, what), IMAGE):
                take_plain(bench, line(name, what), plain, reads, number)
            for side, system in sides.items():
                take_mount(bench, line(name, what), side, (system, at / "mnt"), reads, number)


def _take_full(bench: Workbench, where: str, place: Path) -> None:
    system = Backyfs(place / "full", bench.disk, store="cow")
    system.prepare()
    steps = [system.backup(), durable(place)]
    bench.take(where, OWN_FULL, steps, SpaceGrowth(place))
    system.remove()
    # The file system frees blocks later; this shall not fall into the next measurement.
    run([durable(place)])


def _take_clone(bench: Workbench, where: str, by_hand: Path, changes: Path) -> None:
    clone = by_hand.with_suffix(".new")
    steps = [*floors.clone(by_hand, clone, bench.disk, changes), durable(by_hand.parent)]
    bench.take(where, floors.CLONE, steps, SpaceGrowth(by_hand.parent))
    clone.replace(by_hand)
