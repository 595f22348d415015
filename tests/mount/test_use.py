"""What a mount is used for, and what it costs meanwhile."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from backyfs.model import FRAME
from backyfs.store.packs.decoders import PROCESSES
from backyfs.store.repository import Repository
from tests.images import checksum
from tests.mount.mounts import Mounted, eventually, is_alive, mounted
from tests.parts import require
from tests.processes import cpu_ticks, decoders_of, private_kib
from tests.reader.stores import add_revision, content, make_vm

MIB = 1 << 20


def run(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True, timeout=60
    ).stdout


@contextlib.contextmanager
def loop_mounted(image: Path, point: Path, options: str) -> Iterator[Path]:
    point.mkdir(exist_ok=True)
    run("mount", "-o", f"loop,{options}", image, point)
    try:
        yield point
    finally:
        run("umount", point)


def test_a_file_out_of_a_guests_file_system(tmp_path: Path) -> None:
    """Each of two revisions is loop-mounted from the tree and gives its own version of a file."""
    require("fuse")
    require("ext4")
    disk = tmp_path / "guest.img"
    with open(disk, "xb") as stream:
        stream.truncate(64 * MIB)
    run("mkfs.ext4", "-q", "-F", disk)
    repository = Repository.create(tmp_path / "vm", "packs")
    versions = []
    for seed in range(2):
        with loop_mounted(disk, tmp_path / "guest", "rw") as guest:
            (guest / "file").write_bytes(random.Random(seed).randbytes(5 * MIB + seed))
            (guest / f"only{seed}").touch()
            versions.append(checksum(guest / "file"))
        add_revision(repository, disk.read_bytes())
    with mounted(tmp_path / "vm", tmp_path / "mnt") as tree:
        for seed, record in enumerate(repository.revisions()):
            image = tree.path / "vm" / record.id / "disk.img"
            with loop_mounted(image, tmp_path / "restored", "ro") as guest:
                assert checksum(guest / "file") == versions[seed]
                assert (guest / "only1").exists() == (seed == 1)


def test_qemu_img_reads_it(tmp_path: Path) -> None:
    require("qemu-img")
    data = content(64, seed=3, tail=512)
    make_vm(tmp_path, "vm", data)
    (tmp_path / "raw").write_bytes(data)
    with mounted(tmp_path / "vm", tmp_path / "mnt") as tree:
        image = tree.path / "vm/latest/disk.img"
        formats = ["-f", "raw", "-F", "raw"]
        assert "identical" in run("qemu-img", "compare", *formats, image, tmp_path / "raw")
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, tmp_path / "copy")
        formats = ["-f", "qcow2", "-F", "raw"]
        assert "identical" in run("qemu-img", "compare", *formats, tmp_path / "copy", image)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VM with a disk of 128 MiB that does not compress."""
    base = tmp_path_factory.mktemp("large")
    make_vm(base, "vm", random.Random(1).randbytes(128 * MIB))
    return base


def test_memory_is_bounded(large: Path, tmp_path: Path) -> None:
    with mounted(large, tmp_path / "mnt", cache_bytes=8 * MIB) as tree:
        _read_a_lot(tree)
        assert tree.status("VmHWM") < 96 * 1024  # KiB


def test_memory_is_bounded_by_default(large: Path, tmp_path: Path) -> None:
    with mounted(large, tmp_path / "mnt") as tree:
        _read_a_lot(tree)
        assert tree.status("VmHWM") < 192 * 1024


@pytest.mark.parametrize("killed", [False, True])
def test_processes_decode_what_is_read_in_sequence(
    large: Path, tmp_path: Path, killed: bool
) -> None:
    expected = checksum_of_large()
    with mounted(large, tmp_path / "mnt") as tree:
        pids = decoders_of(tree.pid)
        assert len(pids) == PROCESSES
        with (tree.path / "vm/latest/disk.img").open("rb", buffering=0) as image:
            found = hashlib.sha256()
            while piece := image.read(8 * MIB):
                found.update(piece)
                if killed and image.tell() == 64 * MIB:
                    for pid in pids:
                        os.kill(pid, signal.SIGKILL)
        assert found.hexdigest() == expected
        if killed:
            assert eventually(lambda: decoders_of(tree.pid) == [])
        else:
            assert sum(cpu_ticks(pid) for pid in pids) > 0
            # What they share with the server, its cache, counts for each of them.
            assert all(status_kib(pid, "VmHWM") < 128 * 1024 for pid in pids)
            assert sum(private_kib(pid) for pid in pids) < PROCESSES * 12 * 1024
    assert not any(is_alive(pid) for pid in pids)


@functools.cache
def checksum_of_large() -> str:
    return hashlib.sha256(random.Random(1).randbytes(128 * MIB)).hexdigest()


def status_kib(pid: int, field: str) -> int:
    return Mounted(Path(), pid).status(field)


def _read_a_lot(tree: Mounted) -> None:
    path = tree.path / "vm/latest/disk.img"
    fds = [os.open(path, os.O_RDONLY) for _ in range(4)]
    rng = random.Random(2)
    try:
        while os.read(fds[0], MIB):
            pass
        for fd in fds:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for _ in range(2000):
            os.pread(rng.choice(fds), 4096, rng.randrange(128 * MIB))
    finally:
        for fd in fds:
            os.close(fd)


def test_descriptors_are_bounded_and_given_back(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for number in range(12):
        make_vm(base, f"vm{number}", content(2, seed=number))
    with mounted(base, tmp_path / "mnt") as tree:
        idle = len(tree.descriptors())
        for _ in range(3):
            for number in range(12):
                (tree.path / f"vm{number}/latest/disk.img").read_bytes()
        assert len(tree.descriptors()) <= idle + 3 * 12
        assert eventually(lambda: len(tree.descriptors()) <= idle)


def test_comparing_two_revisions(tmp_path: Path) -> None:
    first = content(40, seed=1)
    second = first[: 30 * FRAME] + content(10, seed=9)
    repository = make_vm(tmp_path, "vm", first, second)
    one, two = (record.id for record in repository.revisions())
    with mounted(tmp_path / "vm", tmp_path / "mnt") as tree:
        done = subprocess.run(
            ["cmp", tree.path / "vm" / one / "disk.img", tree.path / "vm" / two / "disk.img"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (1, "")
    assert "differ" in done.stdout
