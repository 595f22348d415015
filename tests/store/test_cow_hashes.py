"""Frame hashes of cow images that cannot be read, or that nothing proves: backups go on."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path

import pytest
from blake3 import blake3

from backyfs.model import FRAME
from backyfs.store.digest import HASH, digest
from backyfs.store.record import Record
from backyfs.store.repository import Repository
from tests.conftest import SmallFs
from tests.filesystems import spoil_medium
from tests.store.contract import back_up, covered, frame, image_of, noise, read_all
from tests.store.test_cow import notes_of, with_limit
from tests.store.test_cow_damage import (
    BLOCK,
    HEAD,
    MIB,
    check,
    damaged,
    flip,
    image_path,
    sync,
    table_path,
)

FRAMES = 140
"""Their hashes make up one block and a part of a second."""

CONTENT = image_of(*range(2, 2 + FRAMES))
CHANGED = CONTENT[:-FRAME] + frame(1002)


@pytest.fixture
def on_a_medium(small_fs: SmallFs) -> tuple[Repository, Path]:
    """A repository on a btrfs of its own, which finds what is wrong, and the file it is in."""
    place = small_fs("btrfs", 300 * MIB)
    return Repository.create(place / "vm", "cow"), place.parent / "btrfs.img"


def lose_hashes(repository: Repository, record: Record, medium: Path) -> Repository:
    """Make a block of frame hashes unreadable; the repository as a new process sees it."""
    sync(repository)
    with open(table_path(repository, record), "rb") as stream:
        stream.seek(HEAD)
        hashes = stream.read(BLOCK)
    assert spoil_medium(medium, hashes) == 1
    sync(repository)
    return Repository.open(repository.path)


@pytest.mark.parametrize("size", ["same", "less", "more"])
@pytest.mark.parametrize("known", [False, True])
def test_hashes_that_cannot_be_read_are_written_anew(
    on_a_medium: tuple[Repository, Path], known: bool, size: str
) -> None:
    repository, medium = on_a_medium
    first = back_up(repository, CONTENT).record
    second = back_up(repository, CHANGED, first, CONTENT).record
    repository = lose_hashes(repository, second, medium)  # both revisions share this block
    assert read_all(repository, second) == CHANGED
    if known:
        assert {frozenset(check(repository, one)) for one in (first, second)} == {
            frozenset(range(FRAMES))
        }
    later = {"same": CHANGED, "less": CHANGED[: 100 * FRAME + 5], "more": CHANGED + frame(4)}[size]
    made = back_up(repository, later, second).record
    sync(repository)
    assert read_all(repository, made) == later
    assert check(repository, made) == check(repository, second) == []
    assert check(repository, first) == ([] if known else list(range(FRAMES)))
    assert read_all(repository, first) == CONTENT


@pytest.mark.parametrize("frames", [100, FRAMES, FRAMES + 1])
def test_hashes_that_nothing_can_tell_are_not_taken(
    on_a_medium: tuple[Repository, Path], frames: int
) -> None:
    repository, medium = on_a_medium
    record = back_up(repository, CONTENT).record
    flip(image_path(repository, record), 3 * FRAME)
    repository = lose_hashes(repository, record, medium)
    later = image_of(*range(2, 2 + frames))
    made = back_up(repository, later, record)
    assert covered(made.required["disk"]) >= set(range(min(frames, FRAMES)))
    sync(repository)
    assert read_all(repository, made.record) == later
    assert check(repository, made.record) == []
    assert set(damaged(repository)) == {record.id}


def test_a_zero_frame_whose_hash_cannot_be_read(on_a_medium: tuple[Repository, Path]) -> None:
    """Holes are told by the table: what it does not tell is looked at."""
    repository, medium = on_a_medium
    content = CONTENT[: 50 * FRAME] + bytes(50 * FRAME) + CONTENT[100 * FRAME :]
    record = back_up(repository, content).record
    repository = lose_hashes(repository, record, medium)
    with closing(repository.open_disk(record, "disk")) as image:
        found = {n for e in image.extents() for n in range(e.offset // FRAME, e.end // FRAME)}
        assert found >= {*range(50), *range(100, FRAMES)}
    assert read_all(repository, record) == content


def test_a_level_1_hash_that_lies_does_not_stop_backups(reflink_dir: Path) -> None:
    """It was wrong when it was written: record, digest and table agree about it."""
    repository = Repository.create(reflink_dir / "vm", "cow")
    content = image_of(2, 0, 4, 6)
    record = back_up(repository, content).record
    table = table_path(repository, record)
    flip(table, table.stat().st_size - HASH)
    written = table.read_bytes()
    disk = record.disks["disk"]
    lying = dataclasses.replace(
        disk,
        digest=digest(disk.size, written[-HASH:]),
        files={**disk.files, table.name: blake3(written[:HEAD] + written[-HASH:]).hexdigest()},
    )
    record = dataclasses.replace(record, disks={"disk": lying})
    repository.layout.record(record.id).write_bytes(record.encode())
    made = back_up(repository, content, record).record
    assert read_all(repository, made) == content
    assert check(repository, made) == []


def test_a_fresh_file_keeps_no_bytes_whose_hashes_are_not_taken(reflink_dir: Path) -> None:
    repository = Repository.create(reflink_dir / "vm", "cow")
    content = frame(2)
    record = back_up(repository, content).record
    pieces = bytearray(content)
    for at in range(0, FRAME, 2 * BLOCK):
        pieces[at : at + BLOCK] = noise(BLOCK, at + 1)
    record = back_up(repository, bytes(pieces), record).record
    flip(table_path(repository, record), HEAD + 5)
    later = bytes(pieces[: 3 * BLOCK]) + bytes(BLOCK) + bytes(pieces[4 * BLOCK :])
    made, notes = notes_of(with_limit(repository, 2), record, later)
    assert "written as a fresh file" in notes[0]
    assert read_all(repository, made.record) == later
    assert check(repository, made.record) == []
