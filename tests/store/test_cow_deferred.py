"""What differs while the clone of a disk is made: it waits, and nothing of it is lost."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from backyfs.errors import NoSpace
from backyfs.model import FRAME, Extent
from backyfs.store.contract import DiskWriter
from backyfs.store.cow import deferred
from backyfs.store.fs import Fs
from backyfs.store.record import Record
from backyfs.store.repository import Repository
from backyfs.store.staging import Staging
from tests.store.contract import DRAFT, back_up, digest_of, frame, image_of, read_all, spoil

PATIENCE_S = 30
A_MOMENT_S = 0.2


class SlowClone(Fs):
    """Clones of images end when they are let go; then some fail."""

    def __init__(self) -> None:
        self.slow = False
        self.failures = 0
        self.cloned = threading.Event()
        self.go = threading.Event()

    def clone(self, source_fd: int, target_fd: int, path: object = "the store") -> None:
        super().clone(source_fd, target_fd, path)
        if self.slow and str(path).endswith(".img"):
            self.cloned.set()
            assert self.go.wait(PATIENCE_S)
            if self.failures:
                self.failures -= 1
                with self._guard("clone", path):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def fs() -> SlowClone:
    return SlowClone()


@pytest.fixture
def repository(reflink_dir: Path, fs: SlowClone) -> Repository:
    return Repository.create(reflink_dir / "vm", "cow", fs=fs)


class Cloning:
    """A disk in the making of which frame 0 differs, and whose clone a thread makes for it."""

    def __init__(self, fs: SlowClone, staging: Staging, writer: DiskWriter) -> None:
        self._fs, self._staging, self.writer = fs, staging, writer
        self._threads = ThreadPoolExecutor()
        fs.slow = True
        self.first = self.write(0, frame(100))
        assert fs.cloned.wait(PATIENCE_S)

    def write(self, offset: int, data: bytes) -> Future[int]:
        """Write in a thread of its own."""
        return self._threads.submit(self.writer.write, offset, data)

    def commit(self) -> Record:
        """Let the clone end, and publish when all threads are done."""
        self._fs.go.set()
        self._threads.shutdown()
        return self._staging.commit(DRAFT)

    def close(self) -> None:
        """Leave no thread behind."""
        self._fs.go.set()
        self._threads.shutdown()


@contextmanager
def cloning(repository: Repository, fs: SlowClone, parent: Record, size: int) -> Iterator[Cloning]:
    with (
        repository.writing() as intent,
        repository.begin(intent, parent) as staging,
        closing(Cloning(fs, staging, staging.disk("disk", size))) as made,
    ):
        yield made


def sound(repository: Repository, record: Record, content: bytes) -> bool:
    """Whether a revision reads well and holds just this."""
    with closing(repository.open_disk(record, "disk")) as image:
        bad = image.check(0, -(-image.size // FRAME))
    assert record.disks["disk"].digest == digest_of(content)
    return not bad and read_all(repository, record) == content


def test_others_go_on(repository: Repository, fs: SlowClone) -> None:
    content = image_of(2, 4, 6, 8, 10)
    parent = back_up(repository, content).record
    with cloning(repository, fs, parent, len(content)) as made:
        assert made.writer.write(FRAME, frame(4)) == 0
        assert made.writer.write(2 * FRAME, frame(102)) == FRAME
        assert made.writer.zero(3 * FRAME, FRAME) == FRAME
        assert not made.first.done()
        record = made.commit()
        assert made.first.result() == FRAME
        assert made.writer.size == len(content)
    assert sound(repository, record, image_of(100, 4, 102, 0, 10))
    assert sound(repository, parent, content)


def test_no_more_waits_than_memory_is_meant_for(
    repository: Repository, fs: SlowClone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred, "HELD_MAX", 2 * FRAME)
    content = image_of(2, 4, 6, 8, 10)
    parent = back_up(repository, content).record
    with cloning(repository, fs, parent, len(content)) as made:
        made.write(FRAME, frame(102)).result(PATIENCE_S)
        made.write(2 * FRAME, frame(104)).result(PATIENCE_S)
        beyond = made.write(3 * FRAME, frame(106))
        with pytest.raises(TimeoutError):
            beyond.result(A_MOMENT_S)
        assert made.write(4 * FRAME, frame(10)).result(PATIENCE_S) == 0  # equal: nothing to hold
        record = made.commit()
        assert beyond.result() == FRAME
    assert sound(repository, record, image_of(100, 102, 104, 106, 10))


def test_a_clone_that_fails(repository: Repository, fs: SlowClone) -> None:
    content = image_of(2, 4)
    parent = back_up(repository, content).record
    fs.failures = 1
    with pytest.raises(NoSpace), cloning(repository, fs, parent, len(content)) as made:
        assert made.writer.write(FRAME, frame(102)) == FRAME
        fs.go.set()
        failure = made.first.exception(PATIENCE_S)
        with pytest.raises(NoSpace) as caught:
            made.writer.write(0, frame(100))
        assert caught.value is failure
        raise caught.value
    assert repository.revisions() == [parent]
    assert sound(
        repository, back_up(repository, image_of(100, 102), parent).record, image_of(100, 102)
    )


def test_an_action_that_fails_later(
    repository: Repository, fs: SlowClone, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = image_of(2, 4)
    parent = back_up(repository, content).record
    with cloning(repository, fs, parent, len(content)) as made:
        assert made.writer.write(FRAME, frame(102)) == FRAME
        monkeypatch.setattr(fs, "call", _full)
        fs.go.set()
        with pytest.raises(NoSpace):
            made.first.result(PATIENCE_S)
        monkeypatch.undo()


def _full(name: str) -> None:
    if name == "pwrite":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_frame_that_is_healed_meanwhile_is_stored_again(
    repository: Repository, fs: SlowClone
) -> None:
    """The clone has the bytes from before: that the parent is sound now says nothing of it."""
    content = image_of(2, 4, 6)
    parent = back_up(repository, content).record
    spoil(repository, parent, 1)
    with closing(repository.open_disk(parent, "disk")) as image:
        assert image.check(0, 3) == [1]
    with cloning(repository, fs, parent, len(content)) as made:
        assert made.writer.required() == [Extent(FRAME, FRAME)]
        made.writer.write(FRAME, frame(4))
        record = made.commit()
    assert sound(repository, record, image_of(100, 4, 6))
    assert sound(repository, parent, content)
    assert repository.damage() == {}


def test_sick_frames_among_zeros(repository: Repository, fs: SlowClone) -> None:
    content = image_of(2, 4, 6, 8, 0)
    parent = back_up(repository, content).record
    spoil(repository, parent, 2)
    with closing(repository.open_disk(parent, "disk")) as image:
        assert image.check(0, 4) == [2]
    with cloning(repository, fs, parent, len(content)) as made:
        assert made.writer.zero(FRAME, 4 * FRAME) == 3 * FRAME
        record = made.commit()
    assert sound(repository, record, image_of(100, 0, 0, 0, 0))


def test_many_threads(reflink_dir: Path) -> None:
    """Nothing is lost, whoever comes when."""
    repository = Repository.create(reflink_dir / "vm", "cow")
    chance, content = random.Random(7), list(range(2, 130, 2))
    parent = back_up(repository, image_of(*content)).record
    for turn in range(6):
        changed = [seed if chance.random() < 0.5 else seed + 1000 for seed in content]
        with (
            ThreadPoolExecutor(8) as threads,
            repository.writing() as intent,
            repository.begin(intent, parent) as staging,
        ):
            writer = staging.disk("disk", len(content) * FRAME)
            order = chance.sample(range(len(changed)), len(changed))
            frames = [frame(changed[number]) for number in order]
            taken = list(threads.map(writer.write, [n * FRAME for n in order], frames))
            assert sum(taken) == FRAME * sum(map(int.__ne__, changed, content)), turn
            parent = staging.commit(DRAFT)
        assert sound(repository, parent, image_of(*changed))
        content = [seed % 1000 for seed in changed]
        parent = back_up(repository, image_of(*content), parent).record
