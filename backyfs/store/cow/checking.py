"""Reading an image from its medium to find bad frames, in the image or in its table."""

from __future__ import annotations

from collections.abc import Iterator

from backyfs.model import FRAME
from backyfs.store.cow.blocks import different, frame_hashes, runs
from backyfs.store.cow.columns import Columns, Stored, batches
from backyfs.store.cow.reflink import data_extents
from backyfs.store.cow.table import Table, group_frames, hash_at
from backyfs.store.digest import FAN_OUT, HASH, ZERO_HASH
from backyfs.store.fs import forget_pages


class Checker:
    """Compares what is stored with what is proven. Holes cost nothing; leaves no page cached."""

    def __init__(self, fd: int, table: Table, columns: Columns, stored: Stored) -> None:
        self._fd, self._table = fd, table
        self._columns, self._stored = columns, stored
        self._sound: set[int] = set()

    def bad(self, first: int, end: int) -> Iterator[int]:
        """Numbers of the bad frames in [first, end), ascending."""
        for group in range(first // FAN_OUT, -(-end // FAN_OUT)):
            start, stop = group_frames(group, self._table.size)
            yield from self._bad_of_group(group, max(first, start), min(end, stop))

    def _bad_of_group(self, group: int, first: int, end: int) -> list[int]:
        sound = self._has_sound_column(group)
        column = self._columns.get(group)
        if column is None:  # no frame of it can be trusted
            return list(range(first, end))
        bad = set() if sound else self._wrong_entries(group, column)
        base = group * FAN_OUT
        for start, stop in runs(self._to_read(column, base, first, end)):
            for low, high in batches(start, stop):
                bad.update(self._bad_of_batch(column, base, low, high))
        return sorted(number for number in bad if first <= number < end)

    def _has_sound_column(self, group: int) -> bool:
        """Whether the medium holds the right hashes; looks once, or until it does."""
        if group not in self._sound:
            first, end = group_frames(group, self._table.size)
            forget_pages(self._table.fd, hash_at(first), (end - first) * HASH)
            if self._table.checked_column(group) is not None:
                self._sound.add(group)
        return group in self._sound

    def _wrong_entries(self, group: int, proven: bytes) -> set[int]:
        try:
            wrong = different(self._table.column(group), proven)
        except (OSError, EOFError):
            return set(range(*group_frames(group, self._table.size)))
        return {group * FAN_OUT + number for number in wrong}

    def _to_read(self, column: bytes, base: int, first: int, end: int) -> list[int]:
        """Frames that should not be zero, or that are no holes."""
        found: set[int] = set()
        if column != bytes(len(column)):  # most groups of a sparse disk are nothing but zeros
            found.update(
                number
                for number in range(first, end)
                if not column.startswith(ZERO_HASH, (number - base) * HASH)
            )
        for extent in data_extents(self._fd, first * FRAME, min(end * FRAME, self._table.size)):
            found.update(range(extent.offset // FRAME, -(-extent.end // FRAME)))
        return sorted(found)

    def _bad_of_batch(self, column: bytes, base: int, first: int, end: int) -> list[int]:
        offset, length = first * FRAME, min(end * FRAME, self._table.size) - first * FRAME
        forget_pages(self._fd, offset, length)
        bad = []
        for number, data in enumerate(self._stored(first, end), first):
            at = (number - base) * HASH
            if data is None or frame_hashes(data) != column[at : at + HASH]:
                bad.append(number)
        forget_pages(self._fd, offset, length)
        return bad
