"""Waiting for the writer's lock of a repository in a way that can be cancelled."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager

import trio

from backyfs.engine.pipeline import leaving
from backyfs.errors import Busy
from backyfs.store.lock import Intent
from backyfs.store.repository import Repository

POLL_S = 0.2
"""How often a waiting writer tries again."""


@asynccontextmanager
async def writing(repository: Repository, wait_s: float = 0.0) -> AsyncIterator[Intent]:
    """Hold the writer's lock. Busy when it cannot be had within `wait_s` seconds."""
    manager, intent = await _entered(repository, wait_s)
    async with leaving(manager):
        yield intent


async def _entered(
    repository: Repository, wait_s: float
) -> tuple[AbstractContextManager[Intent], Intent]:
    deadline = trio.current_time() + wait_s
    while True:
        manager = repository.writing()
        try:
            return manager, await trio.to_thread.run_sync(manager.__enter__)
        except Busy:
            left = deadline - trio.current_time()
            if left <= 0:
                raise
        await trio.sleep(min(POLL_S, left))
