"""Backups of RBD images: what is read, which snapshots stay, and what is said when one is gone."""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from backyfs.engine.backup import back_up
from backyfs.engine.trust import distrust
from backyfs.errors import SourceUnavailable
from backyfs.model import FRAME, Consistency, Extent
from backyfs.source.cancelling import checking
from backyfs.source.ceph import diff, points
from backyfs.source.ceph.config import read_config
from backyfs.source.ceph.heads import Head, Taken, take
from backyfs.source.ceph.points import Kind, prefix
from backyfs.source.ceph.snapshot import CephDisk
from backyfs.source.ceph.source import CephSession, CephSource
from backyfs.source.contract import Backups
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

    def kill_while_removing(self, name: str, delay_s: float) -> None:
        """A client begins to remove a snapshot, and is killed."""
        code = (
            "import os, rados, rbd, sys\n"
            "cluster = rados.Rados(conffile=os.environ['CEPH_CONF']); cluster.connect()\n"
            "image = rbd.Image(cluster.open_ioctx('rbd'), 'vm'); print('now', flush=True)\n"
            "image.remove_snap(sys.argv[1])\n"
        )
        with subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE) as client:
            assert client.stdout
            assert client.stdout.readline() == b"now\n"
            time.sleep(delay_s)
            client.kill()

    def remove(self) -> None:
        import rbd

        with self.ceph.connected() as rados, rados.open_ioctx("rbd") as ioctx:
            with rbd.Image(ioctx, "vm") as image:
                for snap in list(image.list_snaps()):
                    image.remove_snap(snap["name"])
            rbd.RBD().remove(ioctx, "vm")

    def invalidate_object_map(self) -> None:
        """An object that the map does not know: `object-map check` finds it, and flags the map."""
        with self.ceph.connected() as rados, rados.open_ioctx("rbd") as ioctx:
            with self.ceph.image("vm") as image:
                lost = f"{image.block_name_prefix()}.{3:016x}"
            ioctx.write_full(lost, b"unknown")
        self.ceph.rbd("object-map", "check", "rbd/vm")

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


async def test_the_bug_of_fast_diff(vm: Vm) -> None:
    """Shrunk, a snapshot by somebody else, grown back: what Ceph's object maps say is wrong."""
    import rbd

    with vm.ceph.image("vm") as image:
        image.write(b"x" * 16 * MIB, 0)
    first = await vm.back_up()
    with vm.ceph.image("vm") as image:
        image.resize(6 * MIB)
        image.create_snap("somebody")
        image.resize(16 * MIB)
    second = await vm.back_up()
    assert content(vm.repository, second)[6 * MIB :] == bytes(10 * MIB)
    assert vm.snaps() == ["somebody", vm.name(second)]
    with vm.ceph.image("vm", vm.name(second)) as image:
        assert image.features() & rbd.RBD_FEATURE_FAST_DIFF
    assert first.id != second.id


@pytest.mark.parametrize("fast", [False, True])
def test_asking_what_changed_stops_at_a_checkpoint(
    vm: Vm, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diff, "_WINDOW_OBJECTS", 1)
    with vm.ceph.image("vm") as image:
        image.create_snap("before")
        image.write(b"x" * 16 * MIB, 0)
        image.create_snap("after")
    with vm.ceph.image("vm", "after") as image:
        assert diff.changes(image, "before", fast=fast) == [Extent(0, 16 * MIB)]
        asked: list[None] = []

        def check() -> None:
            asked.append(None)
            if len(asked) == 3:
                raise TimeoutError("cancelled")

        with checking(check), pytest.raises(TimeoutError, match="cancelled"):
            diff.changes(image, "before", fast=fast)


async def test_a_backup_that_fails_takes_its_snapshot_back(vm: Vm) -> None:
    first = await vm.back_up()
    vm.write(0, b"more")
    with pytest.raises(ZeroDivisionError):
        await back_up(vm.repository, Failing(read_config(vm.settings)))
    assert vm.snaps() == [vm.name(first)]
    second = await vm.back_up()
    assert (second.parent, second.stats.read) == (first.id, FRAME)


class Failing(CephSource):
    """Fails when the disks are asked for: there are snapshots then."""

    @contextlib.contextmanager
    def session(self, backups: Backups) -> Iterator[CephSession]:
        with super().session(backups) as session:

            def fail(heads: Mapping[str, Head], name: str) -> Taken:
                take(heads, name)
                raise ZeroDivisionError

            session._take = fail
            yield session


