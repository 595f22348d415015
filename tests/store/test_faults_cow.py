"""kill -9 and failing file operations at every step of what writes to a cow repository."""

from __future__ import annotations

import errno
import itertools
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from backyfs.store.fs import Fs
from backyfs.store.repository import Repository
from tests.store import faults
from tests.store.faults import Contents, FailAt, History, killed, revision_id
from tests.store.test_faults_calls import attempt


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    faults.lower_limits(monkeypatch)


@pytest.fixture
def history(reflink_dir: Path) -> History:
    return faults.make_history(reflink_dir / "vm", "cow")


Work = Callable[[Repository], object]


def kill_everywhere(history: History, work: Work, possible: Contents, finished: set[str]) -> int:
    """Kill `work` at each of its steps on a copy; how many there were."""
    for n in itertools.count(1):
        copy = history.copy(history.path.with_name(f"killed-{n}"))

        def operation(fs: Fs, copy: History = copy) -> None:
            work(copy.open(fs))

        died = killed(operation, n)
        listed = faults.check(copy.path, copy.contents, possible)
        faults.goes_on(copy.path, {key: {**copy.contents, **possible}[key] for key in listed})
        shutil.rmtree(copy.path)
        if not died:
            assert listed == finished
            return n - 1
    raise AssertionError


def test_killing_a_backup(history: History) -> None:
    disks = faults.next_disks(history)

    def backup(repository: Repository) -> object:
        return faults.store(repository, 7, disks, history.newest)

    new = {revision_id(7): disks}
    assert kill_everywhere(history, backup, new, {*history.contents, *new}) > 10


def test_killing_a_removal(history: History) -> None:
    gone = {revision_id(n): history.contents.pop(revision_id(n)) for n in (1, 4)}

    def remove(repository: Repository) -> object:
        repository.remove(sorted(gone))
        return repository.gc()

    assert kill_everywhere(history, remove, gone, set(history.contents)) > 5


@pytest.mark.parametrize(("code", "for_good"), [(errno.EIO, False), (errno.ENOSPC, True)])
def test_failing_a_backup(history: History, code: int, for_good: bool) -> None:
    disks = faults.next_disks(history)
    new = {revision_id(7): disks}

    def backup(repository: Repository) -> object:
        return faults.store(repository, 7, disks, history.newest)

    for n in itertools.count(1):
        copy = history.copy(history.path.with_name(f"failed-{n}"))
        before = faults.listing(copy.path)
        fs = FailAt(n, code, for_good=for_good)
        failed = attempt(backup, copy.open(fs), code)
        if failed and not for_good:
            assert faults.listing(copy.path) == before, n
        listed = faults.check(copy.path, copy.contents, new)
        with copy.open().writing():
            pass
        if failed and listed == set(copy.contents):
            assert faults.listing(copy.path) == before, n
        faults.goes_on(copy.path, {key: {**copy.contents, **new}[key] for key in listed})
        shutil.rmtree(copy.path)
        if not fs.fired:
            assert not failed
            assert n > 10
            break


def spoil(history: History, number: int, frame_no: int) -> None:
    """Wrong bytes in the file of one revision, found by reading it."""
    repository = history.open()
    record = repository.record(revision_id(number))
    (path,) = (
        repository.layout.revisions / name
        for name in record.disks["root"].files
        if name.endswith(".img")
    )
    with open(path, "r+b") as stream:
        stream.seek(frame_no * 65536 + 5000)
        stream.write(b"spoiled")
    with closing(repository.open_disk(record, "root")) as image:
        assert image.check(frame_no, 1) == [frame_no]


def test_killing_a_backup_that_heals(history: History) -> None:
    spoil(history, 6, 2)
    spoil(history, 6, 0)
    disks = {**history.newest, "root": faults.patched(history.newest["root"], 1, 77)}

    def backup(fs: Fs) -> None:
        faults.store(copy.open(fs), 7, disks, history.newest)

    for n in itertools.count(1):
        copy = history.copy(history.path.with_name(f"killed-{n}"))
        died = killed(backup, n)
        repository = copy.open()
        assert repository.fsck() == []
        assert set(repository.damage()) <= {revision_id(6), revision_id(7)}
        listed = {record.id for record in repository.revisions()}
        assert listed - {revision_id(7)} == set(history.contents)
        if revision_id(7) in listed:
            copy.contents[revision_id(7)] = disks
            record = repository.record(revision_id(7))
            assert faults.content(repository, record) == disks
        copy.contents[revision_id(8)] = disks
        faults.store(repository, 8, disks, copy.contents.get(revision_id(7), history.newest))
        copy.open().gc()
        faults.check(copy.path, copy.contents)
        assert faults.strays(copy.path) == []
        shutil.rmtree(copy.path)
        if not died:
            assert n > 10
            break
