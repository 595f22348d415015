"""Backups measured: full, unchanged, and increments of changes at random or in clusters."""

from __future__ import annotations

from pathlib import Path

from bench import floors
from bench.command import command, durable, run
from bench.footprint import FileGrowth
from bench.ledger import Sample
from bench.systems import Backyfs, System
from bench.workbench import Workbench

FULL, UNCHANGED = "full", "unchanged"
OURS, VERIFIED, LISTED = "backyfs", "backyfs verify", "backyfs changes"
OWN_FULL = "a full by backyfs"
UNCHANGED_LATER = "unchanged later"
GC = "gc"


def full(bench: Workbench) -> None:
    """Every round makes new stores of the same image."""
    with bench.group(FULL) as home:
        for _ in range(bench.options.rounds):
            bench.take(FULL, floors.CAT, [floors.cat(bench.disk)])
            _compress(bench, FULL, home)
            take_full(bench, FULL, OURS, Backyfs(home / "b", bench.disk))
            take_full(bench, FULL, VERIFIED, Backyfs(home / "v", bench.disk, verify=True))
            for peer in bench.peers(home):
                take_full(bench, FULL, peer.name, peer)


def _compress(bench: Workbench, line: str, home: Path) -> None:
    target = home / "zstd"
    target.mkdir()
    steps = [floors.compress(bench.disk, target / "disk.zst"), durable(target)]
    bench.take(line, floors.ZSTD, steps, FileGrowth(target))
    run([command("rm", "-r", target), durable(home)])


def take_full(bench: Workbench, line: str, side: str, system: System) -> None:
    """Measure a backup into a new store, which goes afterwards."""
    with bench.attempt(line, side) as going:
        if going:
            system.prepare()
            take_backup(bench, line, side, system)
    system.remove()
    # The file system frees blocks later; this shall not fall into the next measurement.
    run([durable(bench.options.work)])


def take_backup(bench: Workbench, line: str, side: str, system: System) -> None:
    """Measure a backup into the store that a system has."""
    steps = [system.backup(), durable(system.home)]
    bench.take(line, side, steps, FileGrowth(system.home))


def unchanged(bench: Workbench) -> None:
    """Backups of a disk whose time of change is new and whose bytes are not.

    Programs that trust that time have to read; for a running machine's disk they always must.
    """
    with bench.group(UNCHANGED) as home:
        sides = _started(bench, UNCHANGED, home)
        _take_unchanged(bench, UNCHANGED, sides)


def _take_unchanged(bench: Workbench, line: str, sides: dict[str, System]) -> None:
    nothing = bench.no_changes()
    for _ in range(bench.options.rounds):
        bench.disk.touch()
        bench.take(line, floors.CAT, [floors.cat(bench.disk)])
        _take_sides(bench, line, sides, nothing)


def _started(bench: Workbench, line: str, home: Path) -> dict[str, System]:
    """Every side of an incremental line with a first full backup."""
    systems: dict[str, System] = {
        OURS: Backyfs(home / "scan", bench.disk),
        LISTED: Backyfs(home / "changes", bench.disk),
    }
    systems.update({peer.name: peer for peer in bench.peers(home)})
    for side, system in systems.items():
        with bench.attempt(line, side):
            system.prepare()
            run([system.backup()])
    return systems


def _take_sides(
    bench: Workbench, line: str, sides: dict[str, System], changes: Path, *, peers: bool = True
) -> None:
    for side, system in sides.items():
        if isinstance(system, Backyfs):
            system.changes = changes if side == LISTED else None
        elif not peers:
            continue
        take_backup(bench, line, side, system)


def random4k(bench: Workbench) -> None:
    """Generations of single 4 KiB blocks; what they store must not grow with their number."""
    line = "random4k"
    with bench.group(line) as home:
        sides = _started(bench, line, home)
        for generation in range(bench.options.generations):
            changes = bench.change("random4k", generation + 1)
            alone = floors.blocks_alone(bench.disk, changes)
            bench.enter(line, floors.ALONE, Sample(stored_bytes=alone))
            measured = generation < bench.options.rounds
            if measured:
                take_full(bench, line, OWN_FULL, Backyfs(home / "full", bench.disk))
            # The peers grow by a full's worth each time; their later generations say no more.
            _take_sides(bench, line, sides, changes, peers=measured)
        own = {side: system for side, system in sides.items() if isinstance(system, Backyfs)}
        _take_unchanged(bench, UNCHANGED_LATER, dict(own))
        _take_gc(bench, own[OURS])


def _take_gc(bench: Workbench, system: Backyfs) -> None:
    """What memory collecting garbage takes when half of the revisions are gone."""
    newest_gone = bench.options.generations // 2 + 1
    with bench.attempt(GC, OURS):
        run([system.command("forget", "--yes", "-r", f"first..{newest_gone}")])
    bench.take(GC, OURS, [system.gc(), durable(system.home)])


def clustered(bench: Workbench) -> None:
    """Generations of longer extents in a few hot areas."""
    line = "clustered"
    with bench.group(line) as home:
        sides = _started(bench, line, home)
        for generation in range(bench.options.rounds):
            changes = bench.change("clustered", generation + 1)
            together = floors.changes_together(bench.disk, changes)
            bench.enter(line, floors.TOGETHER, Sample(stored_bytes=together))
            take_full(bench, line, OWN_FULL, Backyfs(home / "full", bench.disk))
            _take_sides(bench, line, sides, changes)
