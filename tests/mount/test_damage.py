"""A damaged store under a mount: errors where the damage is, and nowhere else."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backyfs.model import FRAME
from backyfs.mount.daemon import Logging
from backyfs.store.repository import Repository
from tests import filesystems
from tests.mount.mounts import Mounted, eventually, mounted
from tests.reader.stores import add_revision, make_vm

FRAMES = 48
DATA = random.Random(4).randbytes(FRAMES * FRAME)
"""Incompressible, so that a byte of the pack belongs to a frame that is easy to find."""


@pytest.fixture
def vm(base: Path) -> Repository:
    return make_vm(base, "vm", DATA)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    return tmp_path / "base"


@pytest.fixture
def tree(base: Path, vm: Repository, tmp_path: Path) -> Iterator[Mounted]:
    make_vm(base, "sound", DATA[: 3 * FRAME])
    with mounted(base, tmp_path / "mnt", logging=Logging(tmp_path / "log")) as mount:
        yield mount


def pack_of(vm: Repository) -> Path:
    [pack] = vm.layout.packs.glob("*.pack")
    return pack


def damage(vm: Repository, frame: int) -> None:
    """Flip a byte in the middle of a stored frame; replaced, as a bad disk would show it."""
    pack = pack_of(vm)
    data = bytearray(pack.read_bytes())
    at = data.index(DATA[frame * FRAME + 1000 : frame * FRAME + 1064])
    data[at] ^= 0xFF
    pack.write_bytes(data)


def read_page(fd: int, offset: int) -> bytes | None:
    """A page, None for an I/O error; nothing else may come."""
    try:
        return os.pread(fd, 4096, offset)
    except OSError as exc:
        assert exc.errno == errno.EIO
        return None


def bad_frames(path: Path) -> set[int]:
    """Frames that cannot be read, having compared all other bytes."""
    bad = set()
    fd = os.open(path, os.O_RDONLY)
    try:
        for offset in range(0, len(DATA), 4096):
            page = read_page(fd, offset)
            if page is None:
                bad.add(offset // FRAME)
            else:
                assert page == DATA[offset : offset + 4096]
    finally:
        os.close(fd)
    return bad


def test_a_damaged_frame(vm: Repository, tree: Mounted, tmp_path: Path) -> None:
    damage(vm, 17)
    damage(vm, 18)
    damage(vm, 40)
    image = tree.path / "vm/latest/disk.img"
    assert bad_frames(image) == {17, 18, 40}
    with open(image, "rb") as stream, pytest.raises(OSError, match="Input/output error"):
        stream.read()
    assert (tree.path / "sound/latest/disk.img").read_bytes() == DATA[: 3 * FRAME]
    assert tree.alive()
    record = vm.revisions()[0]
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if " ERROR " in line]
    assert len(lines) == 3, "once per place, however often it is read"
    for frame, line in zip((17, 18, 40), sorted(lines, key=_place), strict=True):
        assert f"vm/{record.id}/disk: damaged at byte {frame * FRAME} (length {FRAME})" in line
    assert len(vm.quarantine.bad()) == 3
    state = (tree.path / "vm/latest/revision.json").read_text
    assert eventually(lambda: '"damaged": [{' in state())


def test_damage_that_cannot_be_recorded_yet_holds_up_who_reads_it_alone(tmp_path: Path) -> None:
    """The store's file system is frozen, for a snapshot: who writes waits."""
    with filesystems.mounted("xfs", tmp_path, 0) as base:
        vm = make_vm(base, "vm", DATA)
        damage(vm, 17)
        with (
            mounted(base, tmp_path / "mnt") as tree,
            open(tree.path / "vm/latest/disk.img", "rb", buffering=0) as image,
            ThreadPoolExecutor() as pool,
        ):
            filesystems.run("fsfreeze", "--freeze", base)
            try:
                reading = pool.submit(read_page, image.fileno(), 17 * FRAME)
                for _ in range(100):
                    assert pool.submit(os.statvfs, tree.path).result(20)
            finally:
                filesystems.run("fsfreeze", "--unfreeze", base)
            assert reading.result(60) is None
        assert len(vm.quarantine.bad()) == 1


