"""`make bench`: measure backyfs, the floors and other programs side by side.

Exit codes: 0 all was measured · 1 something of backyfs or of a floor could not be measured, or,
with --strict, a bar does not hold · 2 wrong usage. README.md beside this file says how to read
the tables.
"""

from __future__ import annotations

import argparse
import compileall
import fnmatch
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import backyfs
from bench import report
from bench.backups import clustered, full, random4k, unchanged
from bench.bars import Verdict, verdicts
from bench.ceph import ceph
from bench.cow import cow
from bench.ledger import Ledger
from bench.listing import listing
from bench.memory import memory
from bench.mkimage import parse_size
from bench.mounts import mount
from bench.nbd import OTHERS, nbd
from bench.restores import restore
from bench.systems import PEERS, versions
from bench.workbench import Options, Workbench

GROUPS: dict[str, Callable[[Workbench], None]] = {
    "full": full,
    "unchanged": unchanged,
    "random4k": random4k,
    "clustered": clustered,
    "restore": restore,
    "mount": mount,
    "listing": listing,
    "cow": cow,
    "memory": memory,
    "nbd": nbd,
    "ceph": ceph,
}
_LEAST_SIZE = 4 << 20
_IN_MEMORY = Path("/dev/shm")
# The image, its changed copy or the two of the memory lines, and air.
_IMAGES_AT_ONCE = 3


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description="Measure backyfs.")
    parser.add_argument("--size", type=parse_size, default=2 << 30, help="of the image [2G]")
    parser.add_argument("--rounds", type=int, default=5, help="of every measurement [5]")
    parser.add_argument("--generations", type=int, default=10, help="of random changes [10]")
    parser.add_argument(
        "--only",
        action="append",
        metavar="PATTERN",
        help=f"only groups that match, may be repeated: {', '.join(GROUPS)}",
    )
    parser.add_argument("--no-peers", action="store_true", help="leave other programs out")
    parser.add_argument("--work", type=Path, default=Path("/var/tmp"), help="stores go below it")
    parser.add_argument("--images", type=Path, help="images go below it [memory, if it has room]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="[bench/results/<time>.json]")
    parser.add_argument("--strict", action="store_true", help="exit 1 if a bar does not hold")
    arguments = parser.parse_args(argv)
    if arguments.size < _LEAST_SIZE:
        parser.error(f"--size must be at least {_LEAST_SIZE}")
    if min(arguments.rounds, arguments.generations) < 1:
        parser.error("--rounds and --generations must be at least 1")
    if not _chosen(arguments.only):
        parser.error(f"no group matches; there are: {', '.join(GROUPS)}")
    return arguments


def _chosen(patterns: list[str] | None) -> list[str]:
    return [
        name
        for name in GROUPS
        if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ]


@contextmanager
def _directories(arguments: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """New directories for stores and for images, gone at the end."""
    images = arguments.images or _roomy(arguments.size) or arguments.work
    with (
        tempfile.TemporaryDirectory(prefix="backyfs-bench-", dir=arguments.work) as work,
        tempfile.TemporaryDirectory(prefix="backyfs-bench-", dir=images) as at,
    ):
        yield Path(work).resolve(), Path(at).resolve()


def _roomy(size: int) -> Path | None:
    """Memory that images may lie in, if there is enough."""
    if not _IN_MEMORY.is_dir():
        return None
    free = shutil.disk_usage(_IN_MEMORY).free
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _IN_MEMORY if min(free, available) > _IMAGES_AT_ONCE * size else None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _measure(arguments: argparse.Namespace, ledger: Ledger) -> None:
    with _directories(arguments) as (work, images):
        options = Options(
            work=work,
            images=images,
            size=arguments.size,
            rounds=arguments.rounds,
            generations=arguments.generations,
            peers=not arguments.no_peers,
        )
        bench = Workbench(options, ledger, _say)
        for name in _chosen(arguments.only):
            with bench.attempt(name, "preparation"):
                GROUPS[name](bench)


def _compile() -> None:
    """Have byte code as an installation has it: a start shall not be measured with a compiler."""
    compileall.compile_dir(str(Path(backyfs.__file__).parent), quiet=1)


def _result(
    arguments: argparse.Namespace, ledger: Ledger, found: Sequence[Verdict], time: datetime
) -> dict[str, Any]:
    return {
        "time": time.isoformat(timespec="seconds"),
        "machine": report.machine(),
        "versions": versions(),
        "options": {name: str(value) for name, value in sorted(vars(arguments).items())},
        **ledger.as_json(),
        "bars": [verdict.as_json() for verdict in found],
    }


def _write(target: Path, result: dict[str, Any]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")


def _end(number: int, _: object) -> None:
    sys.exit(128 + number)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    arguments = _arguments(argv)
    signal.signal(signal.SIGTERM, _end)  # as Ctrl-C does, it leaves no mounts and loop devices
    time = datetime.now(UTC)
    ledger = Ledger()
    _compile()
    _measure(arguments, ledger)
    found = verdicts(ledger, arguments.generations)
    for table in (report.samples(ledger), [""], report.bars(found)):
        print(*table, sep="\n")
    default = Path(__file__).parent / "results" / f"{time:%Y%m%dT%H%M%SZ}.json"
    target = arguments.json or default
    _write(target, _result(arguments, ledger, found, time))
    print(f"written: {target}")
    peers = {peer.name for peer in PEERS} | set(OTHERS)
    failed = any(side not in peers for _, side in ledger.failures)
    return int(failed or (arguments.strict and not all(verdict.holds for verdict in found)))
