from __future__ import annotations

import contextlib
import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backyfs.errors import Corrupt, NoRevision
from backyfs.model import FRAME, Extent
from backyfs.reader.cache import FrameCache
from backyfs.reader.images import OpenImages, RawImage
from backyfs.store.record import Record
from backyfs.store.repository import Repository
from tests.reader.stores import add_revision, content, make_vm
from tests.reader.test_cache import Bytes
from tests.reader.test_catalog import Clock

DATA = content(6, seed=9, tail=50)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def images(clock: Clock) -> OpenImages:
    return OpenImages(FrameCache(), clock=clock, images_max=3)


@pytest.fixture
def vm(tmp_path: Path) -> Repository:
    return make_vm(tmp_path, "vm", DATA, DATA[:FRAME], DATA[::-1], DATA + DATA)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def removed_packs(directory: Path) -> int:
    """How many pack files below it this process has open that have no name any more."""
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            target = os.readlink(entry)
            count += target.startswith(str(directory)) and target.endswith(".pack (deleted)")
    return count


def records(repository: Repository) -> list[Record]:
    return repository.revisions()


def test_one_image_for_all_who_read_a_disk(vm: Repository, images: OpenImages) -> None:
    record = records(vm)[0]
    first, second = (images.open(vm, record, "disk") for _ in range(2))
    assert first.image is second.image
    assert len(images) == 1
    first.close()
    first.close()
    images.sweep()
    assert second.image.read(0, len(DATA)) == DATA


def test_many_at_once_open_it_once(vm: Repository, images: OpenImages) -> None:
    record = records(vm)[0]
    barrier = threading.Barrier(8)

    def open_it() -> object:
        barrier.wait(10)
        return images.open(vm, record, "disk").image

    with ThreadPoolExecutor(8) as pool:
        found = [each.result(10) for each in [pool.submit(open_it) for _ in range(8)]]
    assert len({id(image) for image in found}) == 1


def test_one_that_stays_open_keeps_no_packs_of_others(
    tmp_path: Path, images: OpenImages, clock: Clock
) -> None:
    """Else a machine that runs from its backup would fill the disk with what gc has removed."""
    served, writer = make_vm(tmp_path, "vm", DATA), Repository.open(tmp_path / "vm")
    kept = images.open(served, records(served)[0], "disk")
    for seed in range(6):
        data = content(6, seed=seed)
        record = add_revision(writer, data)
        lease = images.open(served, record, "disk")
        assert lease.image.read(0, len(data)) == data
        lease.close()
        clock.now += 100
        images.sweep()
        assert writer.remove([record.id]).removed == [record.id]
        assert writer.gc().removed_files == 1
        assert removed_packs(tmp_path) <= 1
        assert kept.image.read(0, len(DATA)) == DATA
    kept.close()
    images.close()
    assert removed_packs(tmp_path) == 0


def test_an_idle_image_is_closed_soon(vm: Repository, images: OpenImages, clock: Clock) -> None:
    before = descriptors()
    record = records(vm)[0]
    lease = images.open(vm, record, "disk")
    lease.image.read(0, 10)
    assert vm.remove([record.id]).in_use == [record.id]
    clock.now += 100
    images.sweep()
    assert lease.image.read(0, 10) == DATA[:10]
    lease.close()
    images.sweep()
    assert len(images) == 1, "it lingers: the next reader comes soon"
    clock.now += 4.5
    images.sweep()
    assert len(images) == 0
    assert descriptors() == before
    assert vm.remove([record.id]).removed == [record.id]


def test_opening_again_while_it_lingers(vm: Repository, images: OpenImages, clock: Clock) -> None:
    record = records(vm)[0]
    first = images.open(vm, record, "disk")
    first.close()
    second = images.open(vm, record, "disk")
    clock.now += 100
    images.sweep()
    assert second.image.read(0, 10) == DATA[:10]


def test_the_number_is_bounded(vm: Repository, images: OpenImages) -> None:
    leases = [images.open(vm, record, "disk") for record in records(vm)[:3]]
    with pytest.raises(OSError, match="open already") as caught:
        images.open(vm, records(vm)[3], "disk")
    assert caught.value.errno == errno.ENFILE
    leases[0].close()
    images.open(vm, records(vm)[3], "disk")  # an idle one makes room at once
    assert len(images) == 3


def test_what_cannot_be_opened_leaves_nothing(vm: Repository, images: OpenImages) -> None:
    before = descriptors()
    record = records(vm)[0]
    with pytest.raises(NoRevision):
        images.open(vm, record, "none")
    for name in record.disks["disk"].files:
        (vm.layout.revisions / name).unlink()
    for _ in range(2):
        with pytest.raises(Corrupt):
            images.open(vm, record, "disk")
    assert len(images) == 0
    assert descriptors() == before


def test_close_closes_all(vm: Repository, images: OpenImages) -> None:
    before = descriptors()
    lease = images.open(vm, records(vm)[0], "disk")
    images.open(vm, records(vm)[1], "disk").close()
    images.close()
    lease.close()
    images.sweep()
    assert descriptors() == before


def test_a_raw_image_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(DATA)
    fd = os.open(path, os.O_RDONLY)
    image = RawImage(Bytes(DATA), fd)
    assert image.raw_fd() == fd
    assert image.read(5, 1000) == DATA[5:1005]
    assert image.try_read(5, 1000) in (DATA[5:1005], None)
    image.prefetch(Extent(0, 10))
    assert image.read_unless_reserved(0, 10) is None
    for read in (image.read, image.try_read):
        with pytest.raises(ValueError, match="outside"):
            read(len(DATA), 1)
    os.close(fd)
    assert image.try_read(0, 1) is None


def test_a_raw_image_cut_short_gives_no_wrong_byte(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    path.write_bytes(DATA[:FRAME])
    source = Bytes(DATA)
    source.bad = {1}
    with open(path, "rb") as stream:
        image = RawImage(source, stream.fileno())
        assert image.try_read(FRAME, 10) is None
        with pytest.raises(Corrupt):
            image.read(FRAME, 10)
