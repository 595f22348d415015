"""Both formats under one contract, cow on both file systems that can carry it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from backyfs.store.repository import Repository
from tests.store.contract import (
    Machine,
    StoreContract,
    back_up,
    digest_of,
    image_of,
    noise,
    read_all,
)


class TestPacks(StoreContract):
    """packs, on whatever holds temporary files."""

    kind = "packs"

    @pytest.fixture
    def home(self, tmp_path: Path) -> Path:
        return tmp_path


class TestCowOnXfs(StoreContract):
    """cow on XFS."""

    kind = "cow"

    @pytest.fixture
    def home(self, xfs_dir: Path) -> Path:
        return xfs_dir


class TestCowOnBtrfs(StoreContract):
    """cow on btrfs."""

    kind = "cow"

    @pytest.fixture
    def home(self, btrfs_dir: Path) -> Path:
        return btrfs_dir


STEPS = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)


@pytest.mark.parametrize(
    ("kind", "place"), [("packs", "tmp_path"), ("cow", "xfs_dir"), ("cow", "btrfs_dir")]
)
def test_any_sequence_of_operations(kind: str, place: str, request: pytest.FixtureRequest) -> None:
    where: Path = request.getfixturevalue(place)
    machine = type("StoreMachine", (Machine,), {"kind": kind, "home": where})
    run_state_machine_as_test(machine, settings=STEPS)


def test_digests_agree_between_formats(tmp_path: Path, btrfs_dir: Path) -> None:
    packs = Repository.create(tmp_path / "vm", "packs")
    cow = Repository.create(btrfs_dir / "vm", "cow")
    content = image_of(2, 0, 3, 4, tail=noise(12345))
    for size in (len(content), 2 * 65536 + 3, 6 * 65536, 0):
        content = content[:size].ljust(size, b"\0")
        digests = set()
        for repository in (packs, cow):
            parent = next(reversed(repository.revisions()), None)
            record = back_up(repository, content, parent).record
            digests.add(record.disks["disk"].digest)
            assert read_all(repository, record) == content
        assert digests == {digest_of(content)}
