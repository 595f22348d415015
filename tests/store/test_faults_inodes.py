"""Files that cannot even be opened, or are none: damage of what they held, and of nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backyfs.errors import Corrupt
from backyfs.store.repository import Repository
from tests import filesystems
from tests.parts import require
from tests.store import faults
from tests.store.faults import History, revision_id

FIFO_PATIENCE_S = 60


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with faults.scratch(tmp_path) as directory:
        yield faults.make_history(directory / "vm")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 41)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def within(seconds: float, work: Callable[[], None]) -> None:
    """Do `work`; fail, instead of hanging, where it waits for a FIFO's writer."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as exc:
            failure.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    if failure:
        raise failure[0]


def rest_is_whole(path: Path, history: History, lost: set[str]) -> None:
    """All other revisions can be read, nothing is deleted, and the next backup is good."""
    repository = Repository.open(path)
    assert repository.damage().keys() | repository.unreadable().keys() == lost
    assert {record.id for record in repository.revisions()} | lost == set(history.contents)
    for record in repository.revisions():
        if record.id not in lost:
            assert faults.content(repository, record) == history.contents[record.id]
    with pytest.raises(Corrupt):
        repository.gc()
    disks = faults.next_disks(history)
    faults.store(repository, 7, disks, history.newest)
    repository = Repository.open(path)
    assert faults.content(repository, repository.record(revision_id(7))) == disks


def users(history: History, file: Path) -> set[str]:
    """The revisions that are lost with a record or a map."""
    records = history.open().revisions()
    named = {r.id for r in records for disk in r.disks.values() if file.name in disk.files}
    return named or {file.stem}


@pytest.mark.parametrize("become", [os.mkfifo, os.mkdir, loop, dangling, huge, zeros])
@pytest.mark.parametrize("what", ["json", "map"])
def test_something_else_has_the_name(
    history: History, what: str, become: Callable[[Path], None]
) -> None:
    victim = next(history.path.glob(f"revisions/{revision_id(2)}.*{what}"))
    lost = users(history, victim)
    victim.unlink()
    become(victim)
    within(FIFO_PATIENCE_S, lambda: rest_is_whole(history.path, history, lost))


@pytest.mark.parametrize("become", [os.mkfifo, loop, dangling, huge])
def test_a_record_that_is_no_file_can_be_given_up(
    history: History, become: Callable[[Path], None]
) -> None:
    repository = history.open()
    victim = repository.layout.record(revision_id(2))
    victim.unlink()
    become(victim)
    repository.remove([revision_id(2)])
    repository.gc()
    del history.contents[revision_id(2)]
    faults.check(history.path, history.contents)


@pytest.mark.parametrize("become", [os.mkfifo, loop, huge])
def test_a_pack_that_is_none(history: History, become: Callable[[Path], None]) -> None:
    pack = min((history.path / "packs").iterdir())
    pack.unlink()
    become(pack)
    within(FIFO_PATIENCE_S, lambda: all_is_told(history))


def all_is_told(history: History) -> None:
    repository = history.open()
    damaged = repository.damage()
    assert damaged
    for record in repository.revisions():
        if record.id not in damaged:
            assert faults.content(repository, record) == history.contents[record.id]
    with pytest.raises(Corrupt):
        repository.gc()


@pytest.mark.parametrize("become", [os.mkfifo, loop, huge])
def test_a_state_that_is_no_file(history: History, become: Callable[[Path], None]) -> None:
    repository = history.open()
    state = repository.layout.state(revision_id(2))
    state.unlink(missing_ok=True)
    become(state)

    def told() -> None:
        assert repository.state_problem(revision_id(2))
        assert faults.content(repository, repository.record(revision_id(2)))

    within(FIFO_PATIENCE_S, told)


def spoil_inode(medium: Path, path: str) -> None:
    """Make an inode of an unmounted ext4 fail its checksum: stat and open of it fail."""
    found = debugfs(medium, f"imap {path}")
    place = re.search(r"located at block (\d+), offset 0x([0-9a-f]+)", found)
    size = re.search(r"Block size:\s+(\d+)", debugfs(medium, "show_super_stats -h"))
    assert place, found
    assert size
    with open(medium, "r+b") as stream:
        at = int(place[1]) * int(size[1]) + int(place[2], 16) + 0x7C  # l_i_checksum_lo
        stream.seek(at)
        old = stream.read(1)
        stream.seek(at)
        stream.write(bytes([old[0] ^ 0x55]))


def debugfs(medium: Path, request: str) -> str:
    done = subprocess.run(
        ["debugfs", "-R", request, medium], check=True, capture_output=True, text=True
    )
    return done.stdout


@pytest.mark.parametrize("what", ["json", "map"])
def test_a_damaged_inode(tmp_path: Path, what: str) -> None:
    """As file systems answer for an inode that fails its checksum: EBADMSG, EUCLEAN."""
    require("debugfs")
    with filesystems.mounted("ext4", tmp_path, 64 * filesystems.MIB) as mountpoint:
        history = faults.make_history(mountpoint / "vm")
        file = next(history.path.glob(f"revisions/{revision_id(2)}.*{what}"))
        lost, victim = users(history, file), file.relative_to(mountpoint)
        medium = tmp_path / "ext4.img"
        filesystems.run("umount", mountpoint)
        spoil_inode(medium, f"/{victim}")
        filesystems.run("mount", "-o", "loop,errors=continue", medium, mountpoint)
        with pytest.raises(OSError, match="Bad message"):
            os.stat(mountpoint / victim)
        rest_is_whole(history.path, history, lost)
