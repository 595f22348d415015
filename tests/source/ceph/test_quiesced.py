"""RBD images of a guest that is frozen while the snapshots are taken, and not a moment longer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backyfs.config.quiesce import Policy, Quiesce
from backyfs.model import Consistency
from backyfs.source import contract, registry
from backyfs.source.ceph.snapshot import CephDisk
from backyfs.source.contract import quiescing
from backyfs.source.quiescing.quiesced import QuiescedSource
from backyfs.source.throttle import Rate, ThrottledSource
from backyfs.testing.source import BACKUPS, FIRST
from tests.ceph.cluster import Cluster
from tests.source.quiescing.fake import FakeAgent


def test_the_guest_is_frozen_for_the_snapshots_alone(
    ceph: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("root", "data"):
        ceph.create_image(name, 4 << 20)
    images = {name: f"rbd/{name}" for name in ("root", "data")}
    source = registry.make("ceph-rbd", {"images": images})
    with FakeAgent(tmp_path / "agent") as fake:
        taken = _watched(source, fake)
        opened = _opened(fake, monkeypatch)
        quiesce = Quiesce(Policy.REQUIRE, fake.path)
        wrapped = ThrottledSource(QuiescedSource(source, "db01", tmp_path, quiesce), Rate(1 << 30))
        with (
            contract.session(wrapped, BACKUPS) as session,
            session.snapshot(FIRST, {}) as snapshot,
        ):
            assert snapshot.consistency is Consistency.FILESYSTEM
            assert quiescing(snapshot).result == "done"
            assert set(snapshot.disks) == {"root", "data"}
    assert taken == [2]
    assert opened == [0, 0], "the guest had to wait for what could be done later"


def _watched(source: Any, fake: FakeAgent) -> list[int]:
    """What is frozen whenever snapshots are taken."""
    found: list[int] = []
    take = source._take

    def watched(*arguments: Any) -> Any:
        found.append(fake.frozen)
        return take(*arguments)

    source._take = watched
    return found


def _opened(fake: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is frozen whenever a snapshot is opened for reading."""
    found: list[int] = []
    real = CephDisk.opened

    def opened(*arguments: Any) -> Any:
        found.append(fake.frozen)
        return real(*arguments)

    monkeypatch.setattr(CephDisk, "opened", opened)
    return found
