"""Slots: the most urgent one first, none lost by cancelling, limits that change."""

from __future__ import annotations

import random

import trio
import trio.testing

from backyfs.engine.scheduling.pools import Pool


async def test_the_earliest_deadline_comes_first(autojump_clock: trio.testing.MockClock) -> None:
    pool, order = Pool("fast", 1), []

    async def work(deadline: float) -> None:
        async with pool.slot(deadline):
            order.append(deadline)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(work, 0)
        await trio.sleep(0.1)
        for deadline in (5, 3, 9, 1):
            nursery.start_soon(work, deadline)
        await trio.sleep(0.1)
        assert (pool.running, pool.waiting) == (1, 4)
    assert order == [0, 1, 3, 5, 9]
    assert (pool.running, pool.waiting) == (0, 0)


async def test_no_slot_is_lost_or_given_twice(autojump_clock: trio.testing.MockClock) -> None:
    rng = random.Random(3)
    pool, running, most = Pool("slow", 3), 0, 0

    async def work() -> None:
        nonlocal running, most
        with trio.move_on_after(rng.uniform(0, 5)):
            async with pool.slot(rng.uniform(0, 100)):
                running += 1
                most = max(most, running)
                try:
                    await trio.sleep(rng.uniform(0, 3))
                finally:
                    running -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(500):
            nursery.start_soon(work)
            await trio.sleep(rng.uniform(0, 0.2))
    assert most == 3
    assert (pool.running, pool.waiting) == (0, 0)


async def test_a_slot_given_and_cancelled_at_once_is_free_again() -> None:
    pool = Pool("fast", 1)
    await pool.take(0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.take, 1)
        await trio.testing.wait_all_tasks_blocked()
        pool.give()
        nursery.cancel_scope.cancel()
    assert pool.running in (0, 1)
    if pool.running:  # it was quick enough to keep it
        pool.give()
    with trio.fail_after(1):
        await pool.take(2)


async def test_the_limit_can_change(autojump_clock: trio.testing.MockClock) -> None:
    pool = Pool("fast", 1)
    done = []

    async def work(n: int) -> None:
        async with pool.slot(n):
            await trio.sleep(10)
            done.append((n, trio.current_time()))

    async with trio.open_nursery() as nursery:
        for n in range(4):
            nursery.start_soon(work, n)
        await trio.sleep(1)
        pool.resize(4)
    assert [round(at) for _, at in done] == [10, 11, 11, 11]
