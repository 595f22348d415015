"""kill -9 at every file operation of everything that writes to a packs repository.

After each: the store is sound, every published revision reads back byte for byte, nothing
unfinished is listed, and the next backup and gc work and leave nothing behind.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from backyfs.errors import BackyfsError
from backyfs.model import FRAME
from backyfs.store import space
from backyfs.store.fs import Fs
from backyfs.store.quarantine import Bad
from backyfs.store.repository import Repository
from tests.store import faults
from tests.store.faults import Contents, Disks, History, killed, revision_id


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    faults.lower_limits(monkeypatch)


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with faults.scratch(tmp_path) as directory:
        yield faults.make_history(directory / "vm")


def kill_everywhere(
    history: History,
    operation: Callable[[Path], Callable[[Fs], object]],
    certain: Contents,
    possible: Contents,
    *,
    finished: set[str],
    also: Callable[[Path], None] = lambda path: None,
) -> int:
    """Kill `operation` at each of its steps on a copy of the repository; how many there were."""
    for n in itertools.count(1):
        copy = history.copy(history.path.with_name(f"killed-{n}"))
        died = killed(operation(copy.path), n)
        listed = faults.check(copy.path, certain, possible)
        also(copy.path)
        faults.goes_on(copy.path, {key: {**certain, **possible}[key] for key in listed})
        shutil.rmtree(copy.path)
        if not died:
            assert listed == finished
            return n - 1
    raise AssertionError


def backup(disks: Disks, parent: Disks | None) -> Callable[[Path], Callable[[Fs], object]]:
    return lambda path: lambda fs: faults.store(Repository.open(path, fs=fs), 7, disks, parent)


@pytest.mark.parametrize("scan", [False, True], ids=["changes", "scan"])
def test_a_backup(history: History, scan: bool) -> None:
    disks = faults.next_disks(history)
    steps = kill_everywhere(
        history,
        backup(disks, None if scan else history.newest),
        history.contents,
        {revision_id(7): disks},
        finished={*history.contents, revision_id(7)},
    )
    assert steps > 20


def test_the_first_backup(tmp_path: Path) -> None:
    with faults.scratch(tmp_path) as directory:
        Repository.create(directory / "vm", "packs")
        disks = {"disk": faults.frames(*range(1, 7))}
        steps = kill_everywhere_first(History(directory / "vm"), disks)
        assert steps > 20


def kill_everywhere_first(history: History, disks: Disks) -> int:
    for n in itertools.count(1):
        copy = history.copy(history.path.with_name(f"killed-{n}"))
        died = killed(backup(disks, None)(copy.path), n)
        listed = faults.check(copy.path, {}, {revision_id(7): disks})
        faults.store(copy.open(), 8, disks)
        copy.open().gc()
        found = dict.fromkeys([*listed, revision_id(8)], disks)
        faults.check(copy.path, found)
        assert faults.strays(copy.path) == []
        shutil.rmtree(copy.path)
        if not died:
            return n - 1
    raise AssertionError


def test_a_removal(history: History) -> None:
    gone = {revision_id(n): history.contents.pop(revision_id(n)) for n in (1, 2, 4)}
    steps = kill_everywhere(
        history,
        lambda path: lambda fs: Repository.open(path, fs=fs).remove(sorted(gone)),
        history.contents,
        gone,
        finished=set(history.contents),
    )
    assert steps >= 10


@pytest.fixture
def purged(history: History) -> History:
    """The history after a removal, before its gc: dead packs, dead frames, too many packs."""
    for n in (0, 2):
        history.open().remove([revision_id(n)])
        del history.contents[revision_id(n)]
    return history


def collect(path: Path) -> Callable[[Fs], object]:
    return lambda fs: Repository.open(path, fs=fs).gc()


def test_a_collection_that_merges(purged: History) -> None:
    steps = kill_everywhere(purged, collect, purged.contents, {}, finished=set(purged.contents))
    assert steps > 20
    before = len(list((purged.path / "packs").iterdir()))
    assert purged.open().gc().merged_files > 2
    assert len(list((purged.path / "packs").iterdir())) < before


def test_a_collection_that_punches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def collect_when_full(path: Path) -> Callable[[Fs], object]:
        def collect(fs: Fs) -> object:
            space.free_bytes = lambda path: 0  # in the child only
            return Repository.open(path, fs=fs).gc()

        return collect

    with faults.scratch(tmp_path) as directory:
        holed = faults.make_holed(directory / "vm", monkeypatch)
        steps = kill_everywhere(
            holed, collect_when_full, holed.contents, {}, finished=set(holed.contents)
        )
        assert steps > 3
        monkeypatch.setattr(space, "free_bytes", lambda path: 0)
        report = holed.open().gc()
        assert (report.merged_files, report.written_files) == (0, 0)
        assert report.freed_bytes >= 3 * FRAME - 8192


def test_a_change_of_state(history: History) -> None:
    revision = revision_id(3)

    def tag(path: Path) -> Callable[[Fs], object]:
        return lambda fs: Repository.open(path, fs=fs).update_state(
            revision, lambda state: replace(state, tags=("kept",))
        )

    def old_or_new(path: Path) -> None:
        repository = Repository.open(path)
        assert repository.state(repository.record(revision)).tags in ((), ("kept",))

    steps = kill_everywhere(
        history, tag, history.contents, {}, finished=set(history.contents), also=old_or_new
    )
    assert steps >= 5


def create(path: Path) -> Callable[[Fs], object]:
    return lambda fs: Repository.create(path, "packs", fs=fs)


def test_making_a_repository(tmp_path: Path) -> None:
    with faults.scratch(tmp_path) as directory:
        for n in itertools.count(1):
            path = directory / f"vm{n}"
            died = killed(create(path), n)
            try:
                repository = Repository.open(path)
            except BackyfsError:
                assert died
                repository = Repository.create(path, "packs")
            disks = {"disk": faults.frames(1, 2)}
            record = faults.store(repository, 0, disks)
            faults.check(path, {record.id: disks})
            if not died:
                assert n > 5
                break


# ---- healing -----------------------------------------------------------------------------------


def test_a_backup_that_heals(history: History) -> None:
    faults.damage(history, 2)
    faults.damage(history, 0)
    damaged = set(history.open().damage())
    assert len(damaged) > 3
    disks = faults.next_disks(history)
    disks["root"] = faults.patched(history.newest["root"], 1, 77)
    for n in itertools.count(1):
        copy = history.copy(history.path.with_name(f"killed-{n}"))
        died = killed(backup(disks, history.newest)(copy.path), n)
        repository = copy.open()
        assert repository.fsck() == []
        assert set(repository.damage()) <= damaged | {revision_id(7)}
        listed = {record.id for record in repository.revisions()}
        assert listed - {revision_id(7)} == set(history.contents)
        if revision_id(7) in listed:
            copy.contents[revision_id(7)] = disks
            assert repository.damage() == {}
        if not died:
            assert revision_id(7) in listed
        # The next backup heals whatever is left, and everything is as if nothing had happened.
        copy.contents[revision_id(8)] = disks
        faults.store(repository, 8, disks, copy.contents.get(revision_id(7), history.newest))
        copy.open().gc()
        faults.check(copy.path, copy.contents)
        assert faults.strays(copy.path) == []
        shutil.rmtree(copy.path)
        if not died:
            assert n > 20
            break


def record_damage(history: History) -> Callable[[Fs], object]:
    return lambda fs: history.open(fs).quarantine.add(Bad(f"{revision_id(0)}-9", 1), "x")


def test_recording_damage(history: History) -> None:
    for n in itertools.count(1):
        copy = history.copy(history.path.with_name(f"killed-{n}"))
        died = killed(record_damage(copy), n)
        repository = copy.open()
        assert repository.quarantine.bad() <= {Bad(f"{revision_id(0)}-9", 1)}
        repository.quarantine.findings()
        faults.goes_on(copy.path, copy.contents)
        shutil.rmtree(copy.path)
        if not died:
            assert n > 3
            break
