"""Rewriting pack files: segments of old packs, with their numbers and hashes, into a new one.

Used by gc (dead frames are left out) and by healing (a good frame replaces a bad one). Compressed
frames are copied as they are. The new file is published before an old one is unlinked, so a crash
leaves at worst both, which hold the same frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from backyfs.errors import Corrupt
from backyfs.store.digest import HASH
from backyfs.store.format import Place
from backyfs.store.fs import is_medium_error
from backyfs.store.packs import codec
from backyfs.store.packs.packfile import Segment
from backyfs.store.packs.segment import PackWriter
from backyfs.store.packs.table import ENTRY, NO_BASE, Entry, SegmentTable


class Replacement(NamedTuple):
    """A frame to store in place of a segment's present one; always a full (plain) frame."""

    stored: bytes
    hash: bytes


Keep = Callable[[Segment, int], bool]
Replacements = dict[tuple[str, int], Replacement]


class Rewriter:
    """Writes one new pack file from segments of existing ones."""

    def __init__(self, place: Place, target: Path) -> None:
        self._pack = PackWriter(target, place.uuid, place.fs)
        self._tables: list[SegmentTable] = []
        self._names: list[str] = []
        self._indices: dict[str, int] = {}

    def write(self, segments: Sequence[Segment], keep: Keep, replacements: Replacements) -> None:
        """Copy all segments and publish the file; its directory is the caller's to sync.

        Corrupt, with nothing published, where stored bytes cannot be read: the medium may give them
        another time, and a copy would be without them for good.
        """
        try:
            for segment in segments:
                self._index(segment.name)
            for segment in segments:
                self._copy(segment, keep, replacements)
            self._pack.publish(self._tables, self._names)
        except BaseException:
            self._pack.abandon()
            raise

    def _index(self, name: str) -> int:
        index = self._indices.get(name)
        if index is None:
            index = self._indices[name] = len(self._names)
            self._names.append(name)
        return index

    def _copy(self, segment: Segment, keep: Keep, replacements: Replacements) -> None:
        table = SegmentTable(segment.name, self._names, carried_root=segment.root)
        table.hashes += segment.hashes(0, segment.count)
        for number, entry in enumerate(segment.all_entries()):
            new = replacements.get((segment.name, number))
            if new is not None:
                table.hashes[number * HASH : (number + 1) * HASH] = new.hash
                table.entries += self._add(table, new.stored, codec.ZSTD, 0, NO_BASE, 0)
            elif entry[2] == codec.DEAD or not keep(segment, number):
                table.entries += ENTRY.pack(0, 0, codec.DEAD, 0, 0, NO_BASE, 0, 0)
            else:
                table.entries += self._carry(table, segment, entry)
        self._tables.append(table)

    def _carry(self, table: SegmentTable, segment: Segment, entry: Entry) -> bytes:
        offset, size, kind, depth, _, base, _, number = entry
        # An entry too damaged to say where its bytes are, or its base, stays damaged; one whose
        # size is too large may still be readable.
        size = min(size, codec.STORED_BYTES_MAX)
        inside = offset < segment.pack.footer.table_at
        stored = _stored(segment, size, offset) if inside else b""
        known = kind == codec.PATCH and base < len(segment.pack.footer.names)
        index = self._index(segment.pack.footer.names[base]) if known else NO_BASE
        return self._add(table, stored, kind, depth, index, number)

    def _add(
        self, table: SegmentTable, stored: bytes, kind: int, depth: int, base: int, number: int
    ) -> bytes:
        at = self._pack.at
        self._pack.write(stored)
        table.stored += len(stored)
        return ENTRY.pack(at, len(stored), kind, depth, 0, base, 0, number)


def _stored(segment: Segment, size: int, offset: int) -> bytes:
    try:
        return segment.pack.pread(size, offset)
    except OSError as exc:
        if not is_medium_error(exc):
            raise
        where = f"packs/{segment.pack.path.name}, offset {offset}"
        raise Corrupt(f"{where}: cannot be read: {exc.strerror}") from exc


def everything(segment: Segment, number: int) -> bool:
    """Keep every frame that is not dead already."""
    return True
