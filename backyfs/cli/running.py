"""Async library functions under a command: signals cancel them, then end the run.

Cancellation goes through trio's scopes, never as an exception thrown into whatever the main
thread happens to execute: so an interrupted backup leaves its own `with` blocks and removes what
it had not published. A second signal ends the process at once.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from backyfs.cli.failure import Interrupted

T = TypeVar("T")


def run(function: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
    """Run `await function(...)` to its end; Interrupted when a signal came before it."""

    async def main() -> T:
        return await _supervised(lambda: function(*args, **kwargs))

    return trio.run(main)


async def _supervised(call: Callable[[], Awaitable[T]]) -> T:
    received: list[int] = []
    results: list[T] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch, nursery.cancel_scope, received)
        results.append(await call())
        nursery.cancel_scope.cancel()
    if results:
        return results[0]  # finished before the signal could stop it: what is done is done
    raise Interrupted(received[0])


async def _watch(
    scope: trio.CancelScope,
    received: list[int],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for number in signals:
            received.append(number)
            scope.cancel()
            break
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
