"""Free space: a backup neither starts nor goes on into a file system that is nearly full."""

from __future__ import annotations

import os
from pathlib import Path

from backyfs.errors import NoSpace

RESERVE_BYTES_MAX = 1 << 30
RESERVE_SHARE = 0.02


def free_bytes(path: Path) -> int:
    """Bytes an ordinary write may still take on the file system of `path`."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def reserve_bytes(path: Path) -> int:
    """What is kept free: 2 % of the file system, 1 GiB at most."""
    status = os.statvfs(path)
    return min(RESERVE_BYTES_MAX, int(status.f_blocks * status.f_frsize * RESERVE_SHARE))


def ensure(path: Path, need: int) -> None:
    """Raise NoSpace unless `need` bytes and the reserve are free."""
    free, reserve = free_bytes(path), reserve_bytes(path)
    if free < need + reserve:
        raise NoSpace(
            f"{path}: {_in_words(free)} free, {_in_words(need + reserve)} needed"
            f" (a reserve of {_in_words(reserve)} included)",
            hint="free space, or run: backyfs purge",
        )


def _in_words(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"
