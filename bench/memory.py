"""Memory and time on a disk that is nearly all hole: they must follow its data, not its size.

The disk has 512 times the size of the bench's image (1 TiB at 2 GiB) and the blocks of an image of
three quarters of it, spread evenly: at 2 GiB that is 1 GiB which is not zero. A small image of the
same blocks, one behind the other, is what its backup is compared with.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench.backups import OURS, VERIFIED, take_full
from bench.command import command, durable, run
from bench.footprint import warm
from bench.mounts import Reads, read_pages, served
from bench.systems import Backyfs
from bench.workbench import Workbench

BACKUP, GC, RESTORE, MOUNT = "sparse backup", "sparse gc", "sparse restore", "sparse mount"
SMALL = "same data, no holes"
# Time of the sparse disk's backup over that of the small image with the same data.
LIMIT = 1.5
_FACTOR = 512
_CHUNK = 1 << 20


def memory(bench: Workbench) -> None:
    """Backup, gc, restore and mount of the sparse disk."""
    size = bench.options.size
    data = size * 3 // 4 // (4 << 20) * (4 << 20)
    with bench.group("memory") as home:
        small, huge = bench.disk.with_name("small.img"), bench.disk.with_name("huge.img")
        try:
            bench.disk.unlink()
            bench.make_image(small, data)
            bench.make_image(huge, size * _FACTOR, data=data)
            for _ in range(bench.options.rounds):
                take_full(bench, BACKUP, SMALL, Backyfs(home / "small", small))
                take_full(bench, BACKUP, OURS, Backyfs(home / "huge", huge))
            _take_others(bench, home, huge)
        finally:
            small.unlink(missing_ok=True)
            huge.unlink(missing_ok=True)


def _take_others(bench: Workbench, home: Path, huge: Path) -> None:
    """What is measured once, for its memory: verified backup, gc, restore, mount."""
    system = Backyfs(home / "kept", huge, verify=True)
    system.prepare()
    bench.take(BACKUP, VERIFIED, [system.backup(), durable(home)])
    bench.take(GC, OURS, [system.gc(), durable(home)])
    warm(system.home)
    target = home / "target"
    target.mkdir()
    bench.take(RESTORE, OURS, [system.restore_file(target), durable(home)])
    run([command("rm", "-r", target)])
    with bench.attempt(MOUNT, OURS):
        with served(system, home / "mnt") as server:
            sample = server.timed(_reads_data_of(huge), 1)
        bench.enter(MOUNT, OURS, replace(sample, rss_bytes=server.rss_bytes))


def _reads_data_of(original: Path) -> Reads:
    """A reader of what is data in the sparse file `original`, and of pages anywhere."""

    def reads(image: Path, seed: int) -> float:
        started = time.perf_counter()
        _read_data(image, original)
        return time.perf_counter() - started + read_pages(image, seed)

    return reads


def _read_data(image: Path, original: Path) -> None:
    """Read from `image` what is data in the sparse file `original`."""
    with image.open("rb", buffering=0) as stream:
        for start, end in _data(original):
            stream.seek(start)
            for _ in range(start, end, _CHUNK):
                stream.read(_CHUNK)


def _data(sparse: Path) -> Iterator[tuple[int, int]]:
    with sparse.open("rb") as stream:
        end, size = 0, sparse.stat().st_size
        while end < size:
            try:
                start = os.lseek(stream.fileno(), end, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                return
            end = os.lseek(stream.fileno(), start, os.SEEK_HOLE)
            yield start, end
