"""Restores measured: of a full backup and of the last of many generations."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from bench import floors
from bench.backups import OURS
from bench.command import command, durable, run
from bench.footprint import warm
from bench.systems import Backyfs, System
from bench.workbench import Workbench

TO_NULL, TO_FILE = "restore to null", "restore to file"
LATER = "backyfs later"


def later_generation(bench: Workbench, home: Path) -> Backyfs:
    """A store whose newest revision is the last of many generations; of the disk as it is then."""
    system = Backyfs(home, bench.disk)
    system.prepare()
    run([system.backup()])
    for generation in range(bench.options.generations):
        system.changes = bench.change("random4k", generation + 1)
        run([system.backup()])
    return system


def stores(bench: Workbench, line: str, home: Path) -> dict[str, System]:
    """Stores of all sides that hold the disk as it is now."""
    systems: dict[str, System] = {}
    with bench.attempt(line, LATER):
        systems[LATER] = later_generation(bench, home / "later")
    sides: dict[str, System] = {OURS: Backyfs(home / "full", bench.disk)}
    sides.update({peer.name: peer for peer in bench.peers(home)})
    for side, system in sides.items():
        with bench.attempt(line, side):
            system.prepare()
            run([system.backup()])
            systems[side] = system
    return systems


def restore(bench: Workbench) -> None:
    """Write the newest backup to /dev/null and to a file."""
    with bench.group("restore") as home:
        systems = stores(bench, TO_NULL, home)
        packed = home / "disk.zst"
        run([floors.compress(bench.disk, packed)])
        for _ in range(bench.options.rounds):
            _take_null(bench, packed, systems)
            _take_file(bench, home / "target", systems)


def _take_null(bench: Workbench, packed: Path, systems: Mapping[str, System]) -> None:
    warm(packed)
    bench.take(TO_NULL, floors.UNZSTD, [floors.decompress(packed)])
    for side, system in systems.items():
        step = system.restore_null()
        if step is not None:
            warm(system.home)
            bench.take(TO_NULL, side, [step])


def _take_file(bench: Workbench, target: Path, systems: Mapping[str, System]) -> None:
    target.mkdir()
    step = floors.copy(bench.disk, target / bench.disk.name)
    bench.take(TO_FILE, floors.COPY, [step, durable(target)])
    _remove(target)
    for side, system in systems.items():
        warm(system.home)
        target.mkdir()
        bench.take(TO_FILE, side, [system.restore_file(target), durable(target)])
        with bench.attempt(TO_FILE, side) as going:
            if going:
                run([command("cmp", bench.disk, system.restored(target))])
        _remove(target)


def _remove(target: Path) -> None:
    shutil.rmtree(target)
    # The file system frees blocks later; this shall not fall into the next measurement.
    run([durable(target.parent)])
