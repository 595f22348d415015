"""The mounted tree, seen through the system's own tools."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from backyfs.model import FRAME
from backyfs.mount.handlers import FLEETING_S
from backyfs.reader.catalog import REFRESH_S
from backyfs.store.repository import Repository
from tests.images import checksum
from tests.mount.mounts import Mounted, eventually, mounted
from tests.parts import require
from tests.reader.stores import add_revision, content, make_vm

FIRST = content(37, seed=1, tail=777)
SECOND = FIRST[: 20 * FRAME] + content(25, seed=2)
ODD = {
    "empty": b"",
    "byte": b"\x01",
    "frame": bytes([7]) * FRAME,
    "more": bytes(FRAME) + b"\x02",
    "hole": bytes(3 * FRAME + 5),
}
EXTRA = ["at", "by-tag", "latest"]
"""What a VM's directory has beside its revisions."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("base")
    make_vm(base, "web01", FIRST, SECOND)
    add_revision(make_vm(base, "odd"), ODD)
    make_vm(base, "empty")
    return base


@pytest.fixture(scope="module")
def tree(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted(base, tmp_path_factory.mktemp("mnt")) as mount:
        yield mount.path


@pytest.fixture
def vm(tmp_path: Path) -> Repository:
    return make_vm(tmp_path, "vm", FIRST)


@pytest.fixture
def own(vm: Repository, tmp_path: Path) -> Iterator[Mounted]:
    """A mount of `vm` alone, for tests that change it."""
    with mounted(vm.path, tmp_path / "mnt") as mount:
        yield mount


def revisions(base: Path, vm: str) -> list[str]:
    return [record.id for record in Repository.open(base / vm).revisions()]


def out(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True, timeout=30
    ).stdout


def test_names(tree: Path, base: Path) -> None:
    first, second = revisions(base, "web01")
    assert sorted(os.listdir(tree)) == ["empty", "odd", "web01"]
    assert sorted(os.listdir(tree / "web01")) == sorted([first, second, *EXTRA])
    assert os.readlink(tree / "web01" / "latest") == second
    assert sorted(os.listdir(tree / "web01" / "latest")) == ["disk.img", "revision.json"]
    assert os.listdir(tree / "empty") == []
    for name in ("none", "web01/none", "empty/latest", "web01/latest/none"):
        assert not (tree / name).exists()


def test_attributes(tree: Path, base: Path) -> None:
    for record in Repository.open(base / "web01").revisions():
        for path in (tree / "web01" / record.id, tree / "web01" / record.id / "disk.img"):
            status = path.stat()
            assert status.st_mtime == pytest.approx(record.time.timestamp(), abs=1e-5)
            assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())
            assert not status.st_mode & 0o222
        disk = record.disks["disk"]
        image = (tree / "web01" / record.id / "disk.img").stat()
        assert image.st_size == disk.size
        assert image.st_blocks == -(-disk.data // 512)


def test_ls(tree: Path, base: Path) -> None:
    newest = Repository.open(base / "web01").revisions()[-1]
    listed = out("ls", "-lL", "--time-style=+%s", tree / "web01" / "latest" / "disk.img").split()
    assert listed[0] == "-r--r--r--"
    assert int(listed[4]) == len(SECOND)
    assert int(listed[5]) == int(newest.time.timestamp())


def test_du_counts_data_only(tree: Path) -> None:
    [kib] = out("du", "-k", tree / "odd/latest/hole.img").split()[:1]
    assert kib == "0"
    [apparent] = out("du", "-b", tree / "odd/latest/hole.img").split()[:1]
    assert int(apparent) == len(ODD["hole"])


def test_a_walk_is_finite_and_sees_everything(tree: Path) -> None:
    found = out("find", tree, "-type", "f").split()
    assert len(found) == 2 * 2 + len(ODD) + 1
    assert out("find", tree, "-newermt", "2100-01-01") == ""


def test_contents(tree: Path, base: Path, tmp_path: Path) -> None:
    for revision, data in zip(revisions(base, "web01"), (FIRST, SECOND), strict=True):
        image = tree / "web01" / revision / "disk.img"
        digest = hashlib.sha256(data).hexdigest()
        assert out("sha256sum", image).split()[0] == digest
        out("cp", image, tmp_path / "copy")
        assert checksum(tmp_path / "copy") == digest
    for name, data in ODD.items():
        assert (tree / "odd/latest" / f"{name}.img").read_bytes() == data


def test_archives_keep_times(tree: Path, tmp_path: Path) -> None:
    require("rsync")
    out("rsync", "-a", f"{tree}/", tmp_path / "copy")
    assert out("rsync", "-ain", f"{tree}/", tmp_path / "copy") == ""
    out("cp", "-a", tree / "web01", tmp_path / "web01")
    assert out("diff", "-r", tree / "web01", tmp_path / "web01") == ""


def test_revision_json(tree: Path, base: Path) -> None:
    revision = revisions(base, "web01")[0]
    value = json.loads((tree / "web01" / revision / "revision.json").read_bytes())
    assert value["id"] == revision
    assert value["state"]["trust"] == "trusted"


def test_reads_at_odd_places(tree: Path) -> None:
    with open(tree / "web01/latest/disk.img", "rb", buffering=0) as image:
        for offset, length in [(0, 1), (FRAME - 1, 2), (len(SECOND) - 1, 10), (len(SECOND), 1)]:
            assert os.pread(image.fileno(), length, offset) == SECOND[offset : offset + length]


@pytest.mark.parametrize("direct", [False, True])
def test_random_reads_by_many(tree: Path, direct: bool) -> None:
    path = tree / "web01/latest/disk.img"
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)

    def read(seed: int) -> None:
        rng = random.Random(seed)
        fd = os.open(path, flags)
        try:
            for _ in range(150):
                offset = rng.randrange(len(SECOND)) // 4096 * 4096
                length = rng.choice((4096, 65536, 300 * 1024)) if direct else rng.randrange(1 << 18)
                if rng.random() < 0.3:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                buffer = _aligned(length) if direct else memoryview(bytearray(length))
                count = os.preadv(fd, [buffer], offset)
                assert bytes(buffer[:count]) == SECOND[offset : offset + length]
        finally:
            os.close(fd)

    with ThreadPoolExecutor(8) as pool:
        for each in [pool.submit(read, seed) for seed in range(8)]:
            each.result(50)