async def test_what_a_killed_backup_left(vm: Vm, caplog: pytest.LogCaptureFixture) -> None:
    first = await vm.back_up()
    left = prefix(vm.repository.uuid) + "20200101T000000Z-dead"
    others = ["mine", "backy-12345678-20200101T000000Z-dead", f"{left}x"]
    with vm.ceph.image("vm") as image:
        for name in [left, *others]:
            image.create_snap(name)
    second = await vm.back_up()
    assert second.parent == first.id
    assert sorted(vm.snaps()) == sorted([*others, vm.name(second)])
    assert warnings(caplog) == []


async def test_a_protected_snapshot_stays(vm: Vm, caplog: pytest.LogCaptureFixture) -> None:
    first = await vm.back_up()
    with vm.ceph.image("vm") as image:
        image.protect_snap(vm.name(first))
    second = await vm.back_up()
    assert vm.snaps() == [vm.name(first), vm.name(second)]
    assert warnings(caplog) == ["snapshot is protected or has clones, and stays"]
    with vm.ceph.image("vm") as image:
        image.unprotect_snap(vm.name(first))
    assert vm.snaps()[1:] == [vm.name(second)]
    third = await vm.back_up()
    assert vm.snaps() == [vm.name(third)]


async def test_a_snapshot_with_clones_goes_with_them(
    vm: Vm, caplog: pytest.LogCaptureFixture
) -> None:
    """It lies in the trash until then, as one does whose removal was interrupted."""
    first = await vm.back_up()
    clone = ["clone", "--rbd-default-clone-format", "2", f"rbd/vm@{vm.name(first)}", "rbd/clone"]
    assert vm.ceph.rbd(*clone).returncode == 0
    second = await vm.back_up()
    with vm.ceph.image("vm") as image:
        kinds = [(snap.name, snap.kind) for snap in points.snaps(image)]
    assert kinds == [(vm.name(first), Kind.TRASH), (vm.name(second), Kind.USER)]
    third = await vm.back_up()
    assert vm.ceph.rbd("rm", "rbd/clone").returncode == 0
    assert vm.snaps() == [vm.name(third)]
    assert warnings(caplog) == []


async def test_a_removal_that_was_interrupted(vm: Vm) -> None:
    """Ceph keeps what is left of the snapshot under another name, in its trash."""
    first = await vm.back_up()
    delays = random.Random(1)
    for _ in range(200):
        vm.kill_while_removing(vm.name(first), delays.uniform(0, 0.05))
        with vm.ceph.image("vm") as image:
            kinds = [snap.kind for snap in points.snaps(image)]
            if not kinds:
                image.create_snap(vm.name(first))
        if kinds == [Kind.TRASH]:
            break
    else:
        raise AssertionError("never killed at the right time")
    second = await vm.back_up()
    assert vm.snaps() == [vm.name(second)]


async def test_an_older_snapshot_is_better_than_none(vm: Vm) -> None:
    first = await vm.back_up()
    with vm.ceph.image("vm") as image:
        image.protect_snap(vm.name(first))  # so that it stays
    vm.write(5 * MIB, b"second")
    second = await vm.back_up()
    with vm.ceph.image("vm") as image:
        image.unprotect_snap(vm.name(first))
        image.remove_snap(vm.name(second))
    third = await vm.back_up()
    assert (third.parent, third.stats.read) == (first.id, FRAME)
    assert vm.snaps() == [vm.name(third)]


async def test_a_snapshot_removed_by_hand(vm: Vm, caplog: pytest.LogCaptureFixture) -> None:
    first = await vm.back_up()
    with vm.ceph.image("vm") as image:
        image.remove_snap(vm.name(first))
    second = await vm.back_up()
    assert (second.parent, second.stats.changed) == (first.id, 0)
    assert second.stats.read >= 5 * MIB
    assert warnings(caplog) == ["the last backup's snapshot is gone: the image is read whole"]


async def test_a_snapshot_of_the_same_name_is_another_one(vm: Vm) -> None:
    first = await vm.back_up()
    vm.write(0, b"before the other snapshot")
    with vm.ceph.image("vm") as image:
        image.remove_snap(vm.name(first))
        image.create_snap(vm.name(first))
    await vm.back_up()


async def test_a_snapshot_removed_while_it_is_read(vm: Vm) -> None:
    """What is read of it then may be anything: nothing is published."""

    class Removing(CephDisk):
        def changed(self) -> None:
            with vm.ceph.image("vm") as image:
                for name in vm.snaps():
                    image.remove_snap(name)

    first = await vm.back_up()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backyfs.source.ceph.source.CephDisk", Removing)
        with pytest.raises(SourceUnavailable, match="was removed while it was read"):
            await back_up(vm.repository, vm.source)
    assert [record.id for record in vm.repository.revisions()] == [first.id]
    await vm.back_up()


async def test_an_image_made_anew(vm: Vm, caplog: pytest.LogCaptureFixture) -> None:
    first = await vm.back_up()
    vm.remove()
    vm.ceph.create_image("vm", 16 * MIB)
    vm.write(0, b"another machine")
    second = await vm.back_up()
    assert second.parent == first.id
    assert warnings(caplog) == ["the image is not that of the last backup: it is read whole"]


