"""What librados and librbd raise, as one line that names the image and says what to do.

Each exception of the binding carries an errno; the same number means different things at
different calls, so the caller says what it was doing.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

from backyfs.errors import BackyfsError, NoSpace

_HINTS = {
    errno.EPERM: "see the client's caps: ceph auth get client.ID (it needs `profile rbd`)",
    errno.EACCES: "see the client's key and caps: ceph auth get client.ID",
    errno.ETIMEDOUT: "see `ceph status`; the waits are set by connect-, monitor- and osd-timeout",
    errno.EROFS: "its client may hang: see `rbd status` and `rbd lock list`",
    errno.EBUSY: "see who uses it: rbd status",
    errno.ESHUTDOWN: "the client was blocked: see `ceph osd blocklist ls`",
}

_WORDS = {
    errno.ETIMEDOUT: "the cluster did not answer in time",
    # What librbd says when the holder of the exclusive lock does not answer (facts of 16.2).
    errno.EROFS: "the client that holds its lock did not answer in time",
    errno.ESHUTDOWN: "the cluster has cut this client off",
}


@contextlib.contextmanager
def explained(what: str, kind: type[BackyfsError]) -> Iterator[None]:
    """Raise what librados and librbd raise in here as `kind`: "cannot WHAT: why".

    NoSpace, whatever `kind`, when the cluster or a quota of it is full.
    """
    import rados
    import rbd

    try:
        yield
    except (rados.Error, rbd.Error) as exc:
        raise failure(what, kind, exc) from exc


def failure(what: str, kind: type[BackyfsError], exc: Exception) -> BackyfsError:
    """The error of `kind` for an exception of the binding."""
    number = number_of(exc)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"cannot {what}: no space left in the cluster", hint="see: ceph df")
    return kind(f"cannot {what}: {_words(exc, number)}", hint=_HINTS.get(number, ""))


def number_of(exc: Exception) -> int:
    """The errno an exception of the binding carries; 0 = none."""
    number: Any = getattr(exc, "errno", 0)
    return abs(number) if isinstance(number, int) else 0


def timed_out(error: BaseException) -> bool:
    """Whether an error was made of the cluster not answering in time."""
    cause = error.__cause__
    return isinstance(cause, Exception) and number_of(cause) in (errno.ETIMEDOUT, errno.EROFS)


def _words(exc: Exception, number: int) -> str:
    import os

    if number in _WORDS:
        return _WORDS[number]
    return os.strerror(number) if number else str(exc) or type(exc).__name__
