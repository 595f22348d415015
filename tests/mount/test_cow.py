"""Raw, reflinked revisions through the mount."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from backyfs.model import FRAME, Consistency
from backyfs.store.record import Draft
from backyfs.store.repository import Repository
from tests.mount.mounts import Mounted, eventually, mounted
from tests.reader.stores import add_revision, content, make_vm
from tests.store.contract import spoil

FIRST = content(30, seed=1, tail=777)
SECOND = FIRST[: 20 * FRAME] + content(25, seed=2)


@pytest.fixture
def vm(reflink_dir: Path) -> Repository:
    return make_vm(reflink_dir, "vm", FIRST, SECOND, store="cow")


@pytest.fixture
def tree(vm: Repository, tmp_path: Path) -> Iterator[Mounted]:
    with mounted(vm.path.parent, tmp_path / "mnt") as mount:
        yield mount


def images(vm: Repository, tree: Mounted) -> list[Path]:
    return [tree.path / "vm" / record.id / "disk.img" for record in vm.revisions()]


def test_contents(vm: Repository, tree: Mounted) -> None:
    first, second = images(vm, tree)
    assert first.read_bytes() == FIRST
    assert second.read_bytes() == SECOND
    rng = random.Random(1)
    with open(second, "rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for _ in range(200):
            offset, length = rng.randrange(len(SECOND) + 10), rng.randrange(1 << 18)
            assert os.pread(stream.fileno(), length, offset) == SECOND[offset : offset + length]
    for path, record in zip((first, second), vm.revisions(), strict=True):
        disk = record.disks["disk"]
        assert (path.stat().st_size, path.stat().st_blocks) == (disk.size, -(-disk.data // 512))


def test_what_was_healed_is_shown(vm: Repository, tree: Mounted) -> None:
    """The kernel had the bad bytes; nobody opened the file while damage was known."""
    first = vm.revisions()[0]
    path = images(vm, tree)[0]
    spoil(vm, first, 3)
    assert path.read_bytes() != FIRST
    with contextlib.closing(vm.open_disk(first, "disk")) as image:
        assert image.check(3, 1) == [3]
    with vm.writing() as intent, vm.begin(intent, first) as staging:
        writer = staging.disk("disk", len(FIRST))
        for extent in writer.required():
            writer.write(extent.offset, FIRST[extent.offset : extent.end])
        staging.commit(Draft(Consistency.CRASH))
    assert not vm.quarantine.bad()
    assert path.read_bytes() == FIRST


def test_an_open_file_outlives_its_revision(vm: Repository, tree: Mounted) -> None:
    path = images(vm, tree)[0]
    with open(path, "rb", buffering=0) as stream:
        stream.read(1)
        revision = vm.revisions()[0].id
        assert vm.remove([revision]).in_use == [revision]
        assert vm.remove([revision], force=True).removed == [revision]
        assert eventually(lambda: not path.exists())
        stream.seek(0)
        assert stream.readall() == FIRST


def test_an_image_cut_short(vm: Repository, tree: Mounted) -> None:
    first, second = images(vm, tree)
    [raw] = vm.layout.revisions.glob(f"{vm.revisions()[0].id}*.img")
    with open(first, "rb", buffering=0) as stream:
        assert stream.read(10) == FIRST[:10]
        os.truncate(raw, 2 * FRAME)
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(stream.fileno(), 4096, 25 * FRAME)
    assert second.read_bytes() == SECOND
    assert tree.alive()


def flip(vm: Repository, frame: int) -> None:
    [raw] = vm.layout.revisions.glob(f"{vm.revisions()[1].id}*.img")
    with open(raw, "r+b") as stream:
        stream.seek(frame * FRAME + 5)
        byte = stream.read(1)[0]
        stream.seek(frame * FRAME + 5)
        stream.write(bytes([byte ^ 1]))


def test_a_flipped_byte_when_checked(vm: Repository, tmp_path: Path) -> None:
    flip(vm, 22)
    with mounted(vm.path, tmp_path / "mnt", check=True) as tree:
        path = images(vm, tree)[1]
        with open(path, "rb", buffering=0) as stream:
            for frame in (0, 21, 23, 44):
                expected = SECOND[frame * FRAME : frame * FRAME + 4096]
                assert os.pread(stream.fileno(), 4096, frame * FRAME) == expected
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(stream.fileno(), 4096, 22 * FRAME)


def test_known_damage_is_never_handed_out(vm: Repository, tree: Mounted) -> None:
    flip(vm, 22)
    path = images(vm, tree)[1]
    assert path.read_bytes() != SECOND, "unchecked, and now in the page cache"
    checked = vm.open_disk(vm.revisions()[1], "disk")
    assert checked.check(0, 45) == [22]
    checked.close()

    def refused() -> bool:
        try:
            path.read_bytes()
        except OSError:
            return True
        return False

    assert eventually(refused)
    add_revision(vm, FIRST)
    assert eventually(lambda: (tree.path / "vm/latest/disk.img").stat().st_size == len(FIRST))
    assert (tree.path / "vm/latest/disk.img").read_bytes() == FIRST
