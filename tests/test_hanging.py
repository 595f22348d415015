"""Threads that hang keep nobody else waiting, and no process from its end."""

from __future__ import annotations

import subprocess
import sys
import threading

import trio
import trio.testing

from backyfs.hanging import Threads

PATIENCE_S = 60.0


async def test_those_that_hang_make_room_for_others() -> None:
    threads, released = Threads(2), threading.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(threads.make_room)
        for _ in range(2):
            nursery.start_soon(threads.run, released.wait, PATIENCE_S)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(PATIENCE_S / 2):
            assert await threads.run(divmod, 7, 2) == (3, 1)
        released.set()
        nursery.cancel_scope.cancel()


def test_a_process_whose_thread_hangs_ends() -> None:
    program = (
        "import threading; from backyfs import hanging; hanging.END_S = 0.01\n"
        "hanging.end_in_time(lambda: print('cleaned up', flush=True)); threading.Lock().acquire()\n"
        "threading.Event().wait()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stdout) == (1, "cleaned up\n")
