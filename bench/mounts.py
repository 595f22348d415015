"""Mounts measured: until the first byte, sequential reads, single random reads.

Each is measured on a server of its own, just started, so that neither its cache nor the kernel's
holds anything. The reader is the same for all sides, also for the image itself, which is the
floor. Processor time is the server's during the reads; what its start costs is in the line of the
first byte, which has no bar against other programs: it is the start of an interpreter.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench.command import CommandFailed, Process, command, run
from bench.footprint import warm
from bench.ledger import Sample
from bench.restores import stores
from bench.systems import System
from bench.workbench import Workbench

FIRST_BYTE, SEQUENTIAL, RANDOM = "mount first byte", "mount sequential", "mount random 4k"
IMAGE = "the image itself"
READS = 1000

_CHUNK, _PAGE = 1 << 20, 4096
_START_S = 60.0
_POLL_S = 0.001

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
        before_s = cpu_s_of(self._process.pid)
        seconds = reads(self.image, seed)
        return Sample(wall_s=seconds, cpu_s=cpu_s_of(self._process.pid) - before_s)


@contextmanager
def served(system: System, mountpoint: Path) -> Iterator[Server]:
    """The newest backup of a system, mounted; unmounted at the end."""
    mountpoint.mkdir(exist_ok=True)
    process = Process(system.mount(mountpoint))
    server = Server(process, system.mounted(mountpoint))
    peak_bytes = 0
    try:
        server.ready_s = _wait_for(process, server.image)
        yield server
        peak_bytes = peak_bytes_of(process.pid)
    finally:
        if os.path.ismount(mountpoint):
            run([command("fusermount3", "-u", mountpoint)])
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


def _first_byte(image: Path) -> bool:
    try:
        with image.open("rb", buffering=0) as stream:
            return len(stream.read(1)) == 1
    except OSError:
        return False


def peak_bytes_of(pid: int) -> int:
    """VmHWM of a process; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def cpu_s_of(pid: int) -> float:
    """User and system time of all threads of a process, so far."""
    # Behind the name, which is in brackets: fields 14 and 15 of proc(5).
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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


def take_plain(bench: Workbench, line: str, image: Path, reads: Reads, seed: int) -> None:
    """Measure the reader on a plain file."""
    bench.enter(line, IMAGE, Sample(wall_s=reads(image, seed)))


def take_mount(
    bench: Workbench, line: str, side: str, where: tuple[System, Path], reads: Reads, seed: int
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
        systems = stores(bench, FIRST_BYTE, home)
        for side, system in systems.items():
            with bench.attempt(FIRST_BYTE, side):
                run(system.mount_steps())
        for number in range(bench.options.rounds):
            for line, reads in ((SEQUENTIAL, read_all), (RANDOM, read_pages)):
                take_plain(bench, line, bench.disk, reads, number)
                for side, system in systems.items():
                    take_mount(bench, line, side, (system, home / "mnt"), reads, number)