async def test_a_renamed_image_is_the_same(vm: Vm) -> None:
    first = await vm.back_up()
    assert vm.ceph.rbd("rename", "rbd/vm", "rbd/renamed").returncode == 0
    vm.settings["image"] = "renamed"
    second = await back_up(vm.repository, vm.source)
    assert (second.parent, second.stats.read) == (first.id, 0)
    assert vm.snaps("renamed") == [vm.name(second)]


async def test_full_always_leaves_nothing(vm: Vm) -> None:
    await vm.back_up()
    vm.settings["full-always"] = True
    second = await vm.back_up()
    assert second.stats.read >= 5 * MIB
    assert vm.snaps() == []


async def test_a_distrusted_revision_is_not_rested_on(vm: Vm) -> None:
    first = await vm.back_up()
    distrust(vm.repository, [first], "a whim")
    second = await vm.back_up()
    assert second.stats.read >= 5 * MIB


async def test_an_invalid_object_map(vm: Vm) -> None:
    """What it does not know is in the backup, in the first one and in those that follow."""
    vm.invalidate_object_map()
    await vm.back_up()
    vm.write(5 * MIB, b"new")
    second = await vm.back_up()
    assert second.stats.read == FRAME
    with vm.ceph.image("vm", vm.name(second)) as image:
        snap = points.snaps(image)[-1]
        assert diff.doubts(image, None, snap, [snap]) == "its object map is invalid"


async def test_a_copy_of_the_repository(
    vm: Vm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each removes the other's snapshot; both say so, and both are right."""
    await vm.back_up()
    shutil.copytree(tmp_path / "vm", tmp_path / "copy")
    here, there = vm.repository, Repository.open(tmp_path / "copy")
    for repository in (there, here, there):
        vm.write(5 * MIB, repository.name.encode())
        vm.repository = repository
        await vm.back_up()
    told = [text for text in warnings(caplog) if "does a copy back up" in text]
    assert len(told) == 2


async def test_images_at_one_moment(ceph: Cluster, tmp_path: Path) -> None:
    names = ["root", "data", "log"]
    for name in names:
        ceph.create_image(name, 4 * MIB)
    repository = Repository.create(tmp_path / "vm", "packs")
    source = CephSource(read_config({"pool": "rbd", "images": {name: name for name in names}}))
    record = await back_up(repository, source)
    assert record.reason.startswith("RBD snapshots of 3 images, taken within ")
    for name in names:
        with ceph.image(name) as image:
            assert [snap["name"] for snap in image.list_snaps()] == [
                prefix(repository.uuid) + record.id
            ]
    ceph.create_image("new", 4 * MIB)
    source = CephSource(read_config({"pool": "rbd", "images": {"root": "root", "new": "new"}}))
    second = await back_up(repository, source)
    assert second.stats.read == 0
    assert list(second.disks) == ["root", "new"]


async def test_an_empty_image(vm: Vm) -> None:
    with vm.ceph.image("vm") as image:
        image.resize(0)
    first = await vm.back_up()
    second = await vm.back_up()
    assert (first.size, second.size, second.parent) == (0, 0, first.id)


async def test_an_image_in_a_namespace(ceph: Cluster, tmp_path: Path) -> None:
    assert ceph.rbd("namespace", "create", "rbd/tenant").returncode == 0
    assert ceph.rbd("create", "--size", "8M", "rbd/tenant/vm").returncode == 0
    repository = Repository.create(tmp_path / "vm", "packs")
    settings = {"pool": "rbd", "namespace": "tenant", "image": "vm"}
    first = await back_up(repository, CephSource(read_config(settings)))
    again = CephSource(read_config({"images": {"disk": "rbd/tenant/vm"}}))
    second = await back_up(repository, again)
    assert second.parent == first.id
    bookmark = second.disks["disk"].source["bookmark"]
    assert (bookmark["namespace"], bookmark["image"]) == ("tenant", "vm")


@pytest.mark.parametrize(
    ("key", "value"),
    [("fsid", "another"), ("pool_id", 77), ("image_id", "another"), ("snapshot_id", 7777)],
)
async def test_what_tells_a_snapshot_from_another(vm: Vm, key: str, value: object) -> None:
    record = await vm.back_up()
    bookmark = record.disks["disk"].source["bookmark"]
    with vm.source.session(Backups(vm.repository.uuid, {record.id})) as session:
        assert session.remembers({"disk": bookmark})
        assert session.remembers({"disk": {**bookmark, "image": "an earlier name"}})
        assert not session.remembers({"disk": {**bookmark, key: value}})
        assert not session.remembers({"another": bookmark})
