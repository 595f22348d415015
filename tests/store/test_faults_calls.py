"""Every file operation of everything that writes fails once, or once and for all after.

After each: an error an operator understands (or success), nothing published by halves, nothing
left behind, the writer's lock free, the store sound.
"""

from __future__ import annotations

import errno
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from backyfs.errors import BackyfsError, NoSpace, UsageError
from backyfs.model import FRAME
from backyfs.store import space
from backyfs.store.fs import Fs
from backyfs.store.quarantine import Bad
from backyfs.store.repository import Repository
from tests.store import faults
from tests.store.faults import Contents, Disks, FailAt, History, revision_id


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    faults.lower_limits(monkeypatch)


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with faults.scratch(tmp_path) as directory:
        yield faults.make_history(directory / "vm")


@pytest.fixture(params=["once", "for good"])
def for_good(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "for good")


@pytest.fixture(params=[errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def code(request: pytest.FixtureRequest) -> int:
    return int(request.param)


Failing = Callable[[Repository], object]


def fail_everywhere(
    history: History,
    operation: Failing,
    code: int,
    for_good: bool,
    possible: Contents,
    *,
    atomic: bool,
) -> int:
    """Fail `operation` at each of its steps on a copy; how many there were.

    `atomic`: what failed has left no trace at all, if at least its cleaning up worked.
    """
    for n in itertools.count(1):
        copy = history.copy(history.path.with_name(f"failed-{n}"))
        before = faults.listing(copy.path)
        fs = FailAt(n, code, for_good=for_good)
        failed = attempt(operation, copy.open(fs), code)
        listed = faults.check(copy.path, copy.contents, possible)
        if failed and atomic and not for_good:
            assert faults.listing(copy.path) == before, n
        with copy.open().writing():
            pass
        if failed and atomic and listed == set(copy.contents):
            assert faults.listing(copy.path) == before, n
        faults.goes_on(copy.path, {key: {**copy.contents, **possible}[key] for key in listed})
        shutil.rmtree(copy.path)
        if not fs.fired:
            assert not failed
            return n - 1
    raise AssertionError


def attempt(operation: Failing, repository: Repository, code: int) -> bool:
    """Whether the operation failed; a full file system must be called one."""
    try:
        operation(repository)
    except BackyfsError as exc:
        assert code == errno.ENOSPC
        assert isinstance(exc, NoSpace), repr(exc)
        return True
    except OSError as exc:
        assert exc.errno == code == errno.EIO
        return True
    return False


def backup(disks: Disks, parent: Disks | None) -> Failing:
    return lambda repository: faults.store(repository, 7, disks, parent)


def test_a_backup(history: History, code: int, for_good: bool) -> None:
    disks = faults.next_disks(history)
    operation = backup(disks, history.newest)
    possible = {revision_id(7): disks}
    steps = fail_everywhere(history, operation, code, for_good, possible, atomic=True)
    assert steps > 25


def test_a_removal(history: History, code: int, for_good: bool) -> None:
    gone = {revision_id(n): history.contents.pop(revision_id(n)) for n in (1, 2, 4)}

    def remove(repository: Repository) -> object:
        return repository.remove(sorted(gone))

    assert fail_everywhere(history, remove, code, for_good, gone, atomic=False) > 8


@pytest.fixture
def purged(history: History) -> History:
    """The history after a removal, before its gc: dead packs, dead frames, too many packs."""
    for n in (0, 2):
        history.open().remove([revision_id(n)])
        del history.contents[revision_id(n)]
    return history


def collect(repository: Repository) -> object:
    return repository.gc()


def test_a_collection_that_merges(purged: History, code: int, for_good: bool) -> None:
    assert fail_everywhere(purged, collect, code, for_good, {}, atomic=False) > 20


def test_a_merge_that_failed_gives_its_space_back(purged: History, code: int) -> None:
    for n in itertools.count(1):
        copy = purged.copy(purged.path.with_name(f"failed-{n}"))
        fs = FailAt(n, code)
        attempt(collect, copy.open(fs), code)
        assert list(copy.path.rglob("*.tmp")) == [], n
        shutil.rmtree(copy.path)
        if not fs.fired:
            assert n > 20
            break


def test_a_merge_against_a_quota_punches_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system shows free space, but does not give any."""

    class Full(Fs):
        def call(self, name: str) -> None:
            if name in ("write", "writev"):
                raise OSError(errno.EDQUOT, "over quota")

    with faults.scratch(tmp_path) as directory:
        holed = faults.make_holed(directory / "vm", monkeypatch)
        monkeypatch.setattr("backyfs.store.packs.gc.DEAD_SHARE_MAX", 0.0)
        report = holed.open(Full()).gc()
        assert (report.merged_files, report.written_files) == (0, 0)
        assert report.freed_bytes >= 3 * FRAME - 8192
        faults.check(holed.path, holed.contents)


def test_a_collection_that_punches(
    tmp_path: Path, code: int, for_good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collect_when_full(repository: Repository) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(space, "free_bytes", lambda path: 0)
            return repository.gc()

    with faults.scratch(tmp_path) as directory:
        holed = faults.make_holed(directory / "vm", monkeypatch)
        steps = fail_everywhere(holed, collect_when_full, code, for_good, {}, atomic=False)
        assert steps > 3


def test_a_file_system_without_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoHoles(Fs):
        def punch(self, fd: int, offset: int, length: int, path: object = "") -> None:
            raise OSError(errno.EOPNOTSUPP, "not supported")

    with faults.scratch(tmp_path) as directory:
        holed = faults.make_holed(directory / "vm", monkeypatch)
        monkeypatch.setattr(space, "free_bytes", lambda path: 0)
        assert holed.open(NoHoles()).gc().freed_bytes == 0
        faults.check(holed.path, holed.contents)


def test_a_change_of_state(history: History, code: int, for_good: bool) -> None:
    revision = revision_id(3)

    def tag(repository: Repository) -> object:
        return repository.update_state(revision, lambda state: replace(state, tags=("kept",)))

    assert fail_everywhere(history, tag, code, for_good, {}, atomic=False) >= 5


def test_recording_damage(history: History, code: int, for_good: bool) -> None:
    def add(repository: Repository) -> object:
        return repository.quarantine.add(Bad(f"{revision_id(0)}-9", 1), "it reads badly")

    for n in itertools.count(1):
        copy = history.copy(history.path.with_name(f"failed-{n}"))
        fs = FailAt(n, code, for_good=for_good)
        attempt(add, copy.open(fs), code)
        assert list(copy.path.rglob("*.tmp")) == []
        faults.goes_on(copy.path, copy.contents)
        shutil.rmtree(copy.path)
        if not fs.fired:
            assert n > 5
            break


def test_making_a_repository(tmp_path: Path, code: int, for_good: bool) -> None:
    with faults.scratch(tmp_path) as directory:
        for n in itertools.count(1):
            path = directory / f"vm{n}"
            fs = FailAt(n, code, for_good=for_good)

            def create(_: object, path: Path = path, fs: Fs = fs) -> object:
                return Repository.create(path, "packs", fs=fs)

            try:
                create(None)
            except (OSError, NoSpace):
                assert fs.fired
                assert not list(path.rglob("*.tmp")) if path.exists() else True
                path = Repository.create(path, "packs").path if not is_made(path) else path
            record = faults.store(Repository.open(path), 0, {"disk": faults.frames(1)})
            faults.check(path, {record.id: {"disk": faults.frames(1)}})
            if not fs.fired:
                assert n > 5
                break


def test_two_that_make_the_same_repository(tmp_path: Path) -> None:
    """One of them does, and the other touches nothing of it."""
    path = tmp_path / "vm"

    class Slower(Fs):
        def call(self, name: str) -> None:
            if name == "link":
                faults.store(Repository.create(path, "packs"), 0, {"disk": faults.frames(1)})

    with pytest.raises(UsageError, match="by another process"):
        Repository.create(path, "packs", fs=Slower())
    (record,) = Repository.open(path).revisions()
    faults.check(path, {record.id: {"disk": faults.frames(1)}})


def is_made(path: Path) -> bool:
    return (path / "repository.json").exists()


def test_a_healing_backup(history: History, code: int, for_good: bool) -> None:
    faults.damage(history, 2)
    faults.damage(history, 0)
    damaged = set(history.open().damage())
    disks = {**history.newest, "root": faults.patched(history.newest["root"], 1, 77)}
    for n in itertools.count(1):
        copy = history.copy(history.path.with_name(f"failed-{n}"))
        fs = FailAt(n, code, for_good=for_good)
        failed = attempt(backup(disks, history.newest), copy.open(fs), code)
        if failed and not for_good:
            assert list(copy.path.rglob("*.tmp")) == [], n
        repository = copy.open()
        assert repository.fsck() == []
        assert set(repository.damage()) <= damaged
        listed = {record.id for record in repository.revisions()}
        assert listed - {revision_id(7)} == set(history.contents)
        if revision_id(7) in listed:
            copy.contents[revision_id(7)] = disks
            assert repository.damage() == {} or fs.fired
        copy.contents[revision_id(8)] = disks
        faults.store(repository, 8, disks, copy.contents.get(revision_id(7), history.newest))
        copy.open().gc()
        faults.check(copy.path, copy.contents)
        assert faults.strays(copy.path) == []
        shutil.rmtree(copy.path)
        if not fs.fired:
            assert n > 20
            break
