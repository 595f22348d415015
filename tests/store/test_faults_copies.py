"""A packs repository copied with cp or rsync, also while it is written to, is a working one."""

from __future__ import annotations

import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from backyfs.store.fs import Fs
from backyfs.store.repository import Repository
from tests.parts import require
from tests.store import anatomy, faults
from tests.store.faults import Child, History, revision_id


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    faults.lower_limits(monkeypatch)


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with faults.scratch(tmp_path) as directory:
        yield faults.make_history(directory / "vm")


COMMANDS = {"cp": ["cp", "-a"], "rsync": ["rsync", "-a"]}


def copied(history: History, how: str, where: Path) -> History:
    """A copy made by a program; files that vanish meanwhile are no failure."""
    require(how)
    source, target = f"{history.path}/.", f"{where}/"
    where.mkdir(exist_ok=True)
    done = subprocess.run([*COMMANDS[how], source, target], capture_output=True, check=False)
    assert done.returncode in (0, 1, 24), done.stderr
    return History(where, {key: dict(value) for key, value in history.contents.items()})


@pytest.mark.parametrize("how", COMMANDS)
def test_a_copy_of_a_repository_at_rest(history: History, how: str) -> None:
    copy = copied(history, how, history.path.with_name("copy"))
    assert faults.listing(copy.path) == faults.listing(history.path)
    assert copy.open().uuid == history.open().uuid
    assert copy.open().name == "copy"
    faults.check(copy.path, copy.contents)
    # From here on both live their own lives, and neither knows of the other.
    history.open().remove([revision_id(1)])
    history.open().gc()
    shutil.rmtree(history.path)
    faults.goes_on(copy.path, copy.contents)


def goes_on_after_a_forget(copy: History, disks: faults.Disks) -> set[anatomy.Frame]:
    """What may be missing is the newest revision only, and it is named; all else works.

    Returns what was missing.
    """
    repository = copy.open()
    listed = {record.id for record in repository.revisions()}
    assert copy.contents.keys() <= listed <= {*copy.contents, revision_id(7)}
    contents = {**copy.contents, revision_id(7): dict(disks)}
    bad = anatomy.survey(copy.path, contents)
    assert anatomy.revisions_of(bad) <= {revision_id(7)}
    assert set(repository.damage()) == anatomy.revisions_of(bad)
    # The next backup builds on a revision that is whole, as the engine chooses it, or on none.
    record = faults.store(repository, 8, disks)
    contents[record.id] = dict(disks)
    assert anatomy.survey(copy.path, contents) <= bad
    if bad:
        copy.open().remove([revision_id(7)])
    copy.open().gc()
    left = {revision: contents[revision] for revision in {*listed, record.id}}
    if bad:
        del left[revision_id(7)]
    faults.check(copy.path, left)
    assert faults.strays(copy.path) == []
    return bad


class Photographer(Fs):
    """Keeps a copy of the repository as it is before each operation."""

    def __init__(self, path: Path, where: Path) -> None:
        self.path, self.where = path, where
        self.count = 0

    def call(self, name: str) -> None:
        shutil.copytree(self.path, self.where / str(self.count))
        self.count += 1


def test_a_copy_that_takes_as_long_as_a_backup(history: History) -> None:
    """Each directory of the copy is from another moment, in any order."""
    where = history.path.with_name("moments")
    where.mkdir()
    disks = faults.next_disks(history)
    camera = Photographer(history.path, where)
    before = History(history.path, dict(history.contents))
    faults.store(history.open(camera), 7, disks, history.newest)
    camera.call("the end")
    rng = random.Random(3)
    incomplete = 0
    for first in range(camera.count):
        for _ in range(3):
            moments = sorted((first, rng.randrange(camera.count)), reverse=bool(rng.randrange(2)))
            copy = History(where / "copy", {k: dict(v) for k, v in before.contents.items()})
            shutil.copytree(where / str(moments[0]), copy.path)
            shutil.rmtree(copy.path / "revisions")
            shutil.copytree(where / str(moments[1]) / "revisions", copy.path / "revisions")
            incomplete += bool(goes_on_after_a_forget(copy, disks))
            shutil.rmtree(copy.path)
    assert incomplete


@pytest.mark.parametrize("how", COMMANDS)
def test_a_copy_made_during_backups(history: History, how: str) -> None:
    """Revisions published before the copy began are in it, whole."""
    disks = [faults.next_disks(history, number) for number in range(1000, 1040)]

    def work(_: Fs) -> None:
        for number, content in enumerate(disks, start=7):
            faults.store(history.open(), number, content)

    child = Child(work)
    writer = threading.Thread(target=child.run)
    writer.start()
    copies: list[tuple[set[str], History]] = []
    while writer.is_alive():
        certain = {record.id for record in history.open().revisions()}
        copies.append((certain, copied(history, how, history.path.with_name(f"c{len(copies)}"))))
    writer.join()
    everything = dict(history.contents)
    everything |= {revision_id(n): dict(content) for n, content in enumerate(disks, start=7)}
    for certain, copy in copies:
        repository = copy.open()
        listed = {record.id for record in repository.revisions()}
        assert certain <= listed
        bad = anatomy.revisions_of(anatomy.survey(copy.path, everything))
        assert not bad & certain
        assert set(repository.damage()) == bad
        record = faults.store(copy.open(), 500, disks[0])
        assert faults.content(copy.open(), record) == disks[0]


def test_a_copy_brought_up_to_date(history: History) -> None:
    """rsync onto an older copy, after backups, removals and merges, gives the same repository."""
    require("rsync")
    where = history.path.with_name("copy")
    copied(history, "rsync", where)
    for number in range(7, 12):
        disks = faults.next_disks(history, number * 10)
        faults.store(history.open(), number, disks, history.newest)
        history.contents[revision_id(number)] = disks
        oldest = next(iter(history.contents))
        history.open().remove([oldest])
        del history.contents[oldest]
        history.open().gc()
    subprocess.run(["rsync", "-a", "--delete", f"{history.path}/", f"{where}/"], check=True)
    faults.check(where, history.contents)
    faults.goes_on(where, history.contents)


def test_a_copy_updated_without_deleting(history: History) -> None:
    """What was removed comes back, and nothing is wrong with it."""
    require("rsync")
    where = history.path.with_name("copy")
    everything = dict(history.contents)
    copied(history, "rsync", where)
    for n in (0, 2, 4):
        history.open().remove([revision_id(n)])
    assert history.open().gc().merged_files
    subprocess.run(["rsync", "-a", f"{history.path}/", f"{where}/"], check=True)
    faults.check(where, everything)
    faults.goes_on(where, everything)
    assert Repository.open(where).gc().merged_files == 0
