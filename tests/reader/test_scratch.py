from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from backyfs.errors import NoRevision
from backyfs.reader.cache import FrameCache
from backyfs.reader.images import LINGER_S, OpenImages
from backyfs.reader.overlay import Scratch
from backyfs.reader.scratch import ScratchViews, View
from backyfs.reader.shared import Lease
from backyfs.store.repository import Repository
from tests.reader.stores import content, make_vm
from tests.reader.test_catalog import Clock

DATA = content(3, seed=9, tail=50)
IDLE_S = 60.0


class Views:
    """Views of a VM with three revisions, and the images below them."""

    def __init__(self, repository: Repository, directory: Path) -> None:
        self.clock = Clock()
        self.images = OpenImages(FrameCache(), clock=self.clock)
        self.scratch = Scratch(directory)
        self.table = ScratchViews(self.scratch, idle_s=IDLE_S, views_max=2, clock=self.clock)
        self.repository, self.records = repository, repository.revisions()

    def open(self, number: int = 0) -> Lease[View]:
        return self.table.open(self.images, self.repository, self.records[number], "disk")

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.table.sweep()
        self.images.sweep()


@pytest.fixture
def views(tmp_path: Path) -> Views:
    return Views(make_vm(tmp_path, "vm", DATA, DATA[::-1], DATA[:99]), tmp_path)


def test_all_share_one_view_of_a_disk(views: Views) -> None:
    one, two, other = views.open(), views.open(), views.open(1)
    one.image.overlay.write(0, b"new")
    assert two.image.overlay.read(0, len(DATA)) == b"new" + DATA[3:]
    assert other.image.overlay.read(0, len(DATA)) == DATA[::-1]
    assert views.table.changed_ns(views.repository, views.records[0], "disk") > 0
    assert views.table.changed_ns(views.repository, views.records[1], "disk") == 0
    assert views.table.changed_ns(views.repository, views.records[2], "disk") == 0


def test_what_was_written_lasts_until_it_is_idle(views: Views) -> None:
    lease = views.open()
    lease.image.overlay.write(0, b"new")
    views.wait(10 * IDLE_S)
    lease.close()
    views.wait(IDLE_S - 1)
    lease = views.open()
    assert lease.image.overlay.read(0, 3) == b"new"
    lease.close()
    views.wait(IDLE_S - 1)
    assert views.scratch.used_bytes == 4096
    views.wait(1)
    assert views.scratch.used_bytes == 0
    assert views.open().image.overlay.read(0, 3) == DATA[:3]


def test_what_was_only_read_is_closed_soon(views: Views) -> None:
    before = len(os.listdir("/proc/self/fd"))
    lease = views.open()
    lease.image.overlay.read(0, 3)
    lease.close()
    views.wait(LINGER_S)
    views.wait(LINGER_S)
    assert len(views.images) == 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_its_revision_is_in_use(views: Views) -> None:
    lease = views.open()
    lease.image.overlay.write(0, b"new")
    lease.close()
    views.wait(IDLE_S - 1)
    assert views.repository.remove([views.records[0].id]).in_use == [views.records[0].id]
    views.wait(1)
    views.wait(LINGER_S)
    assert views.repository.remove([views.records[0].id]).in_use == []


def test_too_many(views: Views) -> None:
    views.open(0).image.overlay.write(0, b"x")
    views.open(1).close()
    with pytest.raises(OSError, match="open already") as caught:
        views.open(2)
    assert caught.value.errno == errno.ENFILE
    views.wait(LINGER_S)
    views.open(2)


def test_a_failure_leaves_nothing_open(views: Views) -> None:
    with pytest.raises(NoRevision):
        views.table.open(views.images, views.repository, views.records[0], "none")
    views.scratch.close()
    with pytest.raises(OSError, match="No such file"):
        views.open()
    views.wait(LINGER_S)
    assert len(views.images) == 0


def test_the_end(views: Views) -> None:
    views.open().image.overlay.write(0, b"x")
    views.table.close()
    views.images.close()
    assert views.scratch.used_bytes == 0
