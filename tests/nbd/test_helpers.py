"""Helpers: each task is done once, whoever comes; the owner never waits for who has not begun."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from backyfs.nbd.helpers import Helpers, Job

END_S = 30


class Task:
    """Counts how often it was done; may wait for a word."""

    def __init__(self, wait: threading.Event | None = None) -> None:
        self.times = 0
        self.begun = threading.Event()
        self._wait = wait

    def __call__(self) -> None:
        self.begun.set()
        if self._wait is not None:
            assert self._wait.wait(END_S)
        self.times += 1


@pytest.fixture
def helpers() -> Iterator[Helpers]:
    found = Helpers(3)
    threads = [threading.Thread(target=found.run) for _ in range(found.count)]
    for thread in threads:
        thread.start()
    yield found
    found.stop()
    for thread in threads:
        thread.join(END_S)
        assert not thread.is_alive()


def test_each_task_is_done_once(helpers: Helpers) -> None:
    for count in (0, 1, 2, 50, 500):
        tasks = [Task() for _ in range(count)]
        job = Job(tasks)
        helpers.offer(job, count, waiting=True)
        assert sorted(map(id, job.done())) == sorted(map(id, tasks))
        assert all(task.times == 1 for task in tasks)
        assert job.over


def test_the_owner_does_it_alone_when_nobody_helps() -> None:
    idle = Helpers(2)  # nobody runs them
    tasks = [Task() for _ in range(5)]
    job = Job(tasks)
    idle.offer(job, 5)
    assert list(job.done()) == tasks


def test_a_helper_that_comes_too_late_does_nothing(helpers: Helpers) -> None:
    tasks = [Task() for _ in range(3)]
    job = Job(tasks)
    list(job.done())
    helpers.offer(job, 3)
    job.help()
    assert [task.times for task in tasks] == [1, 1, 1]


def test_dropping_waits_for_what_has_begun_and_forgets_the_rest(helpers: Helpers) -> None:
    word = threading.Event()
    tasks = [Task(word) for _ in range(20)]
    job = Job(tasks)
    helpers.offer(job, 1)
    assert tasks[0].begun.wait(END_S)
    assert [job.over] == [False]
    dropped = threading.Event()

    def drop() -> None:
        job.drop()
        dropped.set()

    dropping = threading.Thread(target=drop)
    dropping.start()
    early = dropped.is_set()
    word.set()
    dropping.join(END_S)
    assert (early, dropped.is_set()) == (False, True)
    assert job.over
    assert tasks[0].times == 1
    assert tasks[-1].times == 0
