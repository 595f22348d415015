"""NBD measured: whole images by nbdcopy, random pages by fio, next to other servers.

Every measurement has a server of its own, just started, on the loopback. The client is the same
for all sides. Processor time is the server's while the client runs; wall time is the client's from
start to end. What a side serves lies in the page cache.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import cow
from bench.backups import OURS
from bench.command import Command, CommandFailed, Process, command, run
from bench.footprint import warm
from bench.ledger import Sample
from bench.systems import Backyfs
from bench.workbench import Workbench

COW_ONE, COW_FOUR, COW_RANDOM = (
    f"nbd cow {what}" for what in ("1 connection", "4 connections", "random 4k")
)
PACKS_ONE, PACKS_RANDOM = "nbd packs 1 connection", "nbd packs random 4k"
RAW, XZ, QCOW2 = "nbdkit file", "nbdkit xz", "qemu-nbd qcow2"
OTHERS = (XZ, QCOW2)
"""Servers of compressed images, on the lines of packs."""

READS = 1000
_DEPTH = 16
_RANDOM_S = 3.0
_RANDOM_BYTES = 64 << 20
"""An image needs this many bytes for a second of random reads."""

_START_S = 60.0
_POLL_S = 0.005
_FILE_SYSTEM = "xfs"


@dataclass(frozen=True, slots=True)
class Server:
    """One side: how it is started on a TCP port, what it reads, the name it exports."""

    name: str
    start: Callable[[int], Command]
    store: Path
    export: str = ""


Client = Callable[[str], float]
"""Uses the export at a URI; returns seconds."""


def copied(connections: int, uri: str) -> float:
    """Seconds that copying all data to nowhere takes."""
    many = f"--connections={connections}", "--requests=64"
    return run([command("nbdcopy", *many, uri, "null:")]).wall_s


def random_reads(size: int, scratch: Path, seed: int, uri: str) -> float:
    """Seconds that 1000 reads of 4 KiB at random places of `size` bytes take, 16 at a time."""
    duration_s = min(_RANDOM_S, size / _RANDOM_BYTES)
    said = scratch / "fio.json"
    fio = Command(
        (
            *("fio", "--name=random", "--ioengine=nbd", f"--uri={uri}", "--rw=randread"),
            *("--bs=4k", f"--iodepth={_DEPTH}", f"--size={size // 4096 * 4096}"),
            *("--time_based", f"--runtime={int(duration_s * 1000)}ms", f"--randseed={seed}"),
            *("--output-format=json", f"--output={said}"),
        ),
        cwd=scratch,
    )
    run([fio])
    result = json.loads(said.read_text())["jobs"][0]
    if result["error"]:
        raise CommandFailed(f"{fio}: error {result['error']}")
    return READS / float(result["read"]["iops"])


def nbd(bench: Workbench) -> None:
    """A raw image in a `cow` store next to the same file, then `packs` next to others."""
    _measure_cow(bench)
    _measure_packs(bench)


def _measure_cow(bench: Workbench) -> None:
    mkfs = cow.FILE_SYSTEMS[_FILE_SYSTEM]
    if os.geteuid() != 0 or not shutil.which(mkfs[0]):
        bench.ledger.fail(COW_ONE, OURS, f"needs root and {mkfs[0]}")
        return
    with bench.group("nbd-cow") as home, cow.file_system(bench, home, mkfs) as place:
        system = _backed_up(bench, place / "store", "cow")
        (raw,) = (system.directory / "revisions").glob("*.disk.img")
        sides = [_raw(raw), _ours(system)]
        _rounds(
            bench,
            sides,
            home,
            [(COW_ONE, partial(copied, 1)), (COW_FOUR, partial(copied, 4))],
            COW_RANDOM,
        )


def _measure_packs(bench: Workbench) -> None:
    with bench.group("nbd-packs") as home:
        system = _backed_up(bench, home / "store", "packs")
        sides = [_raw(bench.disk), _ours(system), *_others(bench, home)]
        _rounds(bench, sides, home, [(PACKS_ONE, partial(copied, 1))], PACKS_RANDOM)


def _backed_up(bench: Workbench, home: Path, store: str) -> Backyfs:
    system = Backyfs(home, bench.disk, store=store)
    system.prepare()
    run([system.backup()])
    return system


def _rounds(
    bench: Workbench,
    sides: Sequence[Server],
    scratch: Path,
    copies: Sequence[tuple[str, Client]],
    random: str,
) -> None:
    for number in range(bench.options.rounds):
        pages = partial(random_reads, bench.options.size, scratch, number + 1)
        clients: list[tuple[str, Client]] = [*copies, (random, pages)]
        for line, client in clients:
            for side in sides:
                _take(bench, line, side, client)


def _take(bench: Workbench, line: str, side: Server, client: Client) -> None:
    warm(side.store)
    with bench.attempt(line, side.name) as going:
        if not going:
            return
        with _served(side) as (process, uri):
            before_s = process.cpu_s
            seconds = client(uri)
            cpu_s = process.cpu_s - before_s
            peak_bytes = process.peak_bytes
        bench.enter(line, side.name, Sample(seconds, cpu_s, peak_bytes))


@contextmanager
def _served(side: Server) -> Iterator[tuple[Process, str]]:
    """The server, ready for clients, and the URI of its export; it ends at the end."""
    port = _free_port()
    process = Process(side.start(port))
    try:
        _wait_for(process, port)
        yield process, f"nbd://127.0.0.1:{port}/{side.export}"
    finally:
        process.terminate()
        process.finish(_START_S, check=False)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


def _wait_for(process: Process, port: int) -> None:
    started = time.perf_counter()
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=_START_S) as client:
                if client.recv(8) == b"NBDMAGIC":
                    return
        except OSError:
            pass
        if process.wait(_POLL_S):
            process.finish()
            raise CommandFailed(f"the server on port {port} ended")
        if time.perf_counter() - started > _START_S:
            raise CommandFailed(f"the server on port {port} is not there")


# ---- the sides ---------------------------------------------------------------------------------


def _ours(system: Backyfs) -> Server:
    return Server(OURS, system.nbd_server, system.home, "latest")


def _raw(image: Path) -> Server:
    return Server(RAW, lambda port: _nbdkit(port, "file", image), image)


def _nbdkit(port: int, *plugin: str | Path) -> Command:
    return command("nbdkit", "-f", "-r", "-i", "127.0.0.1", "-p", str(port), *plugin)


def _others(bench: Workbench, home: Path) -> Iterator[Server]:
    """Servers of the compressed images of the disk, as far as their programs are installed."""
    if not bench.options.peers:
        return
    if shutil.which("xz") and shutil.which("nbdkit"):
        packed = home / "disk.img.xz"
        # The lightest level and the blocks that the filter can find one by one.
        xz = "xz", "-0", "--threads=0", "--block-size=1MiB", "--stdout", str(bench.disk)
        run([Command(xz, stdout=packed)])
        yield Server(XZ, lambda port: _nbdkit(port, "--filter=xz", "file", packed), packed)
    if shutil.which("qemu-img") and shutil.which("qemu-nbd"):
        image = home / "disk.qcow2"
        how = "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd"
        run([command("qemu-img", "convert", *how, bench.disk, image)])
        yield Server(QCOW2, partial(_qemu_nbd, image), image)


def _qemu_nbd(image: Path, port: int) -> Command:
    how = "--read-only", "--persistent", "--shared=8", "--format=qcow2"
    return command("qemu-nbd", *how, "--bind=127.0.0.1", f"--port={port}", image)
