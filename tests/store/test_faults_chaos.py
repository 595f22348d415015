"""One fault after the other: what each left behind is what the next one meets."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backyfs.errors import NoSpace
from backyfs.model import FRAME
from backyfs.store import space
from backyfs.store.fs import Fs
from tests.store import faults
from tests.store.faults import FailAt, History, killed, revision_id

SEEDS = int(os.environ.get("BACKYFS_CHAOS", "4"))


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[History]:
    faults.lower_limits(monkeypatch)
    monkeypatch.setattr("backyfs.store.packs.gc.FILE_BYTES", 30_000)
    with faults.scratch(tmp_path) as directory:
        yield faults.make_history(directory / "vm")


class Chaos:
    """A VM that is backed up and purged, while things go wrong."""

    def __init__(self, history: History, seed: int) -> None:
        self.history = history
        self.rng = random.Random(seed)
        self.number = 7

    def under_fault(self, operation: Callable[[Fs], object]) -> bool:
        """Kill it, fail it, or let it be; whether it came to its end."""
        n = self.rng.randrange(1, 60)
        match self.rng.randrange(3):
            case 0:
                return not killed(operation, n)
            case 1:
                code = self.rng.choice((errno.EIO, errno.ENOSPC))
                fs = FailAt(n, code, for_good=self.rng.random() < 0.3)
                try:
                    operation(fs)
                except (OSError, NoSpace):
                    return False
                return True
            case _:
                operation(Fs())
                return True

    def disks(self) -> dict[str, bytes]:
        """What the disks look like next."""
        disks = dict(self.history.newest)
        seed = self.rng.randrange(10**6)
        for name, image in disks.items():
            last = len(image) // FRAME - 1
            for _ in range(self.rng.randrange(3)):
                image = faults.patched(image, self.rng.randint(0, last), seed)
            if self.rng.random() < 0.2:
                image = image[: self.rng.randint(2 * FRAME, len(image))]
            if self.rng.random() < 0.3 and len(image) < 12 * FRAME:
                image += faults.frames(seed)[: self.rng.randrange(FRAME)]
            disks[name] = image
        return disks

    def back_up(self, disks: dict[str, bytes] | None = None) -> bool:
        """A backup that may go wrong; True when the revision is there."""
        disks = self.disks() if disks is None else disks
        number, parent = self.number, self.history.newest
        self.number += 1
        self.under_fault(lambda fs: faults.store(self.history.open(fs), number, disks, parent))
        there = revision_id(number) in {r.id for r in self.history.open().revisions()}
        if there:
            self.history.contents[revision_id(number)] = disks
        return there

    def remove(self) -> None:
        """A removal that may go wrong half way."""
        older = sorted(self.history.contents)[:-1]
        due = self.rng.sample(older, min(len(older), self.rng.randrange(1, 4)))
        self.under_fault(lambda fs: self.history.open(fs).remove(due))
        left = {record.id for record in self.history.open().revisions()}
        for revision in due:
            if revision not in left:
                del self.history.contents[revision]

    def collect(self) -> None:
        """A gc that merges, or punches, and may go wrong."""
        really = space.free_bytes
        if self.rng.random() < 0.3:
            space.free_bytes = lambda path: 0
        try:
            self.under_fault(lambda fs: self.history.open(fs).gc())
        finally:
            space.free_bytes = really

    def damage_and_heal(self) -> None:
        """A frame goes bad; backups that may go wrong, until one heals it."""
        newest = self.history.newest["root"]
        number = self.rng.randrange(len(newest) // FRAME)
        if not newest[number * FRAME : (number + 1) * FRAME].strip(b"\0"):
            return
        faults.damage(self.history, number)
        while not self.back_up(dict(self.history.newest)):
            assert self.history.open().fsck() == []

    def step(self) -> None:
        """Something happens."""
        self.rng.choice((self.back_up, self.back_up, self.remove, self.collect, self.collect))()
        if self.rng.random() < 0.1:
            self.damage_and_heal()
        faults.check(self.history.path, self.history.contents)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_one_fault_after_the_other(history: History, seed: int) -> None:
    chaos = Chaos(history, seed)
    for _ in range(40):
        chaos.step()
    faults.goes_on(history.path, history.contents)
