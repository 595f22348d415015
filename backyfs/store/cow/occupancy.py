"""Blocks of raw images: how many there are, counting shared ones once, and who has them alone.

A row of revisions is looked at in order of `seq`. A block that two of them share is in all between
them, too, since each is cloned from the one before; so comparing neighbours is enough. (Where a
backup was built on an older revision, because the newest was damaged, blocks count twice.) Streams
over FIEMAP: memory does not grow with the images.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from backyfs.model import Extent
from backyfs.store.cow.fiemap import apart, placed
from backyfs.store.fs import open_file


def occupied(row: Sequence[Path]) -> int:
    """Bytes of the blocks of these files (oldest first), those of neighbours' counted once.

    A file that is gone counts nothing.
    """
    total = 0
    before: Path | None = None
    for path in row:
        total += sum(extent.length for extent in _own(path, before))
        before = path
    return total


def exclusive(path: Path, before: Path | None, after: Path | None) -> int:
    """Bytes of the blocks of `path` that neither neighbour has."""
    return sum(_common(_own(path, before), _own(path, after)))


def _own(path: Path, other: Path | None) -> Iterator[Extent]:
    """What `path` does not share with `other`, sorted. Nothing of a file that is gone."""
    with ExitStack() as opened:
        try:
            fd = _opened(path, opened)
        except FileNotFoundError:
            return
        size = os.fstat(fd).st_size
        try:
            other_fd = _opened(other, opened) if other is not None else None
        except FileNotFoundError:
            other_fd = None
        if other_fd is None:
            yield from (Extent(part.offset, part.length) for part in placed(fd, 0, size))
        else:
            yield from apart(fd, other_fd, size)


def _opened(path: Path, opened: ExitStack) -> int:
    fd = open_file(path)
    opened.callback(os.close, fd)
    return fd


def _common(some: Iterable[Extent], others: Iterable[Extent]) -> Iterator[int]:
    """Lengths of what is in both, each sorted and disjoint."""
    others = iter(others)
    other = next(others, None)
    for extent in some:
        while other is not None and other.offset < extent.end:
            length = min(extent.end, other.end) - max(extent.offset, other.offset)
            if length > 0:
                yield length
            if other.end > extent.end:
                break
            other = next(others, None)
