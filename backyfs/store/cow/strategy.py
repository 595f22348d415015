"""The Format of `cow`: opening, staging, and the invariants of images and tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from backyfs.errors import Corrupt, NoRevision, Unsupported
from backyfs.extents import merged
from backyfs.model import FRAME, Extent
from backyfs.store.contract import StoredImage
from backyfs.store.cow import damage
from backyfs.store.cow.files import Files
from backyfs.store.cow.image import CowImage
from backyfs.store.digest import frame_count
from backyfs.store.format import GcReport, Place, Stage
from backyfs.store.fs import allocated
from backyfs.store.layout import RECORD_SUFFIX, STATE_SUFFIX, owner
from backyfs.store.quarantine import WHOLE
from backyfs.store.record import DiskRecord, Record

EXTENTS_MAX = 250_000
"""A clone costs about 15 us per extent, and reading slows down: beyond this, write a fresh file."""


class CowFormat:
    """Format strategy over revisions/<id>.<disk>.img and .sum. Safe from many threads."""

    def __init__(self, place: Place, *, extents_max: int = EXTENTS_MAX) -> None:
        """`extents_max`: see there."""
        self._place, self._extents_max = place, extents_max

    def open(self, record: Record, disk: DiskRecord, *, check: bool) -> StoredImage:
        return CowImage.open(self._place, record.id, disk, check=check)

    def stage(self, revision: str, parent: Record | None) -> Stage:
        # Most commands only read: writing is imported by those that write.
        from backyfs.store.cow.stage import CowStage

        return CowStage(self._place, revision, parent, self._extents_max)

    def holding(self) -> AbstractContextManager[None]:
        return nullcontext()

    def structure(self, disk: DiskRecord) -> Iterator[str]:
        try:
            CowImage.open(self._place, "", disk, check=False, published=False).close()
        except Corrupt as exc:
            yield exc.reason
        except Unsupported as exc:
            yield exc.message

    def flaws(self, disk: DiskRecord) -> Iterator[str]:
        with suppress(Corrupt, Unsupported):  # `structure` tells
            image = CowImage.open(self._place, "", disk, check=False, published=False)
            image.close()
            if image.table.problem:
                yield image.table.problem

    def bad_extents(self, disk: DiskRecord) -> list[Extent]:
        frames = damage.frames_of(self._place, Files.of(self._place, disk).unit)
        if WHOLE in frames:
            return [Extent(0, disk.size)] if disk.size else []
        return list(
            merged(
                Extent(number * FRAME, min(FRAME, disk.size - number * FRAME))
                for number in frames
                if number < frame_count(disk.size)
            )
        )

    def files(self, disk: DiskRecord) -> list[Path]:
        return [self._place.layout.revisions / name for name in disk.files]

    def lockable(self, disk: DiskRecord) -> Path | None:
        with suppress(Corrupt):
            return Files.of(self._place, disk).image
        return None

    def discard(self, revision: str) -> None:
        kept = (f"{revision}{RECORD_SUFFIX}", f"{revision}{STATE_SUFFIX}")
        for path in sorted(self._place.layout.revisions.iterdir()):
            if path.name.startswith(f"{revision}.") and path.name not in kept:
                self._place.fs.unlink(path)
        for bad in self._place.quarantine.bad():
            if bad.unit.startswith(f"{revision}."):
                self._place.quarantine.clear(bad)

    def gc(self, records: list[Record], *, dry_run: bool) -> GcReport:
        """Nothing is ever merged: removing a file frees what only it held.

        Forgets what the quarantine says of images that are gone. `stored_bytes` counts shared
        blocks once per file that holds them.
        """
        paths = sorted({path for record in records for path in self._named(record)})
        if not dry_run:
            self._forget_gone({path.name.removesuffix(".img") for path in paths})
        return GcReport(files=len(paths), stored_bytes=sum(allocated(path) for path in paths))

    def _named(self, record: Record) -> Iterator[Path]:
        for disk in record.disks.values():
            yield from self.files(disk)

    def _forget_gone(self, units: set[str]) -> None:
        for bad in self._place.quarantine.bad():
            if bad.unit not in units:
                self._place.quarantine.clear(bad)

    def origins(self, records: Sequence[Record]) -> set[str]:
        return {owner(path.name) for record in records for path in self._named(record)}

    def occupied(self, records: Sequence[Record]) -> int:
        from backyfs.store.cow import occupancy

        return sum(occupancy.occupied(row) for row in self._rows(records))

    def exclusive(self, records: Sequence[Record]) -> Mapping[str, int]:
        from backyfs.store.cow import occupancy

        own = dict.fromkeys((record.id for record in records), 0)
        named: dict[Path, list[str]] = {}
        for record in records:
            for path in self._named(record):
                named.setdefault(path, []).append(record.id)
        for row in self._rows(records):
            for before, path, after in zip([None, *row], row, [*row[1:], None], strict=False):
                if len(named[path]) == 1:
                    own[named[path][0]] += occupancy.exclusive(path, before, after)
        return own

    def _rows(self, records: Sequence[Record]) -> list[list[Path]]:
        """Per disk and kind of file, the different files in order of the revisions."""
        rows: dict[tuple[str, str], dict[Path, None]] = {}
        for record in records:
            for disk in record.disks.values():
                for path in self.files(disk):
                    rows.setdefault((disk.name, path.suffix), {})[path] = None
        return [list(row) for row in rows.values()]

    def fsck(self, records: list[Record]) -> Iterator[str]:
        seen: dict[str, tuple[str, DiskRecord]] = {}
        for record in records:
            for disk in record.disks.values():
                for name in disk.files:
                    known = seen.setdefault(name, (record.id, disk))
                    if not _alike(known[1], disk):
                        yield f"{record.id} and {known[0]} disagree about {name}"
                    elif known[0] == record.id and name.endswith(".sum"):
                        yield from self._fsck_table(record, disk)

    def _fsck_table(self, record: Record, disk: DiskRecord) -> Iterator[str]:
        """What is wrong with frame hashes; a broken structure is `structure`'s to tell."""
        try:
            image = CowImage.open(self._place, record.id, disk, check=True, published=False)
        except (Corrupt, NoRevision, Unsupported):
            return
        try:
            if image.table.problem:
                yield f"{record.id}/{disk.name}: {image.table.problem}"
            elif image.table.head.repository != self._place.uuid:
                yield f"{record.id}/{disk.name}: the table belongs to another repository"
            for group in image.table.bad_groups():
                yield f"{record.id}/{disk.name}: the hashes of group {group} fail their checksum"
        finally:
            image.close()


def _alike(one: DiskRecord, other: DiskRecord) -> bool:
    mine = (one.name, one.size, one.digest, dict(one.files))
    return mine == (other.name, other.size, other.digest, dict(other.files))
