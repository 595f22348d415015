"""Journals of real file systems in every state, and of bytes that make no sense."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backyfs.partition.filesystem import recognise
from backyfs.partition.journal import Journal, inspect
from tests.filesystems import MIB, run, unmount
from tests.parts import require

BEFORE = 3 * MIB
MKFS = {
    "ext3": ["mkfs.ext3", "-q", "-F"],
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-K"],
    "xfs striped": ["mkfs.xfs", "-q", "-f", "-K", "-l", "su=262144"],
    "xfs sectors": ["mkfs.xfs", "-q", "-f", "-K", "-s", "size=4096"],
    "btrfs": ["mkfs.btrfs", "-q", "-f", "-K"],
}
SMALL_LOG = ["mkfs.xfs", "-q", "-f", "-K", "--unsupported", "-l", "size=13m"]
SIZES = {"ext3": 32 * MIB, "ext4": 32 * MIB, "xfs": 320 * MIB, "btrfs": 120 * MIB}


class Disk:
    """A file system of a kind in a file, and its copy behind some other bytes."""

    def __init__(self, directory: Path, name: str, mkfs: list[str]) -> None:
        self.kind = name.split(maxsplit=1)[0]
        require("ext4" if self.kind == "ext3" else self.kind)
        self.file, self.point = directory / "disk", directory / "mnt"
        self.point.mkdir()
        with open(self.file, "xb") as stream:
            stream.truncate(SIZES[self.kind])
        run(*mkfs, self.file)

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        run("mount", "-o", "loop", self.file, self.point)
        try:
            yield
        finally:
            unmount(self.point)

    def write(self, count: int) -> None:
        for number in range(count):
            with open(self.point / str(number), "wb") as stream:
                stream.write(b"x" * number)
                os.fsync(stream.fileno())

    def journal(self) -> Journal:
        """As it is now on the device; looked at in a slice of a larger disk."""
        fd = os.open(self.file, os.O_RDONLY)
        size = os.fstat(fd).st_size

        def read(offset: int, length: int) -> bytes:
            assert offset >= BEFORE
            assert offset + length <= BEFORE + size
            return os.pread(fd, length, offset - BEFORE)

        try:
            assert recognise(read, BEFORE, size) == self.kind
            return inspect(self.kind, read, BEFORE, size)
        finally:
            os.close(fd)


@pytest.mark.parametrize("name", MKFS)
def test_a_file_system_in_its_states(tmp_path: Path, name: str) -> None:
    disk = Disk(tmp_path, name, MKFS[name])
    assert not disk.journal().dirty, "fresh"
    for _ in range(2):
        with disk.mounted():
            disk.write(40)
            assert disk.journal().dirty, "in use"
            run("fsfreeze", "--freeze", disk.point)
            try:
                frozen = disk.journal().dirty
            finally:
                run("fsfreeze", "--unfreeze", disk.point)
            assert frozen == (disk.kind == "xfs"), "XFS writes something for after the freeze"
        assert not disk.journal().dirty, "unmounted"


def test_a_log_that_has_gone_round(tmp_path: Path) -> None:
    """More is written than an XFS's log holds, so that its records pass its end."""
    disk = Disk(tmp_path, "xfs", SMALL_LOG)
    for turn in range(3):  # about 13 MiB are logged in the first
        with disk.mounted():
            disk.write(1900 if not turn else 50)
            assert disk.journal().dirty, turn
        assert not disk.journal().dirty, turn


def test_a_btrfs_on_two_devices(tmp_path: Path) -> None:
    require("btrfs")
    files = [tmp_path / "one", tmp_path / "two"]
    for file in files:
        with open(file, "xb") as stream:
            stream.truncate(SIZES["btrfs"])
    done = subprocess.run(
        ["mkfs.btrfs", "-q", "-f", "-K", "-d", "single", "-m", "raid1", *files],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    data = files[0].read_bytes()
    assert inspect("btrfs", lambda at, length: data[at : at + length], 0, len(data)).devices == 2


def test_other_kinds_have_none() -> None:
    def read(offset: int, length: int) -> bytes:
        raise AssertionError("nothing to look at")

    for kind in ("ext2", "vfat", "squashfs", ""):
        assert not inspect(kind, read, 0, MIB).dirty
        assert "has no journal" in inspect(kind, read, 0, MIB).reason
    assert "not looked at" in inspect("ntfs", read, 0, MIB).reason


def _within(data: bytes) -> Callable[[int, int], bytes]:
    def read(offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(data)
        return data[offset : offset + length]

    return read


@given(st.sampled_from(["ext4", "xfs", "btrfs"]), st.integers(0, 1 << 32), st.binary(max_size=64))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_within_the_slice(kind: str, seed: int, more: bytes) -> None:
    rng = random.Random(seed)
    data = bytearray(128 * 1024)
    for _ in range(rng.randrange(200)):
        at = rng.randrange(len(data) - 8)
        data[at : at + 8] = rng.choice([rng.randbytes(8), bytes(4) + rng.randbytes(4)])
    data[100 : 100 + len(more)] = more
    if rng.random() < 0.7:  # an XFS whose log is where it could be
        data[:4], data[4:8] = b"XFSB", (4096).to_bytes(4, "big")
        data[48:56] = rng.randrange(1, 30).to_bytes(8, "big")
        data[96:100] = rng.randrange(0, 20).to_bytes(4, "big")
        data[124] = rng.randrange(8, 200)
        log = rng.randrange(0, 200) * 512
        data[log : log + 4] = b"\xfe\xed\xba\xbe"
    inspect(kind, _within(bytes(data)), 0, len(data))


@pytest.mark.parametrize("size", [4, 100, 511])
def test_a_disk_too_small_for_what_it_begins_like(size: int) -> None:
    data = b"XFSB".ljust(size, b"\0")
    read = _within(data)
    assert inspect(recognise(read, 0, size), read, 0, size) == Journal(
        False, "this file system has no journal to replay"
    )
