"""Writable files: what is written, where it is kept, when it is gone; the store never changes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backyfs.model import Partition
from backyfs.mount.daemon import Logging, mount
from backyfs.mount.mountpoint import mounted_at
from backyfs.store.repository import Repository
from tests.conftest import SmallFs
from tests.mount.mounts import Mounted, eventually, mounted, watched
from tests.mount.test_life import command
from tests.parts import require
from tests.reader.stores import add_revision, content, make_vm

MIB = 1 << 20
DATA = content(40, seed=4, tail=700)


def image(tree: Mounted, name: str = "disk.rw.img") -> Path:
    return tree.path / "vm/latest" / name


@pytest.fixture
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Repository:
    """Of format packs, unless the test's parameter says otherwise."""
    if getattr(request, "param", "") == "cow":
        where: Path = request.getfixturevalue("xfs_dir")
        return make_vm(where, "vm", DATA, store="cow")
    (tmp_path / "base").mkdir()
    return make_vm(tmp_path / "base", "vm", DATA)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.fixture
def tree(repository: Repository, tmp_path: Path, scratch: Path) -> Iterator[Mounted]:
    with mounted(repository.path.parent, tmp_path / "mnt", scratch=scratch) as tree:
        yield tree


def changed(*edits: tuple[int, bytes]) -> bytes:
    """DATA with pieces replaced."""
    data = bytearray(DATA)
    for offset, piece in edits:
        data[offset : offset + len(piece)] = piece
    return bytes(data)


