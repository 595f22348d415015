"""Which targets are taken, and the one line that says why one is not."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import subprocess
from pathlib import Path

import pytest

from backyfs.errors import BackyfsError, NoSpace, TargetError, UsageError
from backyfs.restore.place import holds_data, opened
from backyfs.restore.transfer import restore
from tests.conftest import SmallFs
from tests.parts import require
from tests.reader.stores import make_vm
from tests.restore.memory import MemoryImage, made

MIB = 1 << 20
STORE = Path("/nowhere")


def to(where: str | Path, image: MemoryImage, store: Path = STORE) -> None:
    with opened(str(where), image.size, store=store) as target:
        restore(image, target)


def test_a_directory_is_no_target(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="is a directory"):
        to(tmp_path, made(MIB, [0]))


def test_the_directory_of_a_new_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no directory"):
        to(tmp_path / "missing" / "disk.img", made(MIB, [0]))


def test_a_name_that_ends_as_a_directorys_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no directory .*/missing"):
        to(f"{tmp_path}/missing/", made(MIB, [0]))
    assert not list(tmp_path.iterdir())


def test_nothing_is_restored_into_the_repository(tmp_path: Path) -> None:
    (tmp_path / "vm" / "revisions").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "vm" / "revisions" / "x.img")
    for where in (tmp_path / "vm" / "x.img", tmp_path / "link", tmp_path / "vm/../vm/y"):
        with pytest.raises(TargetError, match="lies in the repository"):
            to(where, made(MIB, [0]), store=tmp_path / "vm")


def test_nothing_is_restored_into_the_repository_of_another(tmp_path: Path) -> None:
    other = make_vm(tmp_path, "other", b"")
    with pytest.raises(TargetError, match=f"lies in the repository {other.path}"):
        to(other.path / "packs" / "x.img", made(MIB, [0]), store=tmp_path / "vm")


def test_a_file_that_came_meanwhile_is_nobodys_to_replace(tmp_path: Path) -> None:
    path, image = tmp_path / "disk.img", made(MIB, [0])
    with (
        pytest.raises(TargetError, match="made by somebody else meanwhile"),
        opened(str(path), image.size, store=Path("/nowhere")) as target,
    ):
        path.write_bytes(b"precious")
        restore(image, target)
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["disk.img"]


def test_a_symbolic_link_leads_to_the_file(tmp_path: Path) -> None:
    real, link = tmp_path / "real.img", tmp_path / "link.img"
    link.symlink_to(real)
    image = made(MIB, [3])
    to(link, image)
    assert link.is_symlink()
    assert real.read_bytes() == image.content


def test_a_file_open_for_writing_elsewhere_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"the disk of a running VM")
    with open(path, "r+b"), pytest.raises(TargetError, match="open for writing elsewhere"):
        to(path, made(MIB, [0]))
    assert path.read_bytes() == b"the disk of a running VM"
    with open(path, "rb"):  # a reader harms nobody
        to(path, made(MIB, [0]))


def test_the_file_behind_a_loop_device_is_refused(tmp_path: Path) -> None:
    require("loop")
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    made_loop = subprocess.run(
        ["losetup", "--find", "--show", str(path)], capture_output=True, text=True, check=True
    )
    try:
        with pytest.raises(TargetError, match="open for writing elsewhere"):
            to(path, made(MIB, [0]))
    finally:
        subprocess.run(["losetup", "--detach", made_loop.stdout.strip()], check=True)


def test_a_terminal_is_refused() -> None:
    ours, theirs = os.openpty()
    try:
        with pytest.raises(UsageError, match="not for a terminal"):
            to(os.ttyname(theirs), made(MIB, [0]))
    finally:
        os.close(ours)
        os.close(theirs)


def test_character_devices_and_fifos_are_streams(tmp_path: Path) -> None:
    to("/dev/null", made(5 * MIB, [0, 70]))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    image = made(3 * MIB, [1, 9])
    with open(tmp_path / "out", "wb") as out, subprocess.Popen(["cat", fifo], stdout=out) as reader:
        to(fifo, image)
    assert reader.returncode == 0
    assert (tmp_path / "out").read_bytes() == image.content
    assert not holds_data(str(fifo))


@pytest.mark.parametrize("existing", [False, True])
def test_a_file_may_not_be_that_large(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "disk.img"
    if existing:
        path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, hard))
    try:
        with pytest.raises(TargetError, match=r"cannot write to .*/disk\.img: File too large"):
            to(path, made(16 * MIB, range(256)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == (["disk.img"] if existing else [])


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_target_says_so_and_leaves_nothing(small_fs: SmallFs, existing: bool) -> None:
    directory = small_fs("ext4", 4 * MIB)
    path = directory / "disk.img"
    if existing:
        path.write_bytes(b"old")
    with pytest.raises(NoSpace, match=r"no space left while restoring to .*disk\.img"):
        to(path, made(16 * MIB, range(256)))
    left = [item.name for item in directory.iterdir() if item.name != "lost+found"]
    assert left == (["disk.img"] if existing else [])
    assert not existing or path.read_bytes() == b""


def test_a_target_where_no_file_fits_says_so(small_fs: SmallFs) -> None:
    directory = small_fs("ext4", 4 * MIB)
    with contextlib.suppress(OSError):  # until there is not even an inode left
        for number in itertools.count():
            (directory / str(number)).touch()
    with pytest.raises(NoSpace) as caught:
        to(directory / "disk.img", made(MIB, [0]))
    assert caught.value.message == f"no space left while restoring to {directory}/disk.img"
    assert caught.value.hint


def test_whether_a_file_holds_data(tmp_path: Path) -> None:
    assert not holds_data("-")
    assert not holds_data(str(tmp_path / "missing"))
    assert not holds_data(str(tmp_path))
    (tmp_path / "empty").touch()
    assert not holds_data(str(tmp_path / "empty"))
    (tmp_path / "full").write_bytes(bytes(10))
    assert holds_data(str(tmp_path / "full"))


def test_every_refusal_says_what_to_do(tmp_path: Path) -> None:
    for where in (tmp_path, tmp_path / "a" / "b"):
        with pytest.raises(BackyfsError) as caught:
            to(where, made(MIB, [0]))
        assert caught.value.hint