def _aligned(length: int) -> memoryview:
    return memoryview(mmap.mmap(-1, max(length, 4096)))[:length]


def test_nothing_can_be_changed(tree: Path) -> None:
    image = tree / "web01/latest/disk.img"
    for attempt in (
        lambda: image.open("r+b"),
        lambda: image.unlink(),
        lambda: image.chmod(0o600),
        lambda: (tree / "new").mkdir(),
        lambda: (tree / "web01" / "new").write_text("x"),
        lambda: (tree / "web01").rename(tree / "web02"),
    ):
        with pytest.raises(OSError, match="Read-only") as caught:
            attempt()
        assert caught.value.errno == errno.EROFS


def test_one_vms_directory_shows_under_its_name(own: Mounted) -> None:
    assert os.listdir(own.path) == ["vm"]
    assert (own.path / "vm/latest/disk.img").read_bytes() == FIRST


def test_free_space_is_the_stores(own: Mounted, tmp_path: Path) -> None:
    assert os.statvfs(own.path).f_blocks == os.statvfs(tmp_path).f_blocks


# ---- the store goes on ---------------------------------------------------------------------------


def is_listed(directory: Path, name: str) -> bool:
    return name in os.listdir(directory)


def is_latest(directory: Path, revision: str) -> bool:
    return os.readlink(directory / "latest") == revision


def test_changes_show_within_two_seconds() -> None:
    assert FLEETING_S + REFRESH_S < 2  # that they do show: below, on however busy a machine


def test_new_revisions_appear(own: Mounted, vm: Repository) -> None:
    directory = own.path / "vm"
    assert len(os.listdir(directory)) == 1 + len(EXTRA)
    for _ in range(3):
        added = add_revision(vm, SECOND).id
        assert eventually(partial(is_listed, directory, added))
        assert eventually(partial(is_latest, directory, added))
        assert (directory / added / "disk.img").read_bytes() == SECOND
    assert (directory / "latest/disk.img").read_bytes() == SECOND


def test_a_revision_can_be_looked_up_before_it_is_listed(own: Mounted, vm: Repository) -> None:
    added = add_revision(vm, SECOND).id
    path = own.path / "vm" / added / "disk.img"
    assert eventually(path.exists)


def test_new_vms_appear_and_removed_ones_vanish(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    with mounted(base, tmp_path / "mnt") as mount:
        assert os.listdir(mount.path) == []
        make_vm(base, "late", FIRST)
        assert eventually(lambda: os.listdir(mount.path) == ["late"])
        assert (mount.path / "late/latest/disk.img").read_bytes() == FIRST
        (base / "late").rename(tmp_path / "away")
        assert eventually(lambda: os.listdir(mount.path) == [])
        assert eventually(lambda: not (mount.path / "late").exists())


def test_removed_revisions_vanish_but_what_is_open_stays(own: Mounted, vm: Repository) -> None:
    [first] = [record.id for record in vm.revisions()]
    second = add_revision(vm, SECOND).id
    directory = own.path / "vm"
    with open(directory / first / "disk.img", "rb", buffering=0) as image:
        image.read(10)
        assert vm.remove([first]).in_use == [first]
        assert vm.remove([first], force=True).removed == [first]
        vm.gc()
        assert eventually(lambda: sorted(os.listdir(directory)) == [second, *EXTRA])
        assert eventually(lambda: not (directory / first).exists())
        os.posix_fadvise(image.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        image.seek(0)
        assert image.readall() == FIRST
        assert os.fstat(image.fileno()).st_size == len(FIRST)
    with pytest.raises(FileNotFoundError):
        (directory / first / "disk.img").read_bytes()
    assert (directory / second / "disk.img").read_bytes() == SECOND


def test_a_closed_file_lets_go_of_its_revision(own: Mounted, vm: Repository) -> None:
    add_revision(vm, SECOND)
    first = vm.revisions()[0].id
    (own.path / "vm" / first / "disk.img").read_bytes()
    assert eventually(lambda: vm.remove([first]).removed == [first])
    assert eventually(lambda: not any(".pack" in path for path in own.descriptors()))


def test_tags_show(own: Mounted, vm: Repository) -> None:
    record = vm.revisions()[0]
    path = own.path / "vm" / record.id / "revision.json"
    assert json.loads(path.read_bytes())["state"]["tags"] == []
    vm.update_state(record.id, lambda state: replace(state, tags=("manual:a",)))

    def shown() -> bool:
        data = path.read_bytes()
        return bool(json.loads(data)["state"]["tags"] == ["manual:a"])

    assert eventually(shown)


def test_a_backup_and_its_clean_up_do_not_wait_for_a_mount(own: Mounted, vm: Repository) -> None:
    with open(own.path / "vm/latest/disk.img", "rb") as image:
        image.read(1)
        add_revision(vm, SECOND)
        vm.gc()


def test_the_kernel_reads_ahead_a_mebibyte(own: Mounted) -> None:
    require("root", "may set the read-ahead of a mount")
    device = own.path.stat().st_dev
    bdi = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    assert bdi.read_text().strip() == "1024"