def write_at(path: Path, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        assert os.pwrite(fd, data, offset) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("repository", ["packs", "cow"], indirect=True)
def test_what_is_written_is_read_by_all_and_changes_no_revision(
    tree: Mounted, repository: Repository, scratch: Path
) -> None:
    files = {path: path.read_bytes() for path in repository.path.rglob("*") if path.is_file()}
    path = image(tree)
    assert path.read_bytes() == DATA
    with open(path, "rb", buffering=0) as other:
        assert other.read(1000) == DATA[:1000]
        write_at(path, 500, b"new")
        write_at(path, MIB - 3, b"x" * 7)
        write_at(path, len(DATA) - 2, b"!!")
        other.seek(0)
        assert other.readall() == path.read_bytes()
    assert path.read_bytes() == changed((500, b"new"), (MIB - 3, b"x" * 7), (len(DATA) - 2, b"!!"))
    assert image(tree, "disk.img").read_bytes() == DATA
    assert os.listdir(scratch) == [], "overlays have no name"
    for file, data in files.items():
        assert file.read_bytes() == data, file


def test_how_it_looks(tree: Mounted, repository: Repository) -> None:
    record = repository.revisions()[0]
    assert sorted(os.listdir(tree.path / "vm" / record.id)) == [
        "disk.img",
        "disk.rw.img",
        "revision.json",
    ]
    before = os.stat(image(tree))
    assert oct(before.st_mode) == "0o100600"
    assert before.st_size == len(DATA)
    assert before.st_mtime == pytest.approx(record.time.timestamp())
    write_at(image(tree), 0, b"x")
    assert eventually(lambda: os.stat(image(tree)).st_mtime > before.st_mtime + 0.001)
    assert os.stat(image(tree)).st_ino == before.st_ino
    assert os.stat(image(tree, "disk.img")).st_mtime == before.st_mtime


def test_everything_else_stays_read_only(tree: Mounted, repository: Repository) -> None:
    require("root")  # others do not even get past the permissions
    directory = tree.path / "vm" / repository.revisions()[0].id
    path, fixed = directory / "disk.rw.img", directory / "disk.img"
    tries: dict[str, Callable[[], object]] = {
        "open": lambda: os.open(fixed, os.O_RDWR),
        "truncate": lambda: os.truncate(fixed, 0),
        "create": lambda: (directory / "new").write_bytes(b"x"),
        "create at the top": lambda: (tree.path / "new").write_bytes(b"x"),
        "mkdir": lambda: (directory / "dir").mkdir(),
        "symlink": lambda: (directory / "link").symlink_to("x"),
        "mknod": lambda: os.mkfifo(directory / "fifo"),
        "link": lambda: os.link(path, directory / "hard"),
        "unlink": lambda: path.unlink(),
        "unlink it": lambda: fixed.unlink(),
        "rename": lambda: path.rename(directory / "other"),
        "rmdir": lambda: os.rmdir(directory),
        "chmod": lambda: fixed.chmod(0o777),
        "touch": lambda: os.utime(fixed),
        "xattr": lambda: os.setxattr(path, "user.x", b"x"),
    }
    for name, attempt in tries.items():
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno says it
            attempt()
        assert caught.value.errno == errno.EROFS, name
    for attempt in (
        lambda: os.truncate(path, 5),
        lambda: os.truncate(path, len(DATA) + 1),
        lambda: os.open(path, os.O_WRONLY | os.O_TRUNC),
        lambda: path.chmod(0o666),
        lambda: os.utime(path),
    ):
        with pytest.raises(PermissionError):
            attempt()
    os.truncate(path, len(DATA))
    assert path.read_bytes() == DATA


def test_the_end_of_the_disk(tree: Mounted) -> None:
    fd = os.open(image(tree), os.O_RDWR)
    try:
        assert os.pwrite(fd, b"abcdef", len(DATA) - 3) == 3
        with pytest.raises(OSError, match="No space"):
            os.pwrite(fd, b"x", len(DATA))
        assert os.pread(fd, 10, len(DATA) - 3) == b"abc"
    finally:
        os.close(fd)


def test_many_writers(tree: Mounted) -> None:
    fds = [os.open(image(tree), os.O_RDWR) for _ in range(4)]

    def work(number: int) -> None:
        for offset in range(number, 40000, 4):
            if offset % 97 == 0:
                os.pwrite(fds[number], bytes([number]), offset)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for fd in fds:
        os.close(fd)
    edits = [(offset, bytes([offset % 4])) for offset in range(0, 40000, 97)]
    assert image(tree).read_bytes() == changed(*edits)


def test_without_a_scratch_directory_there_is_none(repository: Repository, tmp_path: Path) -> None:
    with mounted(repository.path.parent, tmp_path / "mnt") as tree:
        assert not image(tree).exists()
        with pytest.raises(OSError, match="Read-only"):
            os.open(image(tree, "disk.img"), os.O_RDWR)


def test_a_disk_may_have_the_name_of_a_view(tmp_path: Path, scratch: Path) -> None:
    repository = Repository.create(tmp_path / "vm", "packs")
    add_revision(repository, {"a": b"one" * 100, "a.rw": b"two" * 100})
    with mounted(tmp_path / "vm", tmp_path / "mnt", scratch=scratch) as tree:
        names = sorted(os.listdir(tree.path / "vm/latest/"))
        assert names == ["a.img", "a.rw.img", "a.rw.rw.img", "revision.json"]
        assert image(tree, "a.rw.img").read_bytes() == b"two" * 100
        write_at(image(tree, "a.rw.rw.img"), 0, b"new")
        assert image(tree, "a.rw.img").read_bytes() == b"two" * 100


def test_a_partition_is_a_window_of_its_disk(tmp_path: Path, scratch: Path) -> None:
    repository = Repository.create(tmp_path / "vm", "packs")
    pieces = (
        Partition(1, 1000, 5000, "83", "", "ext4"),
        Partition(2, 8192, len(DATA) - 8192, "83", "", ""),
    )
    add_revision(repository, DATA, partitions={"disk": pieces})
    with mounted(tmp_path / "vm", tmp_path / "mnt", scratch=scratch) as tree:
        directory = tree.path / "vm/latest/partitions"
        one, two = directory / "1.rw.img", directory / "2.rw.img"
        assert sorted(os.listdir(directory)) == ["1.img", "1.rw.img", "2.img", "2.rw.img"]
        with open(two, "rb", buffering=0) as stream:
            write_at(one, 10, b"one")
            write_at(two, 0, b"two")
            write_at(image(tree), 9000, b"disk")
            stream.seek(9000 - 8192)
            assert stream.read(4) == b"disk", "what one writes, all read"
        new = changed((1010, b"one"), (8192, b"two"), (9000, b"disk"))
        assert image(tree).read_bytes() == new
        assert one.read_bytes() == new[1000:6000]
        assert two.read_bytes() == new[8192:]
        assert (directory / "1.img").read_bytes() == DATA[1000:6000]
        assert one.stat().st_mtime == image(tree).stat().st_mtime
        with pytest.raises(OSError, match="No space"):
            write_at(one, 5000, b"beyond")
        assert "user.backyfs.digest" not in os.listxattr(image(tree))
        assert os.getxattr(two, "user.backyfs.partition") == b"2"


# ---- space ---------------------------------------------------------------------------------------


def fill(path: Path, data: bytes) -> int:
    """Write `data` in pieces until there is no space; how many bytes went in."""
    fd, offset = os.open(path, os.O_WRONLY), 0
    try:
        for offset in range(0, len(data), 65536):
            os.pwrite(fd, data[offset : offset + 65536], offset)
    except OSError as exc:
        assert exc.errno == errno.ENOSPC
        return offset
    finally:
        os.close(fd)
    return len(data)


def test_the_quota(repository: Repository, tmp_path: Path, scratch: Path) -> None:
    options = {"scratch": scratch, "scratch_bytes": MIB}
    logfile = tmp_path / "log"
    new = random.Random(2).randbytes(len(DATA))
    with mounted(
        repository.path.parent, tmp_path / "mnt", logging=Logging(logfile), **options
    ) as tree:
        assert fill(image(tree), new) == MIB
        assert image(tree).read_bytes() == new[:MIB] + DATA[MIB:]
        assert fill(image(tree), DATA) == MIB, "what is kept already can be changed"
    assert logfile.read_text().count("no space left for what is written") == 1


def test_a_full_file_system(repository: Repository, tmp_path: Path, small_fs: SmallFs) -> None:
    where = small_fs("ext4", 8 * MIB)
    with open(where / "ballast", "wb") as ballast:
        free = os.statvfs(where).f_bavail * os.statvfs(where).f_bsize
        os.posix_fallocate(ballast.fileno(), 0, free - MIB)
    new = random.Random(2).randbytes(len(DATA))
    with mounted(repository.path.parent, tmp_path / "mnt", scratch=where) as tree:
        count = fill(image(tree), new)
        assert 0 < count < len(DATA)
        assert image(tree).read_bytes() == new[:count] + DATA[count:]


def test_directories_that_will_not_do(tmp_path: Path) -> None:
    require("fuse")
    (tmp_path / "mnt").mkdir()
    make_vm(tmp_path, "vm", b"x")
    for scratch, why in [
        (tmp_path / "none", "cannot be kept"),
        (tmp_path / "vm" / "revisions", "inside the store"),
        (tmp_path / "vm", "inside the store"),
    ]:
        with pytest.raises(Exception, match=why):
            mount(tmp_path / "vm", tmp_path / "mnt", scratch=scratch)
        assert mounted_at(tmp_path / "mnt") is None


# ---- its end -------------------------------------------------------------------------------------


def test_it_is_dropped_when_idle_and_the_log_says_so(
    repository: Repository, tmp_path: Path, scratch: Path
) -> None:
    logfile = tmp_path / "log"
    options = {"scratch": scratch, "scratch_idle_s": 1.0, "logging": Logging(logfile, verbose=True)}
    with mounted(repository.path.parent, tmp_path / "mnt", **options) as tree:
        with open(image(tree), "rb") as kept:
            write_at(image(tree), 0, b"written")
            assert not eventually(lambda: "is dropped" in logfile.read_text(), 2.5)
            assert kept.read(7) == b"written", "in use: not idle"
        assert eventually(lambda: "is dropped" in logfile.read_text())
        assert image(tree).read_bytes() == DATA
        write_at(image(tree), 0, b"again")
        assert image(tree).read_bytes() == changed((0, b"again"))


def test_its_revision_is_in_use(tree: Mounted, repository: Repository) -> None:
    write_at(image(tree), 0, b"x")
    record = repository.revisions()[0]
    assert repository.remove([record.id]).in_use == [record.id]


def test_a_new_mount_begins_anew(repository: Repository, tmp_path: Path, scratch: Path) -> None:
    for _ in range(2):
        with mounted(repository.path.parent, tmp_path / "mnt", scratch=scratch) as tree:
            assert image(tree).read_bytes() == DATA
            write_at(image(tree), 0, b"x")


def test_a_killed_process_leaves_nothing(
    repository: Repository, tmp_path: Path, ext4_dir: Path
) -> None:
    free = os.statvfs(ext4_dir).f_bfree
    with mounted(repository.path.parent, tmp_path / "mnt", scratch=ext4_dir) as tree:
        write_at(image(tree), 0, random.Random(1).randbytes(MIB))
        assert os.statvfs(ext4_dir).f_bfree <= free - 200
        os.kill(tree.pid, 9)
        assert eventually(lambda: mounted_at(tree.path) is None)
    assert os.listdir(ext4_dir) == []
    assert eventually(lambda: os.statvfs(ext4_dir).f_bfree > free - 200)


# ---- uses ----------------------------------------------------------------------------------------


def test_the_command(repository: Repository, tmp_path: Path, scratch: Path) -> None:
    require("fuse")
    point = tmp_path / "mnt"
    point.mkdir()
    done = subprocess.run(
        command("-b", repository.path.parent, "mount", "--scratch", f"{scratch}:64K", point),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    with watched(point):
        assert fill(point / "vm/latest/disk.rw.img", bytes(MIB)) == 65536


def test_direct_io_and_locks(tree: Mounted) -> None:
    """What tools for disks do: O_DIRECT with aligned buffers, and an exclusive flock."""
    import mmap

    buffer = mmap.mmap(-1, 8192)
    buffer.write(b"d" * 8192)
    fd = os.open(image(tree), os.O_RDWR | os.O_DIRECT)
    with contextlib.closing(buffer):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            assert os.pwritev(fd, [buffer], 4096) == 8192
            assert os.preadv(fd, [buffer], 0) == 8192
            assert buffer[:] == DATA[:4096] + b"d" * 4096
        finally:
            os.close(fd)


def test_qemu_writes_into_it(tree: Mounted) -> None:
    require("qemu-img")
    require("qemu-io")
    commands = ("-c", "write -P 0xab 1M 64k", "-c", "read -P 0xab 1M 64k")
    done = subprocess.run(
        ["qemu-io", "-f", "raw", *commands, image(tree)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert image(tree).read_bytes() == changed((MIB, b"\xab" * 65536))
