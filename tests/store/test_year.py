"""A year of hourly backups of one VM, with retention: the store's bounds hold all the time.

In the suite every twelfth hour of the year is backed up, which meets all of retention's rules;
with BACKYFS_FULL_YEAR=1 every hour is, which takes some minutes.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import pytest
from blake3 import blake3

from backyfs.config.schedule import HOURLY
from backyfs.engine.purge import purge
from backyfs.model import FRAME
from backyfs.store.format import GcReport
from backyfs.store.repository import Repository
from tests.store import faults

HOURS = 365 * 24
FULL = bool(os.environ.get("BACKYFS_FULL_YEAR"))
STEP = 1 if FULL else 12
FRAMES, HOT = 96, 10


@dataclass
class Year:
    """A VM whose disk changes a little all the time, most of it in the same few frames."""

    repository: Repository
    rng: random.Random = field(default_factory=lambda: random.Random(2026))
    image: bytearray = field(
        default_factory=lambda: bytearray(faults.frames(*range(1, FRAMES + 1)))
    )
    digests: dict[str, bytes] = field(default_factory=dict)

    def live(self) -> set[int]:
        """Change some frames; returns which."""
        changed = set()
        for _ in range(self.rng.randrange(8)):
            number = self.rng.randrange(HOT if self.rng.random() < 0.8 else FRAMES)
            at = number * FRAME + self.rng.randrange(16) * 4096
            length = self.rng.choice((100, 1000, 4096))
            self.image[at : at + length] = self.rng.randbytes(length)
            changed.add(number)
        return changed

    def back_up(self, hour: int, changed: set[int]) -> None:
        """A revision as the scheduler makes it, with a change list."""
        time = faults.START + timedelta(hours=hour)
        tags = ["hourly"] + [
            tag
            for tag, rule in HOURLY.items()
            if tag != "hourly" and hour * 3600 % rule.interval_s < STEP * 3600
        ]
        parent = next(iter(reversed(self.repository.revisions())), None)
        with (
            self.repository.writing() as intent,
            self.repository.begin(intent, parent, time=time) as staging,
        ):
            writer = staging.disk("disk", len(self.image))
            for number in sorted(changed) if parent else range(FRAMES):
                writer.write(number * FRAME, self.image[number * FRAME : (number + 1) * FRAME])
            record = staging.commit(replace(faults.DRAFT, tags=tuple(tags)))
        self.digests[record.id] = blake3(self.image).digest()

    def purge(self, hour: int) -> GcReport:
        """Expire and collect; the report of what is left."""
        done = purge(self.repository, HOURLY, faults.START + timedelta(hours=hour))
        for revision in done.expiry.removed:
            del self.digests[revision]
        return done.gc


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Counts files opened and bytes read."""
    counts = {"opened": 0, "bytes": 0}
    really_open, really_pread = os.open, os.pread

    def counted_open(*arguments: object, **more: object) -> int:
        counts["opened"] += 1
        return really_open(*arguments, **more)  # type: ignore[arg-type]

    def counted_pread(fd: int, length: int, offset: int) -> bytes:
        data = really_pread(fd, length, offset)
        counts["bytes"] += len(data)
        return data

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", counted_open)
        patch.setattr(os, "pread", counted_pread)
        yield counts


@pytest.mark.timeout(3600 if FULL else 300)
def test_a_year_of_backups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with faults.scratch(tmp_path) as directory:
        year = Year(Repository.create(directory / "vm", "packs"))
        revisions = files = 0
        dead = 0.0
        for hour in range(0, HOURS, STEP):
            year.back_up(hour, year.live())
            if hour % 24 < STEP:
                left = year.purge(hour)
                assert left.files <= 64 + left.stored_bytes // (512 << 20)
                assert left.dead_bytes <= 0.30 * left.stored_bytes
                files, dead = max(files, left.files), max(dead, left.dead_bytes / left.stored_bytes)
                revisions = len(year.repository.revisions())
                # Retention keeps 25 hourly, 10 daily, 5 weekly, 4 monthly, and what came since.
                assert revisions <= 25 + 10 + 5 + 4 + 24 // STEP
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        started = time.perf_counter()
        with counting(monkeypatch) as counts:
            open_newest(directory / "vm")
        seconds = time.perf_counter() - started
        print(
            f"\n{HOURS // STEP} backups: {revisions} revisions in {size >> 10} KiB, at most {files}"
            f" packs and {dead:.0%} dead; the newest opens in {seconds * 1000:.1f} ms, with"
            f" {counts['opened']} files and {counts['bytes'] >> 10} KiB"
        )
        assert counts["opened"] <= 8 + revisions  # each has a record
        assert counts["bytes"] <= 256 << 10
        finally_whole(year)


def open_newest(path: Path) -> None:
    """What a restore or a mount does first, in a process that knows nothing yet."""
    repository = Repository.open(path)
    with closing(repository.open_disk(repository.revisions()[-1], "disk")) as image:
        assert image.read((FRAMES - 1) * FRAME, 4096)


def finally_whole(year: Year) -> None:
    """Every revision that is left reads back as it was, and nothing else is left."""
    repository = Repository.open(year.repository.path)
    assert repository.fsck() == []
    assert repository.damage() == {}
    records = repository.revisions()
    assert {record.id for record in records} == year.digests.keys()
    for record in records:
        with closing(repository.open_disk(record, "disk")) as image:
            assert blake3(image.read(0, image.size)).digest() == year.digests[record.id]
    assert faults.strays(repository.path) == []
