"""Restoring to real block devices: loop devices that held other data before."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from backyfs.errors import Corrupt, TargetError
from backyfs.model import FRAME
from backyfs.restore import device
from backyfs.restore.place import holds_data, opened
from backyfs.restore.transfer import restore
from tests.mount.mounts import kill_with_helper, mounted
from tests.parts import require
from tests.reader.stores import make_vm
from tests.restore.memory import MemoryImage, images, made

MIB = 1 << 20
SIZE = 6 * MIB
GARBAGE = random.Random(9).randbytes(SIZE)


@contextmanager
def looped(file: Path) -> Iterator[str]:
    """`file` as a loop device."""
    require("loop")
    done = subprocess.run(
        ["losetup", "--find", "--show", str(file)], capture_output=True, text=True, check=True
    )
    name = done.stdout.strip()
    try:
        yield name
    finally:
        subprocess.run(["losetup", "--detach", name], check=True)


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    file = tmp_path_factory.mktemp("device") / "loop.img"
    file.write_bytes(GARBAGE)
    with looped(file) as name:
        yield name


def fill(name: str, content: bytes = GARBAGE) -> None:
    with open(name, "r+b", buffering=0) as stream:
        stream.write(content)
        os.fsync(stream.fileno())


def content_of(name: str) -> bytes:
    """The bytes as the medium has them, not the page cache."""
    with open(name, "rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return stream.read()


def to_device(image: MemoryImage, name: str) -> None:
    with opened(name, image.size, store=Path("/nowhere")) as target:
        restore(image, target)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(image=images())
def test_a_device_gets_every_byte_and_keeps_what_is_beyond(image: MemoryImage, loop: str) -> None:
    fill(loop)
    to_device(image, loop)
    assert content_of(loop) == image.content + GARBAGE[image.size :]


@pytest.mark.parametrize("working", [("_punch",), ("_zero_out",), ()])
def test_holes_read_as_zeros_however_the_device_makes_them(
    working: tuple[str, ...], loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: device.Device, offset: int, length: int) -> None:
        raise OSError(95, "Operation not supported")

    for method in {"_punch", "_zero_out"} - set(working):
        monkeypatch.setattr(device.Device, method, refuse)
    image = made(SIZE - 700, [1, 40, 41, 95])
    fill(loop)
    to_device(image, loop)
    assert content_of(loop) == image.content + GARBAGE[image.size :]


def test_a_failed_restore_leaves_no_head(loop: str) -> None:
    fill(loop)
    image = made(SIZE, range(SIZE // FRAME), [90])
    with pytest.raises(Corrupt):
        to_device(image, loop)
    assert content_of(loop)[: 2 * MIB] == bytes(2 * MIB)


def test_a_device_that_is_too_small_is_refused_untouched(loop: str) -> None:
    fill(loop)
    with pytest.raises(TargetError, match=f"has {SIZE} bytes, the image {SIZE + 1}"):
        to_device(made(SIZE + 1, [0]), loop)
    assert content_of(loop) == GARBAGE


@pytest.mark.parametrize("keep", [False, True])
def test_a_read_only_device_is_refused_untouched(loop: str, keep: bool) -> None:
    fill(loop)
    subprocess.run(["blockdev", "--setro", loop], check=True)
    try:
        with (
            pytest.raises(TargetError, match=f"^{loop} is read-only$") as caught,
            opened(loop, SIZE, store=Path("/nowhere"), keep=keep, force=True),
        ):
            pass
    finally:
        subprocess.run(["blockdev", "--setrw", loop], check=True)
    assert f"blockdev --setrw {loop}" in caught.value.hint
    assert content_of(loop) == GARBAGE


def test_a_mounted_device_is_refused(ext4_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "fs.img"
    with open(file, "wb") as stream:
        stream.truncate(8 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(file)], check=True)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    with looped(file) as name:
        subprocess.run(["mount", name, str(mountpoint)], check=True)
        try:
            with pytest.raises(TargetError, match="is in use"):
                to_device(made(MIB, [0]), name)
        finally:
            subprocess.run(["umount", str(mountpoint)], check=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_device_that_a_loop_device_is_on_is_refused_untouched(loop: str, force: bool) -> None:
    fill(loop)
    with (
        looped(Path(loop)) as upper,
        pytest.raises(TargetError, match=f"is attached as {upper}") as caught,
        opened(loop, MIB, store=Path("/nowhere"), force=force),
    ):
        pass
    assert f"losetup -d {upper}" in caught.value.hint
    assert content_of(loop) == GARBAGE


def test_a_device_somebody_has_open_is_refused_unless_forced(loop: str) -> None:
    fill(loop)
    reader = subprocess.Popen(
        ["sh", "-c", "exec 3<$0; echo; read x", loop], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert reader.stdin is not None
    assert reader.stdout is not None
    try:
        reader.stdout.readline()
        with pytest.raises(TargetError, match=f"open in process {reader.pid}"):
            to_device(made(MIB, [0]), loop)
        assert content_of(loop) == GARBAGE
        image = made(MIB, [0])
        with opened(loop, image.size, store=Path("/nowhere"), force=True) as target:
            restore(image, target)
        assert content_of(loop)[:MIB] == image.content
    finally:
        reader.communicate(b"\n")


def test_whether_a_device_holds_data(loop: str) -> None:
    fill(loop)
    assert holds_data(loop)
    fill(loop, bytes(SIZE))
    assert not holds_data(loop)
    fill(loop, bytes(SIZE - 1) + b"x")
    assert holds_data(loop)
    fill(loop, bytes(SIZE // 2) + b"x" * FRAME + bytes(SIZE // 2 - FRAME))
    assert holds_data(loop)


@pytest.mark.parametrize("keep", [False, True])
def test_a_device_that_fails_is_named(tmp_path: Path, keep: bool) -> None:
    base, image = tmp_path / "base", made(SIZE, [0, 70])
    base.mkdir()
    make_vm(base, "web01", image.content)
    with (
        mounted(base, tmp_path / "mnt", scratch=tmp_path) as tree,
        looped(tree.path / "web01/latest/disk.rw.img") as name,
    ):
        kill_with_helper(tree.pid, tree.path)
        with (
            pytest.raises(TargetError, match=f"cannot write to {name}: Input/output error"),
            opened(name, SIZE, store=Path("/nowhere"), keep=keep) as target,
        ):
            restore(image, target)
        with pytest.raises(TargetError, match=f"cannot read {name}: Input/output error"):
            holds_data(name)
