"""What revisions take on disk, and what removing one would free: told before, compared after."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from backyfs.model import FRAME
from backyfs.store.repository import Repository
from tests.parts import require
from tests.reader.stores import add_revision, make_vm
from tests.store.test_faults_inodes import within

FRAMES = 60


def history(base: Path, store: str, seed: int = 1) -> Repository:
    """Six revisions of random data, of which each changes some frames, in whole or in part."""
    rng = random.Random(seed)
    disk = bytearray(rng.randbytes(FRAMES * FRAME))
    repository = make_vm(base, "web01", bytes(disk), store=store)
    for _ in range(5):
        for _ in range(8):
            at = rng.randrange(FRAMES) * FRAME + rng.choice((0, 4096))
            length = rng.choice((4096, FRAME // 2))
            disk[at : at + length] = rng.randbytes(length)
        add_revision(repository, bytes(disk))
    add_revision(repository, bytes(disk))  # nothing changed
    return repository


@pytest.mark.parametrize("gone", range(7))
def test_packs_exclusive_is_what_gc_finds_dead(tmp_path: Path, gone: int) -> None:
    repository = history(tmp_path, "packs")
    records = repository.revisions()
    own = repository.exclusive()
    record = records[gone]
    assert set(own) == {r.id for r in records}
    (disk,) = record.disks.values()
    (name,) = disk.files
    shared_map = sum(name in d.files for r in records for d in r.disks.values()) > 1
    map_bytes = 0 if shared_map else (repository.layout.revisions / name).stat().st_size
    repository.remove([record.id])
    assert own[record.id] == _dead(repository) + map_bytes


def _dead(repository: Repository) -> int:
    """Stored bytes of frames that no map reaches, as the collector weighs them."""
    from backyfs.store.packs.gc import Collector

    collector = Collector(
        repository.place,
        repository.format._maps(repository.revisions()),  # type: ignore[attr-defined]
    )
    try:
        return sum(use.dead for use in collector._packs)
    finally:
        collector.close()


def test_exclusive_adds_up(tmp_path: Path) -> None:
    repository = history(tmp_path, "packs")
    own = repository.exclusive()
    assert 0 < sum(own.values()) <= sum(r.stats.stored for r in repository.revisions()) + 10_000
    records = repository.revisions()
    assert own[records[-1].id] == own[records[-2].id] == 0, "they are equal: none is alone"
    repository.remove([record.id for record in records[1:]])
    (alone,) = repository.exclusive().values()
    assert alone >= FRAMES * FRAME


def test_packs_occupied_is_what_du_says(tmp_path: Path) -> None:
    repository = history(tmp_path, "packs")
    files = [*repository.layout.packs.iterdir(), *repository.layout.revisions.glob("*.map")]
    assert repository.occupied() == sum(os.stat(path).st_blocks * 512 for path in files)


def test_cow(xfs_dir: Path) -> None:
    require("xfs", "images share blocks there")
    repository = history(xfs_dir, "cow")
    os.sync()
    records = repository.revisions()
    own = repository.exclusive()
    before = repository.occupied()
    full = FRAMES * FRAME
    changed = sum(record.stats.stored for record in records[1:])
    assert full <= before <= full + changed + 200_000
    assert own[records[-1].id] == 0
    for record in records[:3]:
        told = repository.exclusive()[record.id]
        free = _free(xfs_dir)
        repository.remove([record.id])
        assert _freed(xfs_dir, free, told), record.id
    assert repository.occupied() < before


def test_cow_does_not_wait_for_a_fifo(reflink_dir: Path) -> None:
    repository = history(reflink_dir, "cow")
    image = next(repository.layout.revisions.glob("*.img"))
    image.unlink()
    os.mkfifo(image)

    def told() -> None:
        with pytest.raises(OSError, match="not a regular file"):
            repository.exclusive()

    within(60, told)


def _freed(path: Path, before: int, told: int) -> bool:
    """Whether the file system frees that much, give and take its own: XFS does it later."""
    deadline = time.monotonic() + 60
    while abs(_free(path) - before - told) > 64 * 1024:
        if time.monotonic() > deadline:
            return False
        os.sync()
        time.sleep(0.02)
    return True


def _free(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bfree * status.f_frsize
