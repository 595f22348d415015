"""Listing a tree of many revisions: what `ls` costs, beside a C program that shows the same names.

The floor is passthrough.c, built here: the same library (libfuse), one thread, over a copy of the
tree in memory: directories, links, and files of the same sizes that are all hole. It forwards
questions for extended attributes, as a file system with attributes must; with `noxattr` the kernel
hears once that there are none, which `ls -l` would otherwise ask of every file.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import histories
from bench.backups import OURS
from bench.command import Command, CommandFailed, Process, command, run
from bench.imagefs import PASSTHROUGH, Passthrough
from bench.ledger import Sample
from bench.systems import backyfs_program
from bench.workbench import Workbench

FIRST, ALL = "ls of a new mount", "ls -lR"
BARE = f"{PASSTHROUGH} noxattr"
# Of the listing in full, and of the tree whose first listing is timed, at 2 GiB.
_VMS, _REVISIONS = 200, 60
_MANY_VMS, _MANY_REVISIONS = 1000, 50
_FULL_SIZE = 2 << 30
_START_S = 30.0
_POLL_S = 0.002


def listing(bench: Workbench) -> None:
    """The first `ls` of a large tree, and `ls -lR` of a smaller one beside the floors."""
    with bench.group("listing") as home:
        _take_first(bench, home)
        _take_all(bench, home)


def _scaled(bench: Workbench, count: int) -> int:
    return max(2, min(count, count * bench.options.size // _FULL_SIZE))


def _take_first(bench: Workbench, home: Path) -> None:
    base = home / "many"
    base.mkdir()
    histories.make(base, _scaled(bench, _MANY_VMS), _MANY_REVISIONS)
    for _ in range(bench.options.rounds):
        with _serving(_mount(home, base), home / "mnt") as (point, process):
            wall_s = _seconds(command("ls", point))
            sample = Sample(wall_s=wall_s, rss_bytes=process.peak_bytes)
        bench.enter(FIRST, OURS, sample)
    shutil.rmtree(base)


def _take_all(bench: Workbench, home: Path) -> None:
    base, mirror = home / "base", bench.options.images / "mirror"
    base.mkdir()
    histories.make(base, _scaled(bench, _VMS), _REVISIONS)
    floors = {
        PASSTHROUGH: Passthrough(home / "floor", mirror / "any"),
        BARE: Passthrough(home / "floor", mirror / "any", "noxattr"),
    }
    floors[BARE].prepare()
    servers = {OURS: _mount(home, base)}
    servers |= {side: floor.mount(home / "mnt") for side, floor in floors.items()}
    try:
        with _serving(_mount(home, base), home / "mnt") as (point, _):
            copy_names(point, mirror)
        for _ in range(bench.options.rounds):
            for side, server in servers.items():
                with bench.attempt(ALL, side) as going:
                    if going:
                        bench.enter(ALL, side, _listed(server, home / "mnt"))
    finally:
        shutil.rmtree(mirror, ignore_errors=True)


def _mount(home: Path, base: Path) -> Command:
    where = ("-l", home / "log", "-b", base)
    return command(backyfs_program(), *where, "mount", "--foreground", home / "mnt")


def _listed(server: Command, mountpoint: Path) -> Sample:
    """One `ls -lR` of a server just started, whose records (if any) were read before."""
    with _serving(server, mountpoint) as (point, process):
        for vm in sorted(os.listdir(point)):
            os.listdir(point / vm)
        before_s = process.cpu_s
        wall_s = _seconds(command("ls", "-lR", point))
        cpu_s = process.cpu_s - before_s
        return Sample(wall_s=wall_s, cpu_s=cpu_s, rss_bytes=process.peak_bytes)


def _seconds(what: Command) -> float:
    return run([what]).wall_s


@contextmanager
def _serving(server: Command, mountpoint: Path) -> Iterator[tuple[Path, Process]]:
    """A server in the foreground, once it answers; unmounted at the end."""
    mountpoint.mkdir(exist_ok=True)
    process = Process(server)
    try:
        _wait_for(process, mountpoint)
        yield mountpoint, process
    finally:
        if os.path.ismount(mountpoint):
            run([command("fusermount3", "-u", mountpoint)])
        process.finish(_START_S, check=False)


def _wait_for(process: Process, mountpoint: Path) -> None:
    deadline = time.perf_counter() + _START_S
    while not os.path.ismount(mountpoint):
        if process.wait(_POLL_S):
            process.finish()
            raise CommandFailed(f"mount at {mountpoint}: the server ended")
        if time.perf_counter() > deadline:
            process.kill()
            raise CommandFailed(f"mount at {mountpoint}: not there after {_START_S:.0f} s")


def copy_names(source: Path, target: Path) -> None:
    """Directories, links, and files of the same size without content."""
    target.mkdir()
    with os.scandir(source) as entries:
        for entry in entries:
            to = target / entry.name
            if entry.is_symlink():
                to.symlink_to(os.readlink(entry.path))
            elif entry.is_dir():
                copy_names(source / entry.name, to)
            else:
                status = entry.stat()
                with to.open("xb") as stream:
                    stream.truncate(status.st_size)
                os.utime(to, ns=(status.st_mtime_ns, status.st_mtime_ns))
