"""What differs between the two store formats, and the hook for foreign ones.

`Repository` does everything the formats share (records, states, locks, order); a `Format` keeps
the bytes of disks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol
from uuid import UUID

from backyfs.errors import Corrupt
from backyfs.model import Extent
from backyfs.store.contract import DiskWriter, StoredImage
from backyfs.store.fs import Fs
from backyfs.store.layout import Layout
from backyfs.store.quarantine import Quarantine
from backyfs.store.record import DiskRecord, Record


@dataclass(frozen=True, slots=True)
class Place:
    """What a format needs to know of its repository."""

    layout: Layout
    uuid: UUID
    fs: Fs
    quarantine: Quarantine

    @property
    def name(self) -> str:
        """The VM's shown name."""
        return self.layout.path.name


class Damage(NamedTuple):
    """What is known to be wrong with a disk: an extent, or all of it (`extent` None)."""

    disk: str
    extent: Extent | None
    reason: str


@dataclass(frozen=True, slots=True)
class GcReport:
    """What a garbage collection did, or (dry run) would do. Bytes are file sizes.

    `dead_bytes` of `stored_bytes` in `files` files are what is left; `more`: another step is due.
    """

    removed_files: int = 0
    merged_files: int = 0
    written_files: int = 0
    freed_bytes: int = 0
    dead_bytes: int = 0
    stored_bytes: int = 0
    files: int = 0
    more: bool = False


class Stage(Protocol):
    """The disks of a revision in the making, within one format."""

    @property
    def stored_bytes(self) -> int:
        """Bytes added to the store's files so far."""

    @property
    def notes(self) -> Sequence[str]:
        """What an operator should know of how the revision was written; for its `reason`."""

    def disk(self, name: str, size: int) -> DiskWriter:
        """As RevisionWriter.disk."""

    def seal(self) -> None:
        """Finish and publish all files of the disks, durably."""

    def image(self, name: str) -> StoredImage:
        """As RevisionWriter.image."""

    def written(self, name: str) -> list[Extent]:
        """As RevisionWriter.written."""

    def files(self, name: str) -> Mapping[str, str]:
        """File names in revisions/ and their BLAKE3 for the disk's record; after seal."""

    def close(self) -> None:
        """Give back descriptors; files stay."""


class Format(Protocol):
    """A way to keep the bytes of disks."""

    def open(self, record: Record, disk: DiskRecord, *, check: bool) -> StoredImage:
        """Open a disk for reading, with the reader's lock taken. Corrupt when it cannot be.

        `check`: verify each frame that is read (packs always does).
        """

    def stage(self, revision: str, parent: Record | None) -> Stage:
        """Start a revision; the writer's lock is held and the intent written."""

    def holding(self) -> AbstractContextManager[None]:
        """While entered, files stay open from one call to the next: for many calls in a row."""

    def structure(self, disk: DiskRecord) -> Iterable[str]:
        """What is wrong with the disk's files, in words, found without reading frames."""

    def flaws(self, disk: DiskRecord) -> Iterable[str]:
        """What is wrong with the disk's files, in words, and keeps nothing from being read."""

    def bad_extents(self, disk: DiskRecord) -> list[Extent]:
        """Extents of the disk that reach a quarantined frame."""

    def files(self, disk: DiskRecord) -> list[Path]:
        """The files that belong to this disk alone or with other revisions (maps, images)."""

    def lockable(self, disk: DiskRecord) -> Path | None:
        """The file a reader of the disk holds its lock on.

        None where the record names none: nobody can read the disk then.
        """

    def discard(self, revision: str) -> None:
        """Remove every file of an unpublished revision, unfinished ones included, and no other."""

    def gc(self, records: list[Record], *, dry_run: bool) -> GcReport:
        """One step of freeing what no record needs. Called under the writer's lock.

        `records` are all records of the repository: everything is readable (fails closed).
        """

    def origins(self, records: Sequence[Record]) -> set[str]:
        """Ids of the revisions that stored what these records need; they may be gone."""

    def occupied(self, records: Sequence[Record]) -> int:
        """Bytes on the medium behind these records (all of the repository), shared ones once."""

    def exclusive(self, records: Sequence[Record]) -> Mapping[str, int]:
        """By revision, the bytes that would be freed if it alone were removed.

        `records` are all of the repository, by seq. Corrupt where that cannot be told.
        """

    def fsck(self, records: list[Record]) -> Iterable[str]:
        """Violated invariants of the files behind these records, in words; reads structure."""


def missing(path: Path) -> Corrupt:
    """The error for a file a record names that is not there."""
    return Corrupt(f"{path.parent.name}/{path.name} is missing")
