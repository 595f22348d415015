"""How many files the process may have open at once.

A disk may lie in as many packs as there are revisions, and most shells and services start with a
limit of 1024 (the soft one, which every process may raise up to the hard one).
"""

from __future__ import annotations

import contextlib
import resource

COMMAND = 1 << 16
"""What a command takes. It ends soon; a server takes all it may have."""


def allow(most: int | None = None) -> None:
    """Raise the limit to `most` (None: to any number), as far as we may; never lower it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min((count for count in (most, _number(hard)) if count is not None), default=None)
    if _number(soft) is None or (wanted is not None and soft >= wanted):
        return
    with contextlib.suppress(OSError, ValueError):
        limit = resource.RLIM_INFINITY if wanted is None else wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _number(limit: int) -> int | None:
    """A limit, None where there is none."""
    return None if limit == resource.RLIM_INFINITY else limit
