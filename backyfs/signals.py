"""Signals that end a run, where their exceptions must not come: they wait for the end of a step.

A signal's handler raises between any two steps of the main thread. While a module is imported that
may be in a callback of the import system, where Python tells of it and goes on (the signal is
lost), or in a class that comes to be, where Python 3.11 makes another error of it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Within, SIGINT and SIGTERM wait (where their handlers raise, in the main thread).

    Only where no other thread takes them in its place: threads of Ceph's libraries do not.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
