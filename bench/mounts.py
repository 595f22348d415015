"""Mounts measured: until the first byte, sequential reads, single random reads.

Each is measured on a server of its own, just started, so that neither its cache nor the kernel's
holds anything. The reader is the same for all sides, also for the image itself. Beside the backup
programs stand file systems that decode the same image in C (imagefs.py), and what decoding our
packs takes without any file system. Processor time is the server's during the reads; what its start
costs is in the line of the first byte, which has no bar against other programs: it is the start of
an interpreter.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench.backups import OURS
from bench.command import Command, CommandFailed, Process, command, run
from bench.footprint import warm
from bench.imagefs import DECODERS, ImageFs
from bench.ledger import Sample
from bench.restores import stores
from bench.systems import Backyfs, System
from bench.workbench import Workbench

FIRST_BYTE, SEQUENTIAL, RANDOM = "mount first byte", "mount sequential", "mount random 4k"
DEEP = "mount random 4k, 16 at once"
IMAGE = "the image itself"
DECODED = "zstd -dc of the packs"
READS = 1000

_CHUNK, _PAGE = 1 << 20, 4096
_START_S = 60.0
_POLL_S = 0.001
_DEPTH, _DEEP_READS = 16, 16000
_READ_AHEAD_KIB = 1024

Reads = Callable[[Path, int], float]


class Server:
    """A store being served. `ready_s`: seconds from process start to the image's first byte.

    `rss_bytes`, its peak memory, is known when it has ended.
    """

    def __init__(self, process: Process, image: Path) -> None:
        self._process = process
        self.image = image
        self.ready_s = 0.0
        self.rss_bytes = 0

    def timed(self, reads: Reads, seed: int) -> Sample:
        """Seconds the reader waited, and processor time the server took for it."""
        before_s = self._process.cpu_s
        seconds = reads(self.image, seed)
        return Sample(wall_s=seconds, cpu_s=self._process.cpu_s - before_s)


@contextmanager
def served(system: System | ImageFs, place: Path) -> Iterator[Server]:
    """The newest backup of a system, mounted at `place`; unmounted at the end."""
    mountpoint = system.mountpoint(place)
    process = Process(system.mount(mountpoint))
    server = Server(process, system.mounted(mountpoint))
    peak_bytes = 0
    try:
        server.ready_s = _wait_for(process, server.image)
        _read_ahead(mountpoint)
        yield server
        peak_bytes = process.peak_bytes
    finally:
        if os.path.ismount(mountpoint):
            run([command("fusermount3", "-u", mountpoint)])
        if isinstance(system, ImageFs):  # qemu's daemon would go on without its export
            process.terminate()
        cost = process.finish(_START_S, check=False)
        server.rss_bytes = max(cost.rss_bytes, peak_bytes)


def _wait_for(process: Process, image: Path) -> float:
    started = time.perf_counter()
    while not _first_byte(image):
        waited_s = time.perf_counter() - started
        if process.wait(_POLL_S):
            process.finish()
            raise CommandFailed(f"mount for {image}: the server ended")
        if waited_s > _START_S:
            process.kill()
            raise CommandFailed(f"mount for {image}: not there after {_START_S:.0f} s")
    return time.perf_counter() - started


def _read_ahead(mountpoint: Path) -> None:
    """Have the kernel read ahead as far as it does on our mount, where root may say so."""
    device = os.stat(mountpoint).st_dev
    bdi = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    if os.geteuid() == 0 and bdi.exists():
        bdi.write_text(str(_READ_AHEAD_KIB))


def _first_byte(image: Path) -> bool:
    try:
        with image.open("rb", buffering=0) as stream:
            return len(stream.read(1)) == 1
    except OSError:
        return False


def read_all(image: Path, seed: int) -> float:
    """Seconds that reading the whole image takes, 1 MiB at a time."""
    del seed
    buffer = bytearray(_CHUNK)
    started = time.perf_counter()
    with image.open("rb", buffering=0) as stream:
        size = 0
        while count := stream.readinto(buffer):
            size += count
    seconds = time.perf_counter() - started
    if size != image.stat().st_size:
        raise CommandFailed(f"{image}: {size} bytes read")
    return seconds


def read_pages(image: Path, seed: int) -> float:
    """Seconds that 1000 reads of 4 KiB at random places take, one after the other."""
    pages = image.stat().st_size // _PAGE
    places = [page * _PAGE for page in random.Random(seed).choices(range(pages), k=READS)]
    fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        started = time.perf_counter()
        for place in places:
            os.pread(fd, _PAGE, place)
        return time.perf_counter() - started
    finally:
        os.close(fd)


def read_pages_at_once(image: Path, seed: int) -> float:
    """Seconds that 16000 reads of 4 KiB at random places take, 16 of them at any time (fio)."""
    fio = shutil.which("fio")
    if fio is None:
        raise CommandFailed("16 reads at once: fio is not installed")
    options = {
        "name": "deep",
        "filename": image,
        "readonly": "",
        "rw": "randread",
        "bs": _PAGE,
        "ioengine": "psync",
        "thread": "",
        "numjobs": _DEPTH,
        "number_ios": _DEEP_READS // _DEPTH,
        "randseed": seed + 1,
        "invalidate": 0,
        "group_reporting": "",
        "output-format": "json",
    }
    words = [f"--{name}={value}" if value != "" else f"--{name}" for name, value in options.items()]
    with tempfile.NamedTemporaryFile() as answer:
        run([Command((fio, *words), stdout=Path(answer.name))])
        read = json.loads(Path(answer.name).read_bytes())["jobs"][0]["read"]
    return float(read["total_ios"] / read["iops"])


def take_plain(bench: Workbench, line: str, image: Path, reads: Reads, seed: int) -> None:
    """Measure the reader on a plain file."""
    bench.enter(line, IMAGE, Sample(wall_s=reads(image, seed)))


def take_mount(
    bench: Workbench,
    line: str,
    side: str,
    where: tuple[System | ImageFs, Path],
    reads: Reads,
    seed: int,
) -> None:
    """Measure the reader on a system that serves at a mountpoint, and how long it took to start."""
    system, mountpoint = where
    warm(system.home)
    with bench.attempt(line, side) as going:
        if not going or bench.ledger.failed(FIRST_BYTE, side):
            return
        with served(system, mountpoint) as server:
            sample = server.timed(reads, seed)
        bench.enter(line, side, replace(sample, rss_bytes=server.rss_bytes))
        if line == RANDOM:
            bench.enter(FIRST_BYTE, side, Sample(wall_s=server.ready_s))


def mount(bench: Workbench) -> None:
    """Every side serves the same image; every reading has a fresh server."""
    with bench.group("mount") as home:
        systems: dict[str, System | ImageFs] = {**stores(bench, FIRST_BYTE, home)}
        for side, system in systems.items():
            with bench.attempt(FIRST_BYTE, side):
                run(system.mount_steps())
        for kind in DECODERS:
            if kind.present():
                decoder = kind(home / kind.__name__.lower(), bench.disk)
                with bench.attempt(FIRST_BYTE, kind.name):
                    decoder.prepare()
                    systems[kind.name] = decoder
        for number in range(bench.options.rounds):
            _take_decoded(bench, systems[OURS])
            for line, reads in ((SEQUENTIAL, read_all), (RANDOM, read_pages)):
                take_plain(bench, line, bench.disk, reads, number)
                for side, system in systems.items():
                    take_mount(bench, line, side, (system, home / "mnt"), reads, number)


def _take_decoded(bench: Workbench, store: System | ImageFs) -> None:
    """Decode our packs with one thread and no file system."""
    assert isinstance(store, Backyfs)
    packs = sorted((store.directory / "packs").iterdir())
    warm(*packs)
    bench.take(SEQUENTIAL, DECODED, [command("zstd", "-dcq", "--single-thread", *packs)])
