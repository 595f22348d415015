"""A program run to its end. Told to stop, it gets SIGTERM, then SIGKILL; then it is left alone.

It runs in a session of its own, so that a Ctrl-C meant for the scheduler does not reach it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import subprocess
from collections.abc import AsyncIterator, Sequence

import trio

from backyfs.engine.scheduling.world import Outcome

log = logging.getLogger(__name__)

TAIL_BYTES = 8192
"""How much of what a program says on stderr is kept: its end."""

GRACE_S = 30.0
"""How long it may take to end after SIGTERM, before SIGKILL."""

LEAVE_S = 5.0
"""How long after SIGKILL: one that waits for a device that does not answer never ends."""

LAST_WORDS_S = 1.0
"""How long stderr is read after it has ended: what it left behind may hold that open for ever."""


async def finished(argv: Sequence[str], given: bytes = b"") -> Outcome:
    """Run a program to its end; the last line it says on stderr is the reason. OSError."""
    tail = bytearray()
    stdin = subprocess.PIPE if given else subprocess.DEVNULL
    try:
        async with (
            _started(argv, stdin=stdin, stderr=subprocess.PIPE) as process,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(_feed, process, given)
            nursery.start_soon(_keep_tail, process, tail)
            code = await process.wait()
            nursery.cancel_scope.deadline = trio.current_time() + LAST_WORDS_S
    except BaseExceptionGroup as group:
        raise _first(group) from None
    return Outcome(code, _reason(bytes(tail)) if code >= 0 else _death(-code, bytes(tail)))


async def output(argv: Sequence[str]) -> bytes:
    """What a program writes to stdout, however it ends. OSError."""
    async with _started(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = b"".join([data async for data in process.stdout])
        await process.wait()
    return said


@contextlib.asynccontextmanager
async def _started(
    argv: Sequence[str],
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
    stderr: int = subprocess.DEVNULL,
) -> AsyncIterator[trio.Process]:
    """A running process that does not outlive the context, if that can be helped."""
    process = await trio.lowlevel.open_process(
        list(argv), stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True
    )
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            if not await _ends(process):
                values = {"pid": process.pid, "command": shlex.join(argv)}
                log.error("a command cannot be killed and is left alone", values)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    await trio.aclose_forcefully(pipe)


async def _feed(process: trio.Process, given: bytes) -> None:
    if process.stdin is not None:
        with contextlib.suppress(trio.BrokenResourceError):  # it need not read it
            await process.stdin.send_all(given)
        await process.stdin.aclose()


async def _keep_tail(process: trio.Process, tail: bytearray) -> None:
    """Read what the process says on stderr, and keep the end of it."""
    assert process.stderr is not None
    async for data in process.stderr:
        tail += data
        del tail[:-TAIL_BYTES]


async def _ends(process: trio.Process) -> bool:
    """Ask a process that still runs to stop; after a while, kill it with what it started."""
    for kill, number, patience_s in (
        (os.kill, signal.SIGTERM, GRACE_S),
        (os.killpg, signal.SIGKILL, LEAVE_S),
    ):
        if process.poll() is not None:
            return True
        with contextlib.suppress(OSError):
            kill(process.pid, number)
        with trio.move_on_after(patience_s):
            await process.wait()
    return process.poll() is not None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error in what a nursery raises, else one Cancelled: callers know both without a group."""
    found: BaseException = group.split(trio.Cancelled)[1] or group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def _reason(tail: bytes) -> str:
    """What a command said of its failure: its last line that is an error, without the program."""
    lines = [line for line in tail.decode("utf-8", "replace").splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("backyfs: ") and ": warning:" not in line]
    return (ours or lines or [""])[-1].removeprefix("backyfs: ").strip()[:500]


def _death(number: int, tail: bytes) -> str:
    """Which signal ended a command, and the last it said."""
    with contextlib.suppress(ValueError):
        said = _reason(tail)
        return f"killed by {signal.Signals(number).name}" + (f": {said}" if said else "")
    return f"killed by signal {number}"
