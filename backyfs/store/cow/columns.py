"""The frame hashes of an image by group, each group proven by its level-1 hash.

Where the table's own hashes fail that proof they are computed again from the image: if level 1
confirms the result, only the table was hit, and the frames are proven along with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from backyfs.store.cow.blocks import frame_hashes
from backyfs.store.cow.table import Table, group_frames
from backyfs.store.digest import node

Stored = Callable[[int, int], list[bytes | None]]
"""Frames [first, end) as they are stored, None where one cannot be read."""

BATCH_FRAMES = 16
"""Frames read at a time where many are read: 1 MiB."""

_CACHED = 64  # groups: 2 MiB at most


def batches(first: int, end: int) -> Iterator[tuple[int, int]]:
    """Frames [first, end) in pieces worth one read."""
    for start in range(first, end, BATCH_FRAMES):
        yield start, min(start + BATCH_FRAMES, end)


class Columns:
    """Proven groups of frame hashes, a few of them cached. Safe from many threads."""

    def __init__(self, table: Table, stored: Stored) -> None:
        self._table, self._stored = table, stored
        self._cached: dict[int, bytes] = {}
        self._hopeless: set[int] = set()
        self._lock = threading.Lock()

    def get(self, group: int) -> bytes | None:
        """The hashes of a group; None when nothing proves them."""
        with self._lock:
            found = self._cached.get(group)
        if found is None:
            found = self._table.checked_column(group) or self._computed(group)
            if found is not None:
                self._keep(group, found)
        return found

    def _keep(self, group: int, column: bytes) -> None:
        with self._lock:
            while len(self._cached) >= _CACHED:
                del self._cached[next(iter(self._cached))]
            self._cached[group] = column

    def _computed(self, group: int) -> bytes | None:
        if group in self._hopeless:
            return None
        column = b"".join(
            frame_hashes(frame or b"\0")  # an unreadable frame proves nothing anyway
            for batch in batches(*group_frames(group, self._table.size))
            for frame in self._stored(*batch)
        )
        if node(column) == self._table.recorded(group):
            return column
        self._hopeless.add(group)
        return None
