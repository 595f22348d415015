"""Jobs on threads: bounded, cancellable, with plain errors."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import trio

from backyfs.cancelling import checkpoint
from backyfs.engine.pipeline import Job, asked, in_thread, run_jobs
from backyfs.errors import Corrupt, SourceUnavailable


async def test_every_job_runs_once_and_results_arrive() -> None:
    results: list[int] = []
    await run_jobs((partial(pow, n, 2) for n in range(100)), results.append, threads=3)
    assert sorted(results) == [n * n for n in range(100)]


async def test_no_jobs_is_no_work() -> None:
    await run_jobs(iter(()), lambda result: pytest.fail("no job, no result"))


async def test_a_result_of_none_is_a_result() -> None:
    results: list[None] = []
    jobs: list[Job[None]] = [lambda: None] * 3
    await run_jobs(iter(jobs), results.append)
    assert len(results) == 3


async def test_threads_are_bounded_and_jobs_taken_one_at_a_time() -> None:
    running = peak = taking = 0
    lock = threading.Lock()

    def job() -> None:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        time.sleep(0.002)
        with lock:
            running -= 1

    def jobs() -> Iterator[Job[None]]:
        nonlocal taking
        for _ in range(30):
            taking += 1
            assert taking == 1
            taking -= 1
            yield job

    await run_jobs(jobs(), lambda _: None, threads=3)
    assert peak <= 3


async def test_the_first_error_comes_out_bare_and_stops_the_rest() -> None:
    done: list[int] = []

    def fail() -> int:
        raise SourceUnavailable("gone")

    def jobs() -> Iterator[Job[int]]:
        yield lambda: 1
        yield fail
        for n in range(100_000):
            yield partial(int, n)

    with pytest.raises(SourceUnavailable, match="gone"):
        await run_jobs(jobs(), done.append, threads=2)
    assert len(done) < 100_000


async def test_an_error_of_the_job_list_comes_out_bare() -> None:
    def jobs() -> Iterator[Job[int]]:
        yield lambda: 1
        raise Corrupt("the list")

    with pytest.raises(Corrupt, match="the list"):
        await run_jobs(jobs(), lambda _: None)


async def test_an_error_of_the_consumer_comes_out_bare() -> None:
    def consume(result: int) -> None:
        raise ValueError(result)

    with pytest.raises(ValueError, match="7"):
        await run_jobs(iter([lambda: 7]), consume)


async def test_what_was_done_before_an_error_arrives() -> None:
    done: list[int] = []

    def fail() -> int:
        raise SourceUnavailable("gone")

    with pytest.raises(SourceUnavailable):
        await run_jobs(iter([lambda: 1, lambda: 2, fail]), done.append, threads=1)
    assert done == [1, 2]


async def test_what_was_done_before_a_cancellation_arrives() -> None:
    done: list[int] = []
    reached = trio.Event()

    def wait() -> int:
        trio.from_thread.run_sync(reached.set)
        while True:
            time.sleep(0.01)
            checkpoint()

    async with trio.open_nursery() as nursery:
        jobs: list[Job[int]] = [lambda: 1, lambda: 2, wait]
        nursery.start_soon(partial(run_jobs, iter(jobs), done.append, threads=1))
        await reached.wait()
        nursery.cancel_scope.cancel()
    assert done == [1, 2]


async def test_results_arrive_while_jobs_go_on() -> None:
    first = threading.Event()

    def jobs() -> Iterator[Job[None]]:
        yield lambda: None
        while not first.is_set():
            yield partial(time.sleep, 0.001)

    with trio.fail_after(30):
        await run_jobs(jobs(), lambda _: first.set(), threads=2)


async def test_cancelling_starts_no_more_jobs() -> None:
    started = 0

    def jobs() -> Iterator[Job[None]]:
        nonlocal started
        while True:
            started += 1
            yield partial(time.sleep, 0.005)

    with trio.move_on_after(0.05) as scope:
        await run_jobs(jobs(), lambda _: None, threads=2)
    assert scope.cancelled_caught
    before = started
    await trio.sleep(0.02)
    assert started == before


async def test_a_long_job_is_cancelled_at_a_checkpoint() -> None:
    def work() -> None:
        for _ in range(10_000):
            time.sleep(0.01)
            checkpoint()
        raise AssertionError("it never gets that far")

    with trio.move_on_after(0.1) as scope:
        await run_jobs(iter([work, work]), lambda _: None, threads=2)
    assert scope.cancelled_caught


async def test_a_context_is_left_in_spite_of_cancellation() -> None:
    events = []

    @contextlib.contextmanager
    def manager() -> Iterator[int]:
        events.append("enter")
        try:
            yield 1
        except BaseException as exc:
            events.append(type(exc).__name__)
            raise
        finally:
            events.append("leave")

    with trio.CancelScope() as scope:
        async with in_thread(manager()) as value:
            assert value == 1
            scope.cancel()
            await trio.sleep_forever()
    assert events == ["enter", "Cancelled", "leave"]


async def test_entering_a_context_is_cancelled_at_a_checkpoint() -> None:
    events = []

    @contextlib.contextmanager
    def manager() -> Iterator[None]:
        try:
            for _ in range(10_000):
                time.sleep(0.01)
                checkpoint()
            yield
        finally:
            events.append("tidied up")

    with trio.move_on_after(0.1) as scope:
        async with in_thread(manager()):
            raise AssertionError("it never gets that far")
    assert scope.cancelled_caught
    assert events == ["tidied up"]


async def test_a_question_is_cancelled_at_a_checkpoint() -> None:
    def wait(rounds: int) -> int:
        for _ in range(rounds):
            time.sleep(0.01)
            checkpoint()
        return rounds

    assert await asked(wait, 2) == 2
    with trio.move_on_after(0.1) as scope:
        await asked(wait, 10_000)
    assert scope.cancelled_caught


def test_nobody_cancels_what_the_engine_did_not_start() -> None:
    checkpoint()


async def test_a_context_may_swallow_an_error() -> None:
    async with in_thread(contextlib.suppress(ValueError)):
        raise ValueError("swallowed")


async def test_the_value_of_a_context_without_error() -> None:
    async with in_thread(contextlib.nullcontext(5)) as value:
        assert value == 5
