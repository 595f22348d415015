"""Real small file systems that fill up: NoSpace, nothing published, nothing lost, and a way out."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from backyfs.errors import NoSpace
from backyfs.store import space
from backyfs.store.repository import Repository
from tests.conftest import SmallFs
from tests.filesystems import MIB, MINIMUM, filled
from tests.store import faults
from tests.store.faults import History

KINDS = ["ext4", "xfs", "btrfs"]


@pytest.fixture(params=KINDS)
def small(request: pytest.FixtureRequest, small_fs: SmallFs) -> Path:
    """A file system with room for a few small backups."""
    return small_fs(request.param, max(64 * MIB, MINIMUM[request.param]))


def noise(seed: int, mib: float) -> bytes:
    return random.Random(seed).randbytes(int(mib * MIB))


def test_a_backup_on_a_file_system_that_fills_up(small: Path) -> None:
    Repository.create(small / "vm", "packs")
    history = History(small / "vm")
    history.add({"disk": noise(1, 3)})
    disks = {"disk": history.newest["disk"][:MIB] + noise(2, 12), "new": noise(3, 1)}
    outcomes = []
    reserve = space.reserve_bytes(small)
    for leave in [0, *(reserve + part * MIB // 4 for part in (1, 5, 12, 20, 26, 40, 52, 54, 200))]:
        before = faults.listing(history.path)
        with filled(small, leave):
            try:
                history.add(disks)
                outcomes.append(True)
                break
            except NoSpace as exc:
                assert "space" in str(exc) or "free" in str(exc)
                assert exc.hint
                outcomes.append(False)
            assert faults.listing(history.path) == before
            faults.check(history.path, history.contents)
    assert len(outcomes) > 4
    assert outcomes[-1]
    assert not any(outcomes[:-1])
    faults.check(history.path, history.contents)
    history.add({"disk": noise(9, 2)})
    faults.check(history.path, history.contents)
    history.open().gc()
    assert faults.strays(history.path) == []


def test_gc_frees_space_where_none_is_left(small: Path) -> None:
    """Removal and gc need no space: dead packs go, dead frames in packs that stay are punched."""
    Repository.create(small / "vm", "packs")
    history = History(small / "vm")
    image = noise(1, 6)
    history.add({"disk": image})
    history.add({"disk": image[:MIB] + noise(2, 5)})  # 5 of the first 6 MiB are now dead
    history.add({"disk": noise(3, 1) + noise(2, 5)})
    with filled(small, 0):
        assert space.free_bytes(small) < space.reserve_bytes(small)
        with pytest.raises(NoSpace):
            history.add({"disk": noise(4, 1)})
        first = next(iter(history.contents))
        history.open().remove([first])
        del history.contents[first]
        before = space.free_bytes(small)
        report = history.open().gc()
        assert report.merged_files == 0
        assert report.freed_bytes > 4 * MIB
        os.sync()
        if small.name != "btrfs":  # which frees an extent when nothing of it is left
            assert space.free_bytes(small) - before > 4 * MIB
        faults.check(history.path, history.contents)
    # With room again, what was punched is merged away.
    for number in (4, 5):
        history.add({"disk": noise(3, 1) + noise(number, 5)})
    for revision in [*history.contents][:2]:
        history.open().remove([revision])
        del history.contents[revision]
    report = history.open().gc()
    assert report.dead_bytes <= 0.3 * report.stored_bytes
    faults.check(history.path, history.contents)
    assert faults.strays(history.path) == []


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_the_reserve_stays_free(kind: str, small_fs: SmallFs) -> None:
    """A backup that would eat into the reserve does not begin."""
    small = small_fs(kind, max(64 * MIB, MINIMUM[kind]))
    Repository.create(small / "vm", "packs")
    history = History(small / "vm")
    history.add({"disk": noise(1, 1)})
    with (
        filled(small, space.reserve_bytes(small) // 2),
        pytest.raises(NoSpace, match="reserve"),
    ):
        history.add({"disk": noise(1, 1)})
    faults.check(history.path, history.contents)
