"""How long to wait after a backup that failed. Pure."""

from __future__ import annotations

BUSY = 75
"""Exit code of a command that found another writer at work: no failure, only too early."""

BUSY_WAIT_S = 120.0

_DOUBLINGS_MAX = 32


def wait_s(failures: int, first_s: float, longest_s: float) -> float:
    """Seconds until the next attempt after `failures` (>= 1) failed ones in a row.

    The first wait doubles with each further failure, up to the longest.
    """
    doubled = first_s * 2.0 ** min(max(failures, 1) - 1, _DOUBLINGS_MAX)
    return max(first_s, min(doubled, longest_s))
