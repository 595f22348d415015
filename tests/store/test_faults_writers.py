"""One writer at a time: the second is told at once, by whom; readers and tags never wait."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from backyfs.errors import Busy
from backyfs.store.fs import Fs
from backyfs.store.repository import Repository
from tests.cli.program import refused
from tests.store import faults
from tests.store.faults import Child, History, revision_id

AT_ONCE_S = 20.0


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    faults.lower_limits(monkeypatch)


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with faults.scratch(tmp_path) as directory:
        yield faults.make_history(directory / "vm")


class Halted(Fs):
    """Stops at an operation until a byte arrives, and says so with one."""

    def __init__(self, name: str, said: int, heard: int) -> None:
        self._name, self._said, self._heard = name, said, heard

    def call(self, name: str) -> None:
        if name == self._name:
            self._name = ""
            os.write(self._said, b"!")
            os.read(self._heard, 1)


@contextmanager
def halted_writer(history: History, where: str) -> Iterator[tuple[int, Callable[[], None]]]:
    """A process in the middle of a backup; yields its pid and what lets it go on to its end."""
    said, says = os.pipe()
    heard, tells = os.pipe()
    disks = faults.next_disks(history)

    def work(_: Fs) -> None:
        faults.store(history.open(Halted(where, says, heard)), 7, disks, history.newest)

    child = Child(work)
    finished = threading.Thread(target=child.run)
    finished.start()

    def go_on() -> None:
        os.write(tells, b"!")
        finished.join()

    assert os.read(said, 1) == b"!"
    try:
        yield child.pid, go_on
    finally:
        if finished.is_alive():
            go_on()
        for fd in (said, says, heard, tells):
            os.close(fd)
    history.contents[revision_id(7)] = disks


WRITERS: dict[str, Callable[[Repository], object]] = {
    "backup": lambda repository: faults.store(repository, 8, {"root": b"x"}),
    "removal": lambda repository: repository.remove([revision_id(0)]),
    "gc": lambda repository: repository.gc(),
}


@pytest.mark.parametrize("second", WRITERS)
@pytest.mark.parametrize("where", ["write", "rename"])
def test_a_second_writer_is_told_at_once(history: History, second: str, where: str) -> None:
    with halted_writer(history, where) as (pid, _):
        started = time.monotonic()
        with pytest.raises(Busy) as caught:
            WRITERS[second](history.open())
        assert time.monotonic() - started < AT_ONCE_S
        assert caught.value.exit_code == 75
        assert f"process {pid} on {socket.gethostname()} since 2" in caught.value.message
        assert caught.value.hint
    faults.check(history.path, history.contents)
    assert faults.strays(history.path) == []


def test_the_program_says_so(history: History, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * 100_000)
    (history.path / "config").write_text(f"source:\n  type: file\n  filename: {image}\n")
    with halted_writer(history, "fsync") as (pid, _):
        for command in (["backup"], ["gc"], ["forget", "-y", "-r", revision_id(0)]):
            started = time.monotonic()
            line = refused("-b", history.path, *command, code=75)
            assert time.monotonic() - started < AT_ONCE_S
            assert f"process {pid}" in line
    faults.check(history.path, history.contents)


def test_readers_tags_and_damage_reports_never_wait(history: History) -> None:
    with halted_writer(history, "fsync"):
        started = time.monotonic()
        repository = history.open()
        for record in repository.revisions():
            assert faults.content(repository, record) == history.contents[record.id]
        repository.update_state(revision_id(1), lambda state: replace(state, tags=("kept",)))
        assert repository.damage() == {}
        assert revision_id(7) not in {record.id for record in repository.revisions()}
        assert time.monotonic() - started < AT_ONCE_S
    assert repository.state(repository.record(revision_id(1))).tags == ("kept",)
    faults.check(history.path, history.contents)


def test_a_patient_writer_gets_its_turn(history: History) -> None:
    with halted_writer(history, "rename") as (_, go_on):
        done: list[str] = []

        def wait() -> None:
            with history.open().writing(wait_s=20):
                done.append("ours")

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.1)
        assert not done
        go_on()
        waiting.join()
        assert done == ["ours"]
    faults.check(history.path, history.contents)


def test_patience_ends(history: History) -> None:
    with halted_writer(history, "rename"):
        started = time.monotonic()
        with pytest.raises(Busy), history.open().writing(wait_s=0.3):
            raise AssertionError
        assert 0.25 < time.monotonic() - started < AT_ONCE_S


def test_gc_gives_the_lock_up_between_steps(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backup that waits gets in while a long collection is under way."""
    for seed in range(9):
        history.add({"root": faults.patched(history.newest["root"], 1, seed)})
    monkeypatch.setattr("backyfs.store.packs.gc.SEGMENT_BYTES_MAX", 4000)
    monkeypatch.setattr("backyfs.store.packs.gc.FILES_BASE", 2)
    entered = 0
    writing = Repository.writing

    @contextmanager
    def counted(repository: Repository, wait_s: float = 0.0) -> Iterator[object]:
        nonlocal entered
        with writing(repository, wait_s) as intent:
            entered += 1
            yield intent

    monkeypatch.setattr(Repository, "writing", counted)
    assert history.open().gc().written_files == entered - 1 > 1
    faults.check(history.path, history.contents)


def test_the_lock_of_a_dead_writer_is_free(history: History) -> None:
    assert faults.killed(
        lambda fs: faults.store(history.open(fs), 7, faults.next_disks(history)), 8
    )
    with history.open().writing():
        pass
    faults.check(history.path, history.contents)
    assert faults.strays(history.path) == []
