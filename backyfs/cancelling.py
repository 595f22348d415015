"""Work that takes long in one call stops when what it is for is cancelled.

The engine runs sources and stores in threads, which nothing can stop from outside. Whoever waits
for something, or has much to do in one go, calls `checkpoint` about once a second.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Check = Callable[[], None]


def _never() -> None:
    """Nobody cancels what was not started by the engine."""


_check: ContextVar[Check] = ContextVar("check", default=_never)


def checkpoint() -> None:
    """Raises what is to end the work, once that is cancelled: let it through."""
    _check.get()()


@contextlib.contextmanager
def checking(check: Check) -> Iterator[None]:
    """`check` is what `checkpoint` does while entered, here and in threads started from here."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)
