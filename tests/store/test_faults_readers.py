"""Purge, merge and healing under open images: readers in many threads never notice.

The writer is another process, as in life: the readers' descriptors and caches learn of nothing.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from backyfs.errors import Corrupt, NoRevision
from backyfs.model import FRAME
from backyfs.store.fs import Fs
from tests.store import faults
from tests.store.faults import Child, History, revision_id


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    faults.lower_limits(monkeypatch)


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with faults.scratch(tmp_path) as directory:
        yield faults.make_history(directory / "vm")


class Readers:
    """Threads that read open images at random places and compare; `problems` is what they met."""

    def __init__(self, history: History, revisions: list[str]) -> None:
        self.problems: list[str] = []
        self.reads = 0
        self._history, self._revisions = history, revisions
        self._repository = history.open()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(3)]

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Read until left, and once more everything after that."""
        with ExitStack() as stack:
            self._images = []
            for revision in self._revisions:
                record = self._repository.record(revision)
                for disk, expected in self._history.contents[revision].items():
                    image = self._repository.open_disk(record, disk)
                    stack.callback(image.close)
                    self._images.append((revision, disk, image, expected))
            for thread in self._threads:
                thread.start()
            try:
                yield
            finally:
                self._stop.set()
                for thread in self._threads:
                    thread.join()
            self._sweep()

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stop.is_set():
            revision, disk, image, expected = rng.choice(self._images)
            at = rng.randrange(len(expected))
            length = min(rng.choice((1, 4096, FRAME, 3 * FRAME)), len(expected) - at)
            try:
                if image.read(at, length) != expected[at : at + length]:
                    self.problems.append(f"{revision}/{disk}: wrong bytes at {at}+{length}")
            except Exception as exc:  # whatever it is, a reader must not meet it
                self.problems.append(f"{revision}/{disk} at {at}+{length}: {exc!r}")
            self.reads += 1

    def _sweep(self) -> None:
        for revision, disk, image, expected in self._images:
            if image.read(0, image.size) != expected:
                self.problems.append(f"{revision}/{disk}: wrong bytes in the end")


def changed(history: History, number: int) -> dict[str, bytes]:
    disks = faults.next_disks(history, number * 10)
    return {**disks, "data": faults.patched(disks["data"], 1, number)}


def churn(history: History, rounds: int, keep: set[str]) -> Child:
    """A child that makes backups, removes and merges; `history` is what will be then."""
    steps: list[tuple[int, faults.Disks, faults.Disks, list[str]]] = []
    for number in range(7, 7 + rounds):
        disks = changed(history, number)
        old = [r for r in history.contents if r not in keep][:-1]
        steps.append((number, disks, history.newest, old))
        for revision in old:
            del history.contents[revision]
        history.contents[revision_id(number)] = disks

    def work(fs: Fs) -> None:
        for number, disks, parent, old in steps:
            repository = history.open(fs)
            faults.store(repository, number, disks, parent)
            repository.remove(old)
            repository.gc()

    return Child(work)


def test_purge_and_merge(history: History) -> None:
    keep = {revision_id(n) for n in (0, 1, 6)}  # no other revision shares their maps
    readers = Readers(history, sorted(keep))
    child = churn(history, 25, keep)
    with readers.at_work():
        assert not child.run()
    assert readers.problems == []
    assert readers.reads > 100
    faults.check(history.path, history.contents)
    assert faults.strays(history.path) == []


def test_purge_and_merge_in_the_same_process(history: History) -> None:
    keep = {revision_id(n) for n in (2, 3, 4, 5)}
    readers = Readers(history, sorted(keep))
    repository = readers._repository
    with readers.at_work():
        for number in range(7, 25):
            disks = changed(history, number)
            faults.store(repository, number, disks, history.newest)
            history.contents[revision_id(number)] = disks
            old = [r for r in history.contents if r not in keep][:-1]
            repository.remove(old)
            for revision in old:
                del history.contents[revision]
            repository.gc()
    assert readers.problems == []
    faults.check(history.path, history.contents)


def test_punching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with faults.scratch(tmp_path) as directory:
        history = faults.make_holed(directory / "vm", monkeypatch)

        def collect(fs: Fs) -> None:
            monkeypatch.setattr("backyfs.store.space.free_bytes", lambda path: 0)
            report = history.open(fs).gc()
            assert report.freed_bytes > report.removed_files == report.merged_files == 0

        child = Child(collect)
        readers = Readers(history, sorted(history.contents))
        with readers.at_work():
            assert not child.run()
        assert readers.problems == []
        faults.check(history.path, history.contents)


