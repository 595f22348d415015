"""Order is by seq, whatever the clock says; and an end of a disk that moves hides no old bytes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from backyfs.model import FRAME, Extent
from backyfs.store.repository import Repository
from tests.cli.program import backyfs
from tests.store import faults
from tests.store.faults import START, History


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    with faults.scratch(tmp_path) as found:
        yield found


def test_a_clock_set_back_changes_no_order(directory: Path) -> None:
    repository = Repository.create(directory / "vm", "packs")
    contents = {}
    for number, hours in enumerate((30, 31, 7, 8, 7.5, 500, 9)):  # a day back, twice; once ahead
        disks = {"disk": faults.frames(*range(1, number + 2))}
        record = faults.store(repository, number, disks, time=START + timedelta(hours=hours))
        contents[record.id] = disks
    records = Repository.open(directory / "vm").revisions()
    assert [record.id for record in records] == [*contents]
    assert [record.seq for record in records] == list(range(1, 8))
    assert [record.parent for record in records] == ["", *contents][:-1]
    assert [record.time for record in records] != sorted(record.time for record in records)
    newest = records[-1].id
    assert newest in backyfs("-b", directory / "vm", "find", "-r", "latest").out
    repository.remove([newest])
    del contents[newest]
    again = faults.store(repository, 50, {"disk": b"x"}, time=START)
    assert repository.revisions()[-1].id == again.id
    contents[again.id] = {"disk": b"x"}
    faults.check(directory / "vm", contents)


def resized(image: bytes, size: int, rng: random.Random) -> bytes:
    """The disk cut or grown (with zeros), then changed somewhere."""
    image = image[:size].ljust(size, b"\0")
    for _ in range(rng.randrange(3)):
        if size:
            at = rng.randrange(size)
            new = rng.randbytes(min(size - at, rng.randrange(1, 9000)))
            image = image[:at] + new + image[at + len(new) :]
    return image


@pytest.mark.parametrize("seed", range(6))
def test_disks_that_shrink_and_grow(directory: Path, seed: int) -> None:
    """Only what differs is handed over, and what the writer requires. Digests: as from scratch."""
    rng = random.Random(seed)
    Repository.create(directory / "vm", "packs")
    history = History(directory / "vm")
    image = rng.randbytes(rng.randrange(8 * FRAME))
    for _ in range(12):
        history.add({"disk": image})
        near = rng.randrange(9) * FRAME
        size = rng.choice((rng.randrange(9 * FRAME), near, near + 1, max(0, near - 1), len(image)))
        image = resized(image, size, rng)
    faults.check(history.path, history.contents)
    scratch = Repository.create(directory / "scratch", "packs")
    for number, record in enumerate(history.open().revisions()):
        fresh = faults.store(scratch, number, history.contents[record.id])
        assert fresh.disks["disk"].digest == record.disks["disk"].digest
        scratch.remove([fresh.id])


@pytest.mark.parametrize("cut", [0, 1, FRAME - 1, FRAME, FRAME + 1, 2 * FRAME, 3 * FRAME - 1])
def test_shrink_then_grow_never_shows_old_bytes(directory: Path, cut: int) -> None:
    repository = Repository.create(directory / "vm", "packs")
    secret = b"\xee" * (3 * FRAME + 500)
    sizes = [len(secret), cut, len(secret) + 5 * FRAME, cut + 1, 9 * FRAME + 1]
    expected = secret
    for number, size in enumerate(sizes):
        expected = expected[:size].ljust(size, b"\0")
        with repository.writing() as intent:
            parent = next(iter(reversed(repository.revisions())), None)
            with repository.begin(
                intent, parent, revision=faults.revision_id(number), time=START
            ) as staging:
                writer = staging.disk("disk", size)
                whole = [Extent(0, size)] if parent is None else []
                faults.write_disk(writer, expected, whole + writer.required())
                record = staging.commit(faults.DRAFT)
        with closing(repository.open_disk(record, "disk")) as image:
            assert image.read(0, size) == expected
    assert repository.fsck() == []


def test_a_record_that_cannot_be_read_keeps_its_place(directory: Path) -> None:
    """It may come back: what is made meanwhile is newer than it all the same."""
    history = faults.make_history(directory / "vm")
    lost = history.open().layout.record(faults.revision_id(6))
    record = lost.read_bytes()
    lost.write_bytes(record[:-20])
    made = faults.store(history.open(), 7, {"root": faults.frames(1)})
    lost.write_bytes(record)
    assert [r.seq for r in history.open().revisions()] == list(range(1, 9))
    assert history.open().revisions()[-1] == made
    assert history.open().fsck() == []
