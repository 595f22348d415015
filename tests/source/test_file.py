"""Image files and block devices, on real file systems and loop devices.

An LVM volume is a block device like any other: what is said of loop devices here holds for it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backyfs.errors import ConfigError, SourceUnavailable, UsageError
from backyfs.model import Consistency, Extent
from backyfs.source import reflink
from backyfs.source.contract import DiskSnapshot, Snapshot
from backyfs.source.file import FileSource, Reflink
from backyfs.source.readers import FileReader
from backyfs.testing.source import FIRST, SourceContract, Subject, whole
from tests.filesystems import run
from tests.parts import require
from tests.source.shared import seen_from_here

KIB, MIB = 1 << 10, 1 << 20


def filled(path: Path, size: int, seed: int = 0) -> Path:
    """An image with data in about half of its 64 KiB pieces, holes elsewhere."""
    rng = random.Random(seed)
    with open(path, "wb") as stream:
        stream.truncate(size)
        for at in range(0, size, 64 * KIB):
            if rng.random() < 0.5:
                stream.seek(at)
                stream.write(rng.randbytes(min(64 * KIB, size - at)))
    return path


def of(*paths: Path, **options: Any) -> FileSource:
    """A source whose disks are `disk`, `disk1`, `disk2`..."""
    names = ["disk", *(f"disk{n}" for n in range(1, len(paths)))]
    return FileSource({n: str(p) for n, p in zip(names, paths, strict=True)}, **options)


@contextlib.contextmanager
def opened(path: Path, **options: Any) -> Iterator[tuple[Snapshot, DiskSnapshot]]:
    with of(path, **options).snapshot(FIRST, {}) as snapshot:
        yield snapshot, snapshot.disks["disk"]


@contextlib.contextmanager
def loop_device(backing: Path) -> Iterator[Path]:
    losetup = require("loop")
    done = subprocess.run(
        [losetup, "-f", "--show", backing], capture_output=True, text=True, check=True
    )
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        run(losetup, "-d", device)


# ---- the contract, for every kind of image -----------------------------------------------------


class FileSubject:
    """Files or devices that nobody else touches."""

    def __init__(self, *paths: Path, **options: Any) -> None:
        self.source = of(*paths, **options)
        self._paths = dict(zip(self.source.disks(), paths, strict=True))

    def content(self) -> dict[str, bytes]:
        return {name: path.read_bytes() for name, path in self._paths.items()}

    def write(self, disk: str, offset: int, data: bytes) -> None:
        with open(self._paths[disk], "r+b") as stream:
            stream.seek(offset)
            stream.write(data)

    def take_away(self) -> None:
        self.source = of(*(path.with_name("away") for path in self._paths.values()))


class TestOnAnyFileSystem(SourceContract):
    @pytest.fixture
    def subject(self, any_fs_dir: Path) -> Subject:
        return FileSubject(filled(any_fs_dir / "disk.img", 3 * MIB + 333))


class TestLive(SourceContract):
    @pytest.fixture
    def subject(self, reflink_dir: Path) -> Subject:
        return FileSubject(filled(reflink_dir / "disk.img", 3 * MIB + 333), reflink=Reflink.NEVER)


class TestTwoDisks(SourceContract):
    @pytest.fixture
    def subject(self, xfs_dir: Path, ext4_dir: Path) -> Subject:
        one, other = filled(xfs_dir / "one", 2 * MIB + 1), filled(ext4_dir / "other", MIB, seed=1)
        return FileSubject(one, other)


class TestBlockDevice(SourceContract):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> Iterator[Subject]:
        with loop_device(filled(tmp_path / "backing", 3 * MIB + 7 * 512)) as device:
            yield FileSubject(device)


# ---- a point in time ---------------------------------------------------------------------------


class Writer:
    """A VM that writes all the time, into the whole image."""

    def __init__(self, path: Path) -> None:
        self._path, self._stop, self.writes = path, threading.Event(), 0
        self._thread = threading.Thread(target=self._write)

    def __enter__(self) -> Writer:
        self._thread.start()
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait(self, writes: int = 200) -> None:
        """Until it has written that much more."""
        goal, deadline = self.writes + writes, time.monotonic() + 30
        while self.writes < goal:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def _write(self) -> None:
        rng, size = random.Random(3), os.path.getsize(self._path)
        with open(self._path, "r+b", buffering=0) as stream:
            while not self._stop.is_set():
                stream.seek(rng.randrange(size // 4096) * 4096)
                stream.write(rng.randbytes(4096))
                self.writes += 1
                time.sleep(0.0001)


def test_a_clone_stays_the_same_while_the_vm_writes(reflink_dir: Path) -> None:
    path = filled(reflink_dir / "disk.img", 16 * MIB)
    with Writer(path) as vm, opened(path) as (snapshot, disk):
        first = whole(disk)
        vm.wait()
        assert whole(disk) == first
        assert path.read_bytes() != first
        assert (snapshot.frozen, snapshot.consistency) == (True, Consistency.CRASH)
        assert snapshot.reason == "reflink clone"
        assert disk.bookmark["clone"] is True


def test_what_was_written_before_the_snapshot_is_in_it(reflink_dir: Path) -> None:
    path = filled(reflink_dir / "disk.img", 4 * MIB)
    for n in range(20):
        with open(path, "r+b") as stream:  # not synced
            stream.seek(n * 65_536)
            stream.write(b"just now %d" % n)
        with opened(path) as (_, disk):
            assert disk.read(n * 65_536, 10) == (b"just now %d" % n)[:10]


def test_a_live_file_is_read_as_it_changes_and_says_so(ext4_dir: Path) -> None:
    path = filled(ext4_dir / "disk.img", 16 * MIB)
    with Writer(path) as vm, opened(path) as (snapshot, disk):
        first = whole(disk)
        vm.wait()
        assert whole(disk) != first
        assert (snapshot.frozen, snapshot.consistency) == (False, Consistency.CRASH)
        assert snapshot.reason == ("read live (disk: no reflink clone: Operation not supported)")
        assert disk.bookmark["clone"] is False


def test_one_live_disk_makes_a_live_snapshot(xfs_dir: Path, ext4_dir: Path) -> None:
    source = of(filled(xfs_dir / "a", MIB), filled(ext4_dir / "b", MIB))
    with source.snapshot(FIRST, {}) as snapshot:
        assert not snapshot.frozen
        assert "disk1: " in snapshot.reason
        assert "disk: " not in snapshot.reason
    source = of(filled(xfs_dir / "a", MIB), filled(xfs_dir / "b", MIB))
    with source.snapshot(FIRST, {}) as snapshot:
        assert snapshot.frozen
        assert snapshot.reason.endswith("ms apart")


def test_a_clone_leaves_nothing_behind_even_after_kill_9(reflink_dir: Path) -> None:
    path = filled(reflink_dir / "disk.img", 4 * MIB)
    code = """
