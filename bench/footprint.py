"""What a store takes on disk, and what an operation added to it."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_READ = 1 << 20
_SETTLE_S, _CALM_S = 5.0, 0.2


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes of files: their length, and the disk space they take."""

    apparent: int
    allocated: int


@dataclass(frozen=True, slots=True)
class _File:
    inode: int
    modified_ns: int
    apparent: int
    allocated: int


def _footprint(root: Path) -> dict[Path, _File]:
    return dict(_files(root))


def _files(root: Path) -> Iterator[tuple[Path, _File]]:
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                times = status.st_ino, status.st_mtime_ns
                yield path, _File(*times, status.st_size, status.st_blocks * 512)


class Growth(Protocol):
    """Watches a store from its making on."""

    def added(self) -> Stored:
        """What has been written since."""


class FileGrowth:
    """Growth by files below `root`.

    New and replaced files count whole, grown files by their growth, files rewritten in place
    whole. What was removed does not count.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._before = _footprint(root)

    def added(self) -> Stored:
        apparent = allocated = 0
        for path, now in _footprint(self._root).items():
            then = self._before.get(path)
            if then == now:
                continue
            grown = then and then.inode == now.inode and then.apparent < now.apparent
            base = then if then and grown else _File(0, 0, 0, 0)
            apparent += now.apparent - base.apparent
            allocated += max(0, now.allocated - base.allocated)
        return Stored(apparent, allocated)


class SpaceGrowth:
    """Growth by the space taken on a file system: the true figure where files share blocks.

    Waits first until the file system has freed what was removed before, which it does behind
    our back.
    """

    def __init__(self, mountpoint: Path) -> None:
        self._mountpoint = mountpoint
        self._before = _settled_bytes(mountpoint)

    def added(self) -> Stored:
        grown = _used_bytes(self._mountpoint) - self._before
        return Stored(grown, grown)


def _settled_bytes(mountpoint: Path) -> int:
    used, before = _used_bytes(mountpoint), -1
    deadline = time.monotonic() + _SETTLE_S
    while used != before and time.monotonic() < deadline:
        time.sleep(_CALM_S)
        used, before = _used_bytes(mountpoint), used
    return used


def _used_bytes(mountpoint: Path) -> int:
    status = os.statvfs(mountpoint)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def warm(*roots: Path) -> None:
    """Read every file below `roots`, so that what reads it next finds it in the page cache."""
    for root in roots:
        for path in [root] if root.is_file() else _footprint(root):
            with path.open("rb", buffering=0) as stream:
                while stream.read(_READ):
                    pass
