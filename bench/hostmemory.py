"""Memory that a virtual machine has for certain, before something is measured that takes it.

A guest tells its host which pages are free (free page reporting, balloon), and gets them back one
by one, at the first touch: copying into such pages runs at a tenth of the usual speed. What is
measured first after memory became free would pay for all; so it is touched before.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import time
from pathlib import Path

from bench.command import Command, CommandFailed, run

_PROJECT = Path(__file__).parent.parent
_CHUNK = b"\1" * (1 << 20)
_SETTLING_S = 0.25
"""The kernel is not done with what the process gave back when that is gone: a command of 0.36 s
that began at once took 0.43 s."""


def touch(size: int) -> None:
    """Take `size` bytes of free memory (half of what is free at most), use it, give it back.

    In a process of its own: a peak of memory is inherited by what is started later. One that ends
    early, for a limit on memory that it cannot see, has touched what there was.
    """
    with contextlib.suppress(CommandFailed):
        run([Command((sys.executable, "-m", "bench.hostmemory", str(size)), cwd=_PROJECT)])
    time.sleep(_SETTLING_S)


def _touch(size: int) -> None:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = min(size, free // 2) // len(_CHUNK) * len(_CHUNK)
    if not size:
        return
    with mmap.mmap(-1, size) as memory:
        for _ in range(0, size, len(_CHUNK)):
            memory.write(_CHUNK)


if __name__ == "__main__":
    _touch(int(sys.argv[1]))
