"""Random histories of an RBD image, backed up now and then: a revision is what a snapshot was.

BACKYFS_CEPH is the number of histories (20).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from backyfs.engine.backup import back_up
from backyfs.engine.trust import distrust
from backyfs.model import new_revision_id
from backyfs.source.ceph.config import read_config
from backyfs.source.ceph.points import prefix, revision_of
from backyfs.source.ceph.source import CephSource
from backyfs.store.record import Record
from backyfs.store.repository import Repository
from tests.ceph.cluster import Cluster
from tests.engine.checks import content
from tests.engine.revisions import START

KIB = 1 << 10
SIZE_MAX = 640 * KIB
LAYERING, STRIPING, ALL = 1, 2, 61

sizes = st.integers(0, 20).map(lambda n: n * 32 * KIB) | st.integers(0, SIZE_MAX)
places = st.integers(0, SIZE_MAX)
lengths = st.integers(1, 200 * KIB) | st.sampled_from([1, 4 * KIB, 64 * KIB, SIZE_MAX])


class Histories(RuleBasedStateMachine):
    """One image and its repository."""

    ceph: Cluster

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        directory = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="backyfs-ceph-"))
        self.repository = Repository.create(Path(directory) / "vm", "packs")
        self.ioctx = self.stack.enter_context(
            self.stack.enter_context(self.ceph.connected()).open_ioctx("rbd")
        )
        self.prefix = prefix(self.repository.uuid)
        self.name, self.count, self.full = "vm", 0, False
        self.kept: dict[str, bytes] = {}

    def teardown(self) -> None:
        self.stack.close()
        self.ceph.empty("rbd")

    @contextlib.contextmanager
    def image(self, snapshot: str | None = None) -> Iterator[Any]:
        import rbd

        with rbd.Image(self.ioctx, self.name, snapshot=snapshot) as image:
            yield image

    def snaps(self) -> list[str]:
        with self.image() as image:
            return [snap["name"] for snap in image.list_snaps()]

    def ours(self) -> list[str]:
        return [name for name in self.snaps() if revision_of(name, self.prefix)]

    @initialize(
        features=st.sampled_from([ALL, ALL, ALL, LAYERING, ALL | STRIPING]),
        order=st.sampled_from([12, 14, 16]),
        size=sizes,
        clone=st.booleans(),
    )
    def start(self, features: int, order: int, size: int, clone: bool) -> None:
        self.make(features, order, size, clone)

    def make(self, features: int, order: int, size: int, clone: bool) -> None:
        import rbd

        shape: dict[str, Any] = {"order": order, "features": features}
        if features & STRIPING:
            shape |= {"stripe_unit": 1 << (order - 2), "stripe_count": 3}
        if not clone or not size:
            rbd.RBD().create(self.ioctx, self.name, size, old_format=False, **shape)
            return
        self.count += 1
        parent = f"parent{self.count}"
        rbd.RBD().create(self.ioctx, parent, size, old_format=False, **shape)
        with rbd.Image(self.ioctx, parent) as image:
            if size:
                image.write(self.bytes(size // 2 + 1), size // 4)
            image.create_snap("s")
            image.protect_snap("s")
        rbd.RBD().clone(self.ioctx, parent, "s", self.ioctx, self.name, **shape)

    def bytes(self, length: int) -> bytes:
        """Some that were never there before."""
        self.count += 1
        return (b"%07d " % self.count * (length // 8 + 1))[:length]

    # The guest

    @rule(offset=places, length=lengths)
    def write(self, offset: int, length: int) -> None:
        with self.image() as image:
            length = min(length, image.size() - offset)
            if length > 0:
                image.write(self.bytes(length), offset)

    @rule(offset=places, length=lengths, zeroes=st.booleans())
    def discard(self, offset: int, length: int, zeroes: bool) -> None:
        with self.image() as image:
            length = min(length, image.size() - offset)
            if length > 0:
                (image.write_zeroes if zeroes else image.discard)(offset, length)

    # The operator of the cluster

    @rule(size=sizes)
    def resize(self, size: int) -> None:
        with self.image() as image:
            image.resize(size)

    @rule()
    def make_a_snapshot(self) -> None:
        self.count += 1
        with self.image() as image:
            image.create_snap(f"foreign{self.count}")

    @precondition(lambda self: self.snaps())
    @rule(data=st.data(), foreign=st.booleans())
    def remove_a_snapshot(self, data: st.DataObject, foreign: bool) -> None:
        names = [name for name in self.snaps() if name.startswith("foreign") or not foreign]
        if names:
            with self.image() as image:
                image.remove_snap(data.draw(st.sampled_from(names)))

    @precondition(lambda self: self.snaps())
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        with self.image() as image:
            image.rollback_to_snap(data.draw(st.sampled_from(self.snaps())))

    @rule()
    def flatten(self) -> None:
        import rbd

        with self.image() as image, contextlib.suppress(rbd.InvalidArgument):
            image.flatten()

    @rule()
    def rename(self) -> None:
        import rbd

        self.count += 1
        name = f"vm{self.count}"
        rbd.RBD().rename(self.ioctx, self.name, name)
        self.name = name

    @rule(size=sizes, clone=st.booleans())
    def make_the_image_anew(self, size: int, clone: bool) -> None:
        import rbd

        with self.image() as image:
            for name in self.snaps():
                image.remove_snap(name)
        rbd.RBD().remove(self.ioctx, self.name)
        self.make(ALL, 14, size, clone)

    # Whoever backs up

    @rule(check=st.booleans())
    def back_up(self, check: bool) -> None:
        record = trio.run(lambda: back_up(self.repository, self.source(), verify=check))
        ours = self.ours()
        assert ours == ([] if self.full else [self.prefix + record.id])
        with self.image(*ours) as image:
            expected = image.read(0, image.size()) if image.size() else b""
        assert content(self.repository, record) == expected
        self.kept[record.id] = expected

    def source(self) -> CephSource:
        return CephSource(
            read_config({"pool": "rbd", "image": self.name, "full-always": self.full})
        )

    @rule()
    def full_always(self) -> None:
        self.full = not self.full

    @rule()
    def kill_a_backup(self) -> None:
        with self.image() as image:
            image.create_snap(self.prefix + new_revision_id(START))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        revision = data.draw(st.sampled_from(sorted(self.kept)))
        self.repository.remove([revision])
        del self.kept[revision]

    @precondition(lambda self: self.kept)
    @rule()
    def distrust(self) -> None:
        distrust(self.repository, self.newest(), "a whim")

    def newest(self) -> list[Record]:
        return self.repository.revisions()[-1:]

    @rule()
    def collect(self) -> None:
        self.repository.gc()

    @invariant()
    def every_revision_reads_back(self) -> None:
        for record in self.repository.revisions():
            assert content(self.repository, record) == self.kept[record.id]


def test_histories(ceph: Cluster) -> None:
    Histories.ceph = ceph
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=int(os.environ.get("BACKYFS_CEPH", "20")),
            stateful_step_count=20,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