def test_removing_what_is_open(history: History) -> None:
    repository = history.open()
    record = repository.record(revision_id(2))
    image = repository.open_disk(record, "root")
    removal = history.open().remove([revision_id(2), revision_id(3)])
    assert (removal.removed, removal.in_use) == ([revision_id(3)], [revision_id(2)])
    del history.contents[revision_id(3)]
    faults.check(history.path, history.contents)
    expected = history.contents[revision_id(2)]["root"]
    assert image.read(0, image.size) == expected

    # By force it goes; what the reader has open goes on as it was.
    assert history.open().remove([revision_id(2)], force=True).removed == [revision_id(2)]
    assert image.read(0, image.size) == expected
    del history.contents[revision_id(2)]
    faults.check(history.path, history.contents)
    history.open().gc()
    for frame_no in range(8):
        try:
            found = image.read(frame_no * FRAME, FRAME)
        except Corrupt:
            continue
        assert found == expected[frame_no * FRAME : (frame_no + 1) * FRAME]
    image.close()
    with pytest.raises(NoRevision):
        history.open().record(revision_id(2))
    faults.check(history.path, history.contents)
    history.open().gc()
    assert faults.strays(history.path) == []


def test_closing_gives_everything_back(history: History) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    repository = history.open()
    images = [
        repository.open_disk(record, disk)
        for record in repository.revisions()
        for disk in record.disks
    ]
    for image in images:
        image.read(0, image.size)
    for image in images:
        image.close()
        image.close()
    repository.structure(repository.revisions()[0])
    repository.gc()
    assert set(Path("/proc/self/fd").iterdir()) == before
    assert history.open().remove([revision_id(2)]).removed


def test_healing(history: History) -> None:
    """The same open image that met the damage reads well once a backup has healed it."""
    faults.damage(history, 2)
    reader = history.open()
    image = reader.open_disk(reader.record(revision_id(4)), "root")
    expected = history.contents[revision_id(4)]["root"]
    with pytest.raises(Corrupt) as caught:
        image.read(0, image.size)
    assert (caught.value.offset, caught.value.length) == (2 * FRAME, FRAME)
    assert image.read(0, 2 * FRAME) == expected[: 2 * FRAME]
    disks = {**history.newest, "root": history.contents[revision_id(5)]["root"]}
    disks["root"] = faults.patched(disks["root"], 0, 5)
    child = Child(lambda fs: faults.store(history.open(fs), 7, disks, {"data": disks["data"]}))
    untouched = Readers(history, [revision_id(0)])
    untouched._history = History(
        history.path, {revision_id(0): {"data": history.contents[revision_id(0)]["data"]}}
    )
    with untouched.at_work():
        assert not child.run()
    assert untouched.problems == []
    assert image.read(0, image.size) == expected
    image.close()
    assert reader.damage() == {}


def test_a_reader_that_comes_while_its_revision_is_removed(history: History) -> None:
    """It is seen by the remover, or sees that the revision is gone; it never has half of it."""
    outcome: list[object] = []
    record = history.open().record(revision_id(2))

    def read() -> None:
        try:
            outcome.append(history.open().open_disk(record, "root"))
        except NoRevision as exc:
            outcome.append(exc)

    class Interrupted(Fs):
        def call(self, name: str) -> None:
            if name == "unlink" and not threads:
                threads.append(threading.Thread(target=read))
                threads[0].start()
                threads[0].join(0.3)  # it has to wait for what we are about to do

    threads: list[threading.Thread] = []
    assert history.open(Interrupted()).remove([revision_id(2)]).removed == [revision_id(2)]
    threads[0].join()
    (found,) = outcome
    assert isinstance(found, NoRevision)


def test_a_map_of_another_revision_does_not_bring_one_back(history: History) -> None:
    """Revisions 4 and 5 name the same maps: removing one leaves the file, but not the revision."""
    repository = history.open()
    record = repository.record(revision_id(5))
    history.open().remove([revision_id(5)])
    with pytest.raises(NoRevision, match="just removed"):
        repository.open_disk(record, "root")
    repository.open_disk(repository.record(revision_id(4)), "root").close()


def test_what_was_removed_is_not_damaged(history: History) -> None:
    repository = history.open()
    record = repository.record(revision_id(2))
    history.open().remove([revision_id(2)])
    with pytest.raises(NoRevision):
        repository.open_disk(record, "root")
