"""File systems that lack something: hard links, locks, large files, fsync of directories."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from backyfs.model import Extent
from backyfs.store import lock
from backyfs.store.cow.reflink import data_extents
from backyfs.store.fs import SYSTEM, Fs, publish_new
from backyfs.store.quarantine import Bad, Quarantine
from tests.store import faults
from tests.store.faults import Child, History, revision_id


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with faults.scratch(tmp_path) as directory:
        yield faults.make_history(directory / "vm")


class NoLinks(Fs):
    """As vfat (EPERM), rclone (EIO) and others have it."""

    def __init__(self, code: int) -> None:
        self.code = code

    def link(self, old: Path, new: Path) -> None:
        raise OSError(self.code, os.strerror(self.code), str(new))


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_damage_is_recorded_without_hard_links(tmp_path: Path, code: int) -> None:
    quarantine, bad = Quarantine(tmp_path / "quarantine", NoLinks(code)), Bad("unit", 7)
    assert quarantine.add(bad, "wrong content")
    assert not quarantine.add(bad, "found again")
    assert [finding.reason for finding in quarantine.findings()] == ["wrong content"]
    assert len(os.listdir(tmp_path / "quarantine")) == 1


def test_what_is_there_stays_without_hard_links(tmp_path: Path) -> None:
    target = tmp_path / "one"
    target.write_text("first")
    assert not publish_new(target, b"second", NoLinks(errno.EPERM))
    assert target.read_text() == "first"
    assert os.listdir(tmp_path) == ["one"]


def test_readers_are_seen_where_only_writers_may_lock(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS makes byte range locks of flock(2): an exclusive one needs a file open for writing."""
    take = fcntl.flock

    def as_nfs(fd: int, mode: int) -> None:
        reading = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if mode & fcntl.LOCK_EX and reading:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        take(fd, mode)

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    repository = history.open()
    record = repository.record(revision_id(2))
    image = repository.open_disk(record, next(iter(record.disks)))
    try:
        assert repository.remove([record.id]).in_use == [record.id]
    finally:
        image.close()
    assert repository.remove([record.id]).removed == [record.id]


def test_a_lock_that_cannot_be_had_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, mode: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "lock"
    why = "cannot be locked, which its file system must allow: No locks"
    with pytest.raises(OSError, match=why), lock.exclusive(path, 0.0, "busy"):
        pass
    with pytest.raises(OSError, match=str(path)), lock.meta(path):
        pass


def test_a_file_that_may_not_be_so_large_says_why(tmp_path: Path) -> None:
    def write(_: Fs) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        path = tmp_path / "pack"
        fd = SYSTEM.create(path)
        with pytest.raises(OSError, match="allows no file of that size.*/pack"):
            SYSTEM.write(fd, bytes(8192), path)
        os.close(fd)

    assert not Child(write).run()


def test_directories_that_cannot_be_synced() -> None:
    """The directories of /proc answer EINVAL, as those of VirtualBox's shared folders do."""
    proc = Path("/proc/self")
    fd = os.open(proc, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with pytest.raises(OSError, match="Invalid argument"):
            os.fsync(fd)
    finally:
        os.close(fd)
    SYSTEM.sync_dir(proc)


def test_room_that_cannot_be_found_beforehand() -> None:
    """It was only to see early whether there is any."""
    fd = os.memfd_create("file", os.MFD_ALLOW_SEALING)
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)  # fallocate: EPERM
        SYSTEM.allocate(fd, 0, 65536)
    finally:
        os.close(fd)


def test_holes_that_cannot_be_found_are_read() -> None:
    """Files of /proc have no SEEK_DATA."""
    fd = os.open("/proc/version", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Invalid argument"):
            os.lseek(fd, 0, os.SEEK_DATA)
        assert list(data_extents(fd, 10, 100)) == [Extent(10, 90)]
    finally:
        os.close(fd)
