"""Async library functions under a command: signals cancel them, then end the run.

Cancellation goes through trio's scopes, never as an exception thrown into whatever the main
thread happens to execute: so an interrupted backup leaves its own `with` blocks and removes what
it had not published. A second signal ends the process at once, unless it is SIGHUP.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

import trio

from backyfs import signals
from backyfs.allocator import keep_freed_blocks
from backyfs.cli import failure
from backyfs.cli.failure import Interrupted

T = TypeVar("T")


def run(function: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
    """Run `await function(...)` to its end; Interrupted when a signal came before it."""
    keep_freed_blocks()
    stopping = signals.ending()
    received = list(failure.dropped)
    results: list[T] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(_watch, nursery.cancel_scope, stopping, received)
            results.append(await function(*args, **kwargs))
            nursery.cancel_scope.cancel()

    with _noting(stopping, received):
        trio.run(main)
    if results:
        return results[0]  # finished before a signal could stop it: what is done is done
    raise Interrupted(received[0])


@contextlib.contextmanager
def _noting(stopping: Sequence[int], received: list[int]) -> Iterator[None]:
    """Outside of `_watch` a signal is only noted: nothing may be raised in trio's own code."""
    before = {n: signal.signal(n, lambda number, _: received.append(number)) for n in stopping}
    try:
        yield
    finally:
        for number, handler in before.items():
            hung_up = number == signal.SIGHUP and number in received
            signal.signal(number, signal.SIG_IGN if hung_up else handler)


async def _watch(
    scope: trio.CancelScope,
    stopping: Sequence[int],
    received: list[int],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(*stopping) as arriving:
        if received:
            scope.cancel()
        task_status.started()
        async for number in arriving:
            received.append(number)
            scope.cancel()
            break
    for number in stopping:  # shell and kernel both send SIGHUP: it does not end the cleaning up
        signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