def _place(line: str) -> int:
    return int(line.partition("damaged at byte ")[2].split()[0])


def test_reading_again_once_it_is_whole(vm: Repository, tree: Mounted) -> None:
    pack = pack_of(vm)
    sound = pack.read_bytes()
    damage(vm, 5)
    image = tree.path / "vm/latest/disk.img"
    assert bad_frames(image) == {5}
    pack.write_bytes(sound)
    assert bad_frames(image) == set()


@pytest.mark.parametrize("keep", [0, 100, 30 * FRAME])
@pytest.mark.parametrize("opened", [False, True], ids=["before", "while open"])
def test_a_pack_cut_short(vm: Repository, tree: Mounted, keep: int, opened: bool) -> None:
    image = tree.path / "vm/latest/disk.img"
    pack = pack_of(vm)
    if opened:
        with open(image, "rb", buffering=0) as stream:
            assert stream.read(FRAME) == DATA[:FRAME]
            os.truncate(pack, keep)
            _read_all(stream.fileno())
    else:
        os.truncate(pack, keep)
        fd = os.open(image, os.O_RDONLY)
        _read_all(fd)
        os.close(fd)
    assert tree.alive()
    assert (tree.path / "sound/latest/disk.img").read_bytes() == DATA[: 3 * FRAME]


def _read_all(fd: int) -> None:
    bad = 0
    for offset in range(0, len(DATA), FRAME):
        page = read_page(fd, offset)
        bad += page is None
        assert page in (None, DATA[offset : offset + 4096])
    assert bad


def test_a_pack_that_is_gone(vm: Repository, tree: Mounted) -> None:
    pack_of(vm).unlink()
    fd = os.open(tree.path / "vm/latest/disk.img", os.O_RDONLY)
    assert read_page(fd, 0) is None
    os.close(fd)
    assert tree.alive()


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_a_damaged_map(vm: Repository, tree: Mounted, how: str) -> None:
    [path] = vm.layout.revisions.glob("*.map")
    if how == "flip":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.unlink()
    image = tree.path / "vm/latest/disk.img"
    assert image.stat().st_size == len(DATA)
    with pytest.raises(OSError, match="Input/output error"):
        image.open("rb")
    assert (tree.path / "sound/latest/disk.img").read_bytes() == DATA[: 3 * FRAME]
    assert tree.alive()


def test_a_damaged_record_hides_its_revision_only(vm: Repository, tree: Mounted) -> None:
    added = add_revision(vm, DATA[:FRAME])
    path = vm.layout.record(added.id)
    path.write_bytes(path.read_bytes()[:-40])
    first = vm.revisions()[0].id
    directory = tree.path / "vm"
    left = sorted([first, "at", "by-tag", "latest"])
    assert eventually(lambda: sorted(os.listdir(directory)) == left)
    assert eventually(lambda: os.readlink(directory / "latest") == first)
    assert (directory / "latest/disk.img").read_bytes() == DATA


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff", b'{"format": 2}'])
def test_a_vm_that_is_no_sound_repository(vm: Repository, tree: Mounted, text: bytes) -> None:
    vm.layout.identity.write_bytes(text)
    with pytest.raises(OSError, match="Input/output error"):
        os.listdir(tree.path / "vm")
    assert sorted(os.listdir(tree.path)) == ["sound", "vm"]
    assert tree.alive()


def test_a_store_that_goes_away_is_no_empty_tree(
    base: Path, vm: Repository, tree: Mounted, tmp_path: Path
) -> None:
    assert os.listdir(tree.path)
    base.rename(tmp_path / "away")

    def fails() -> bool:
        try:
            os.listdir(tree.path)
        except OSError as exc:
            return exc.errno == errno.EIO
        return False

    assert eventually(fails)
    (tmp_path / "away").rename(base)
    assert eventually(lambda: sorted(os.listdir(tree.path)) == ["sound", "vm"])
