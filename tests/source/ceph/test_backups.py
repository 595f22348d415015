"""Backups of RBD images: what is read, which snapshots stay, and what is said when one is gone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from backyfs.engine.backup import back_up
from backyfs.model import FRAME, Consistency
from backyfs.source.ceph.config import read_config
from backyfs.source.ceph.points import prefix
from backyfs.source.ceph.source import CephSource
from backyfs.store.record import Record
from backyfs.store.repository import Repository
from tests.ceph.cluster import Cluster
from tests.engine.checks import content

MIB = 1 << 20


class Vm:
    """A VM with one image of 16 MiB, the repository it is backed up to, and its source."""

    def __init__(self, ceph: Cluster, path: Path, **settings: Any) -> None:
        self.ceph = ceph
        self.repository = Repository.create(path / "vm", "packs")
        self.settings = {"pool": "rbd", "image": "vm", "osd-timeout": 10, **settings}
        ceph.create_image("vm", 16 * MIB)
        self.write(0, b"boot" * 1000)
        self.write(5 * MIB, b"data" * 100_000)

    @property
    def source(self) -> CephSource:
        return CephSource(read_config(self.settings))

    def write(self, offset: int, data: bytes) -> None:
        with self.ceph.image("vm") as image:
            image.write(data, offset)

    def head(self) -> bytes:
        with self.ceph.image("vm") as image:
            data: bytes = image.read(0, image.size())
        return data

    def snaps(self, image: str = "vm") -> list[str]:
        with self.ceph.image(image) as opened:
            return [snap["name"] for snap in opened.list_snaps()]

    def name(self, record: Record) -> str:
        """The snapshot of a revision."""
        return prefix(self.repository.uuid) + record.id

    async def back_up(self) -> Record:
        """Back up, and compare with what the snapshot exports."""
        record = await back_up(self.repository, self.source)
        if not self.settings.get("full-always"):
            exported = await trio.to_thread.run_sync(self.ceph.export, "vm", self.name(record))
            assert content(self.repository, record) == exported
        return record


@pytest.fixture
def vm(ceph: Cluster, tmp_path: Path) -> Vm:
    return Vm(ceph, tmp_path)


def warnings(caplog: pytest.LogCaptureFixture) -> Sequence[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


async def test_only_what_changed_is_read(vm: Vm) -> None:
    first = await vm.back_up()
    assert first.consistency is Consistency.CRASH
    assert first.reason.startswith("RBD snapshot, taken within ")
    vm.write(5 * MIB + 7, b"new")
    second = await vm.back_up()
    assert (second.stats.read, second.stats.changed) == (FRAME, FRAME)
    assert vm.snaps() == [vm.name(second)]
    assert content(vm.repository, first) != content(vm.repository, second)
    third = await vm.back_up()
    assert third.stats.read == 0