import sys, time
from backyfs.source.file import FileSource
with FileSource({"disk": sys.argv[1]}).snapshot("r", {}) as snapshot:
    assert snapshot.frozen
    print("ready", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        assert os.listdir(reflink_dir) == ["disk.img"]
        process.send_signal(signal.SIGKILL)
    assert os.listdir(reflink_dir) == ["disk.img"]


def test_reflink_never_and_always(reflink_dir: Path, ext4_dir: Path) -> None:
    with opened(filled(reflink_dir / "a", MIB), reflink=Reflink.NEVER) as (snapshot, _):
        assert snapshot.reason == "read live (disk: reflink is set to never)"
    with opened(filled(reflink_dir / "a", MIB), reflink=Reflink.ALWAYS) as (snapshot, _):
        assert snapshot.frozen
    source = of(filled(ext4_dir / "a", MIB), reflink=Reflink.ALWAYS)
    with (
        pytest.raises(SourceUnavailable, match="cannot clone .*/a: no reflink clone: Operation"),
        source.snapshot(FIRST, {}),
    ):
        pass


def test_btrfs_files_without_cow_are_cloned_too(btrfs_dir: Path) -> None:
    path = btrfs_dir / "disk.img"
    path.touch()
    run(require("chattr"), "+C", path)
    filled(path, 4 * MIB)
    before = path.read_bytes()
    with opened(path) as (snapshot, disk):
        assert snapshot.frozen
        with open(path, "r+b") as stream:
            stream.write(os.urandom(MIB))
        assert whole(disk) == before


def test_a_clone_is_not_made_where_it_could_stop_the_vm(
    small_fs: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_fs("xfs", 300 * MIB) / "disk.img"
    filled(path, 64 * MIB)
    with opened(path) as (snapshot, _):
        assert snapshot.frozen
    monkeypatch.setattr(reflink, "EXTENTS_MAX", 10)
    with opened(path) as (snapshot, _):
        assert not snapshot.frozen
        assert "extents would hold up the VM's writes" in snapshot.reason
    monkeypatch.undo()
    free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
    with open(path.parent / "ballast", "wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, free - MIB)
    with opened(path) as (snapshot, _):
        assert not snapshot.frozen
        assert "MiB free in its file system" in snapshot.reason
    with opened(path, reflink=Reflink.ALWAYS) as (snapshot, _):
        assert snapshot.frozen


def test_a_read_only_file_system_is_read_live(small_fs: Callable[[str, int], Path]) -> None:
    path = filled(small_fs("xfs", 300 * MIB) / "disk.img", MIB)
    run("mount", "-o", "remount,ro", path.parent)
    with opened(path) as (snapshot, disk):
        assert snapshot.reason == "read live (disk: no reflink clone: Read-only file system)"
        assert whole(disk) == path.read_bytes()


# ---- holes and sizes ---------------------------------------------------------------------------


def test_the_cost_follows_the_data_not_the_size(
    any_fs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = any_fs_dir / "disk.img"
    size, step = 1 << 40, 1 << 30
    with open(path, "wb") as stream:
        stream.truncate(size)
        for at in range(0, size, step):
            stream.seek(at)
            stream.write(b"data")
    asked, lseek = 0, os.lseek

    def counted(fd: int, position: int, how: int) -> int:
        nonlocal asked
        asked += 1
        return lseek(fd, position, how)

    monkeypatch.setattr(os, "lseek", counted)
    with opened(path) as (_, disk):
        extents = list(disk.data())
    assert asked < 3 * 1024
    assert [extent.offset for extent in extents] == list(range(0, size, step))
    assert sum(extent.length for extent in extents) <= 1024 * 64 * KIB


@pytest.mark.parametrize("size", [1, 511, 513, 4095, 65_535, 65_536, 65_537, MIB + 1])
def test_any_size(any_fs_dir: Path, size: int) -> None:
    path = any_fs_dir / "disk.img"
    path.write_bytes(os.urandom(size))
    with opened(path) as (_, disk):
        assert disk.size == size
        assert disk.read(0, size) == path.read_bytes() == whole(disk)
        assert list(disk.data()) == ([Extent(0, size)] if size else [])


def test_only_a_hole(any_fs_dir: Path) -> None:
    path = any_fs_dir / "disk.img"
    path.touch()
    os.truncate(path, MIB + 5)
    with opened(path) as (_, disk):
        assert list(disk.data()) == []
        assert disk.read(0, MIB + 5) == bytes(MIB + 5)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_where_holes_cannot_be_found_all_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(fd: int, position: int, how: int) -> int:
        raise OSError(code, os.strerror(code))

    image = filled(tmp_path / "image", 4 * MIB)
    with opened(image, reflink=Reflink.NEVER) as (_, disk):
        monkeypatch.setattr(os, "lseek", refuse)
        assert list(disk.data()) == [Extent(0, 4 * MIB)]


def test_growth_after_the_snapshot_is_for_the_next_one(any_fs_dir: Path) -> None:
    path = filled(any_fs_dir / "disk.img", MIB)
    before = path.read_bytes()
    with opened(path) as (_, disk):
        with open(path, "ab") as stream:
            stream.write(b"more" * 100_000)
        assert disk.size == MIB
        assert whole(disk) == before


def test_shrinking_after_the_snapshot_does_not_touch_a_clone(reflink_dir: Path) -> None:
    path = filled(reflink_dir / "disk.img", MIB)
    before = path.read_bytes()
    with opened(path) as (_, disk):
        os.truncate(path, 1000)
        assert whole(disk) == before


def test_a_live_file_that_shrinks_is_an_error_with_path_and_offset(ext4_dir: Path) -> None:
    path = filled(ext4_dir / "disk.img", MIB)
    with opened(path) as (_, disk):
        listing = iter(disk.data())
        next(listing)
        os.truncate(path, 100_001)
        for offset, length in [(65_536, 65_536), (200_000, 10)]:
            with pytest.raises(SourceUnavailable) as caught:
                disk.read(offset, length)
            at = max(offset, 100_001)
            assert caught.value.message == (
                f"cannot read {path} at byte {at}: it ends at byte 100001 now, "
                f"and had {MIB} bytes when the backup started"
            )
        assert len(disk.read(0, 100_001)) == 100_001
        # What has been cut off must not pass for a hole.
        for listed in (listing, disk.data()):
            with pytest.raises(SourceUnavailable, match="ends at byte 100001 now"):
                list(listed)


def test_a_file_system_that_gives_too_little_is_blamed_not_a_resize(
    ext4_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled(ext4_dir / "disk.img", MIB)
    monkeypatch.setattr(FileReader, "read", lambda self, offset, length: b"")
    with opened(path) as (_, disk), pytest.raises(SourceUnavailable) as caught:
        disk.read(4096, 10)
    assert caught.value.message == (
        f"cannot read {path} at byte 4096: its file system says that it has {MIB} bytes, "
        "but gives none there"
    )


# ---- what cannot be backed up ------------------------------------------------------------------


def kinds(tmp_path: Path) -> dict[str, Path]:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    return {
        "No such file or directory": tmp_path / "missing",
        "it is a directory": tmp_path,
        "it is a pipe": tmp_path / "fifo",
        "it is a character device": Path("/dev/zero"),
        "Too many levels of symbolic links": tmp_path / "loop",
        "No such file": tmp_path / "dangling",
        "Not a directory": Path("/dev/zero/x"),
        "File name too long": tmp_path / ("x" * 300),
    }


@pytest.mark.timeout(20)
def test_other_things_are_one_clear_error(tmp_path: Path) -> None:
    for reason, path in kinds(tmp_path).items():
        for attempt in (lambda p=path: of(p).disks(), lambda p=path: opened(p).__enter__()):
            with pytest.raises(SourceUnavailable) as caught:
                attempt()
            assert reason in caught.value.message
            assert str(path) in caught.value.message
            assert "\n" not in caught.value.message


def test_an_unreadable_file(tmp_path: Path) -> None:
    require("root")
    path = filled(tmp_path / "disk.img", MIB)
    os.chmod(path, 0)
    os.seteuid(65_534)
    try:
        with pytest.raises(SourceUnavailable, match=f"cannot read {path}: Permission denied"):
            opened(path).__enter__()
    finally:
        os.seteuid(0)


def test_a_symbolic_link_is_followed_and_cloned_at_its_target(
    reflink_dir: Path, tmp_path: Path
) -> None:
    path = filled(reflink_dir / "disk.img", MIB)
    (tmp_path / "link").symlink_to(path)
    with opened(tmp_path / "link") as (snapshot, disk):
        assert snapshot.frozen
        assert whole(disk) == path.read_bytes()


# ---- file systems that other hosts write, too --------------------------------------------------


@pytest.mark.parametrize("reflink", [Reflink.AUTO, Reflink.NEVER])
def test_what_another_host_writes_is_read(tmp_path: Path, reflink: Reflink) -> None:
    """Else a disk that changes while it is read looks the same when it is read again."""
    require("fuse")
    (tmp_path / "theirs").mkdir()
    image, ours = filled(tmp_path / "theirs" / "vm.img", 2 * MIB + 700), tmp_path / "ours"
    with (
        seen_from_here(image.parent, ours),
        open(ours / "vm.img", "rb") as other,
        opened(ours / "vm.img", reflink=reflink) as (_, disk),
    ):
        assert other.read() == whole(disk) == image.read_bytes()
        with open(image, "r+b") as stream:
            stream.write(b"new" * 4096)
        assert whole(disk) == image.read_bytes()
        assert disk.read(2 * MIB + 5, 695) == image.read_bytes()[-695:]


def test_a_file_in_memory_is_read_as_it_is_cached() -> None:
    """No other host writes there: past the page cache it would only be copied twice."""
    with (
        tempfile.NamedTemporaryFile(dir="/dev/shm") as image,
        opened(filled(Path(image.name), 2 * MIB)) as (_, disk),
    ):
        flags = fcntl.fcntl(disk._reader.fd, fcntl.F_GETFL)  # type: ignore[attr-defined]
        assert not flags & os.O_DIRECT


# ---- block devices -----------------------------------------------------------------------------


def test_a_device_is_read_as_it_is_not_as_it_is_cached(tmp_path: Path) -> None:
    backing = filled(tmp_path / "backing", 2 * MIB)
    with loop_device(backing) as device, open(device, "rb") as other:
        other.read()  # now the device's pages are cached, and it stays open
        with open(backing, "r+b") as stream:  # another path to the same bytes
            stream.write(b"new" * 4096)
        with opened(device) as (snapshot, disk):
            assert disk.read(0, 12_288) == b"new" * 4096
            assert snapshot.reason == "read live (disk: block device)"
            assert disk.bookmark["kind"] == "device"


def test_what_was_just_written_to_a_device_is_read(tmp_path: Path) -> None:
    backing = filled(tmp_path / "backing", 2 * MIB)
    with loop_device(backing) as device, open(device, "r+b", buffering=0) as stream:
        stream.seek(5000)
        stream.write(b"in the cache only")
        with opened(device) as (_, disk):
            assert disk.read(5000, 17) == b"in the cache only"


def test_a_bad_medium_is_an_error_with_path_and_offset(tmp_path: Path) -> None:
    backing = filled(tmp_path / "backing", 2 * MIB)
    with loop_device(backing) as device, opened(device) as (_, disk):
        os.truncate(backing, MIB)  # the device keeps its size: what is gone cannot be read
        assert disk.read(0, MIB) == backing.read_bytes()
        with pytest.raises(
            SourceUnavailable,
            match=rf"cannot read {device} at byte {MIB + 512} \(length 1024\): Inp",
        ):
            disk.read(MIB + 512, 1024)


def test_a_device_is_not_cloned_when_a_clone_is_demanded(tmp_path: Path) -> None:
    with (
        loop_device(filled(tmp_path / "backing", MIB)) as device,
        pytest.raises(SourceUnavailable, match="it is a block device"),
        of(device, reflink=Reflink.ALWAYS).snapshot(FIRST, {}),
    ):
        pass


# ---- change lists ------------------------------------------------------------------------------


def changed(path: Path, extents: list[Extent], since: Any) -> list[Extent] | None:
    source = of(path, changes={"disk": extents})
    with source.snapshot(FIRST, since) as snapshot:
        found = snapshot.disks["disk"].changed()
        return None if found is None else list(found.extents)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return filled(tmp_path / "disk.img", MIB)


def bookmark(path: Path) -> dict[str, Any]:
    with opened(path) as (_, disk):
        return {"disk": disk.bookmark}


def test_a_change_list_is_believed(image: Path) -> None:
    since = bookmark(image)
    given = [Extent(70_000, 10), Extent(0, 4096)]
    assert changed(image, given, since) == sorted(given)
    assert changed(image, [], since) == []


def test_a_change_list_without_its_parent_is_not_believed(image: Path) -> None:
    since = bookmark(image)
    assert changed(image, [Extent(0, 1)], {}) is None
    assert changed(image, [Extent(0, 1)], {"disk": {**since["disk"], "path": "/else"}}) is None
    assert changed(image, [Extent(0, 1)], {"disk": {**since["disk"], "size": "1"}}) is None
    assert changed(image, [Extent(0, 1)], {"other": since["disk"]}) is None


def test_what_an_image_has_grown_by_is_changed_too(image: Path) -> None:
    since = bookmark(image)
    os.truncate(image, 2 * MIB)
    given = [Extent(0, 512), Extent(MIB - 512, 1024), Extent(MIB + 4096, 512)]
    assert changed(image, given, since) == [
        Extent(0, 512), Extent(MIB - 512, 512), Extent(MIB, MIB),
    ]  # fmt: skip


def test_a_change_list_of_another_size_is_refused(image: Path) -> None:
    since = bookmark(image)
    os.truncate(image, MIB // 2)
    with pytest.raises(UsageError, match=r"reaches beyond the disk of 524288 bytes: offset 600000"):
        changed(image, [Extent(600_000, 1)], since)
    with pytest.raises(UsageError, match="overlapping extents at byte 5"):
        of(image, changes={"disk": [Extent(0, 10), Extent(5, 10)]})
    with pytest.raises(ConfigError, match="'dosk', which is no disk here"):
        of(image, changes={"dosk": []})


# ---- settings ----------------------------------------------------------------------------------


def test_settings(image: Path) -> None:
    for settings in (
        {"filename": str(image)},
        {"filename": str(image), "cow": True, "reflink": "never"},
        {"disks": {"disk": str(image)}},
    ):
        assert FileSource.from_settings(settings).disks() == ("disk",)
    source = FileSource.from_settings({"disks": {"root": "/a", "data": "/b"}})
    with pytest.raises(SourceUnavailable, match="cannot read /a"):
        source.disks()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either `filename` or `disks`"),
        ({"filename": "/a", "disks": {"b": "/b"}}, "give either `filename` or `disks`"),
        ({"filename": "a.img"}, "must be an absolute path, not 'a.img'"),
        ({"filename": ""}, "must be the path"),
        ({"filename": 5}, "must be the path"),
        ({"filename": "/a\0b"}, "must be the path"),
        ({"filename": ["/a"]}, "must be the path"),
        ({"disks": {}}, "must map names of disks to paths"),
        ({"disks": ["/a"]}, "must map names of disks to paths"),
        ({"disks": {"a/b": "/a"}}, "'a/b' is no disk name"),
        ({"disks": {"a": "/a", "b": "/a"}}, "two disks have the same path"),
        ({"filename": "/a", "reflink": "sometimes"}, "must be auto, always or never"),
        ({"filename": "/a", "reflink": True}, "must be auto, always or never"),
        ({"filename": "/a", "fielname": "/b"}, "unknown key 'fielname'"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FileSource.from_settings(settings)


# ---- the page cache ----------------------------------------------------------------------------


def resident(path: Path) -> int:
    """Bytes of a file in the page cache."""
    done = subprocess.run(
        [require("fincore"), "-n", "-b", "-o", "RES", path],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout or 0)


def test_the_page_cache_is_left_as_it_was_found(any_fs_dir: Path) -> None:
    path = any_fs_dir / "disk.img"
    rng, size = random.Random(5), 160 * MIB
    piece = rng.randbytes(MIB)
    with open(path, "wb") as stream:
        for _ in range(size // MIB):
            stream.write(piece)
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert resident(path) == 0
    with open(path, "rb", buffering=0) as vm:
        os.posix_fadvise(vm.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for at in (0, 40 * MIB, 100 * MIB):
            os.pread(vm.fileno(), 2 * MIB, at)
        used_by_the_vm = resident(path)
        assert used_by_the_vm >= 6 * MIB
        digest = hashlib.blake2b()
        with opened(path, reflink=Reflink.NEVER) as (_, disk):
            for at in range(0, size, 2 * MIB):
                digest.update(disk.read(at, 2 * MIB))
        assert digest.digest() == hashlib.blake2b(piece * (size // MIB)).digest()
        # The kernel may reclaim some of the VM's pages on a busy machine; we must not drop them.
        assert used_by_the_vm // 2 <= resident(path) <= used_by_the_vm + MIB
