"""Signals that end a run, and where their exceptions must not come: they wait for a step's end.

A signal's handler raises between any two steps of the main thread. While a module is imported that
may be in a callback of the import system, where Python tells of it and goes on (the signal is
lost), or in a class that comes to be, where Python 3.11 makes another error of it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


def ending() -> tuple[signal.Signals, ...]:
    """Those that end a run. SIGHUP (a terminal or an ssh connection that closes) is one of them
    unless whoever started us has it ignored, as nohup does.
    """
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *(() if ignored else (signal.SIGHUP,)))


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Within, signals that end a run wait (where their handlers raise, in the main thread).

    Only where no other thread takes them in its place: threads of Ceph's libraries do not.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ending())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_end() -> None:
    """The run is over, with nothing left to clean up: a signal that comes now ends the process."""
    for number in ending():
        signal.signal(number, signal.SIG_DFL)
