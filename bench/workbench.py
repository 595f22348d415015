"""The place where measurements are made: images, stores, and one way to take a sample.

Images lie in memory (tmpfs) if there is room, so that reading the source costs the same for every
side and round; stores lie in the work directory on a disk. Stores are read once before anything
that restores or mounts is measured: programs differ in what they leave in the page cache, and what
is measured is the program.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import hostmemory
from bench.command import Command, CommandFailed, Cost, command, run
from bench.footprint import Growth, Stored
from bench.ledger import Ledger, Sample
from bench.systems import PEERS, System

_PROJECT = Path(__file__).parent.parent
SEED = 1
CHANGED = 0.01


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure on. `size` is the bytes of the image; `generations` of random changes."""

    work: Path
    images: Path
    size: int = 2 << 30
    rounds: int = 5
    generations: int = 10
    peers: bool = True


class Workbench:
    """Images and stores of one run; `ledger` takes the samples."""

    def __init__(self, options: Options, ledger: Ledger, say: Callable[[str], None]) -> None:
        self.options = options
        self.ledger = ledger
        self._say = say
        self._base = options.images / "base.img"
        # A directory of its own, as casync mounts directories only.
        self.disk = options.images / "disk" / "disk.img"
        self._changes = options.images / "changes.json"

    @contextmanager
    def group(self, name: str) -> Iterator[Path]:
        """A fresh disk, and a directory for stores that goes when the group is done."""
        self._say(f"== {name}")
        self._fresh_disk()
        home = self.options.work / name
        home.mkdir()
        try:
            yield home
        finally:
            shutil.rmtree(home, ignore_errors=True)
            self.disk.unlink(missing_ok=True)

    def _fresh_disk(self) -> None:
        self.disk.parent.mkdir(exist_ok=True)
        if not self._base.exists():
            self.make_image(self._base, self.options.size)
        run([command("cp", "--sparse=always", self._base, self.disk)])

    def make_image(self, image: Path, size: int, *, data: int = 0) -> None:
        """Generate an image; in a process of its own, which may grow large."""
        run([_mkimage("--size", str(size), "--data", str(data), "--seed", str(SEED), image)])

    def change(self, pattern: str, seed: int) -> Path:
        """Change the disk in place; return the file that lists the changed extents."""
        how = ("--change", str(CHANGED), "--pattern", pattern, "--seed", str(seed))
        run([_mkimage(*how, "--extents", self._changes, self.disk)])
        return self._changes

    def no_changes(self) -> Path:
        """A list that says nothing has changed."""
        self._changes.write_text("[]")
        return self._changes

    def peers(self, home: Path) -> list[System]:
        """The other programs that are installed, each with a home below `home`."""
        if not self.options.peers:
            return []
        return [peer(home / peer.name, self.disk) for peer in PEERS if peer.present()]

    def take(
        self, line: str, side: str, steps: Sequence[Command], growth: Growth | None = None
    ) -> None:
        """Run steps; enter what they cost and, with `growth`, what they stored.

        A side that fails is noted and not measured again on this line.
        """
        with self.attempt(line, side) as going:
            if going:
                cost = run(steps)
                self.enter(line, side, sample(cost, growth.added() if growth else None))

    @contextmanager
    def attempt(self, line: str, side: str) -> Iterator[bool]:
        """Note it when a program fails inside; yields False for a side that failed before.

        There is memory for what it reads and what it writes.
        """
        hostmemory.touch(2 * self.options.size)
        try:
            yield not self.ledger.failed(line, side)
        except CommandFailed as exc:
            self.ledger.fail(line, side, str(exc))
            self._say(f"{line:24} {side:24} FAILED: {exc}")

    def enter(self, line: str, side: str, what: Sample) -> None:
        """Enter a sample and say so."""
        self.ledger.add(line, side, what)
        wall = "" if what.wall_s is None else f"{what.wall_s:.3f} s"
        stored = "" if what.stored_bytes is None else f"{what.stored_bytes} bytes"
        self._say(f"{line:24} {side:24} {wall:>11} {stored:>18}".rstrip())


def sample(cost: Cost, stored: Stored | None = None) -> Sample:
    """A cost, and what was stored, as a sample."""
    return Sample(
        cost.wall_s,
        cost.cpu_s,
        cost.rss_bytes,
        stored.apparent if stored else None,
        stored.allocated if stored else None,
    )


def _mkimage(*arguments: str | Path) -> Command:
    """The generator as a command."""
    return Command(
        (sys.executable, "-m", "bench.mkimage", *map(str, arguments)),
        cwd=_PROJECT,
    )
