"""The two files of a disk: finding them by the record, opening them as a reader.

A reader holds a shared lock on the image as long as it is open: remove asks for it. The lock is
taken first, then the link count tells whether the file was removed in between.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from backyfs.errors import Corrupt, NoRevision
from backyfs.store import lock
from backyfs.store.cow.table import Table
from backyfs.store.digest import digest
from backyfs.store.format import Place
from backyfs.store.fs import is_medium_error, open_file
from backyfs.store.record import DiskRecord


@dataclass(frozen=True, slots=True)
class Files:
    """Where the files of a disk lie, and what the record says of the table."""

    image: Path
    table: Path
    checksum: str

    @classmethod
    def of(cls, place: Place, disk: DiskRecord) -> Files:
        """Corrupt when the record does not name exactly one image and one table."""
        images = [name for name in disk.files if name.endswith(".img")]
        tables = [name for name in disk.files if name.endswith(".sum")]
        if len(images) != 1 or len(tables) != 1 or len(disk.files) != 2:
            raise Corrupt(f"the record names no image and table for disk {disk.name}")
        directory = place.layout.revisions
        return cls(directory / images[0], directory / tables[0], disk.files[tables[0]])

    @property
    def unit(self) -> str:
        """The quarantine's name of the image."""
        return self.image.name.removesuffix(".img")


def open_image(path: Path, size: int) -> int:
    """The descriptor of an image that has `size` bytes. FileNotFoundError, Corrupt."""
    fd = _opened(path)
    found = os.fstat(fd).st_size
    if found != size:
        os.close(fd)
        raise Corrupt(f"{path.name} has {found} bytes, not {size}")
    return fd


def open_table(files: Files, disk: DiskRecord) -> Table:
    """The table, checked against the record. FileNotFoundError, Corrupt, Unsupported.

    Where only its head or its level-1 hashes are damaged it has a `problem`.
    """
    fd = _opened(files.table)
    try:
        return _checked_table(fd, files, disk)
    except BaseException:
        os.close(fd)
        raise


def _checked_table(fd: int, files: Files, disk: DiskRecord) -> Table:
    try:
        table = Table.load(fd, disk.size, files.checksum, files.table.name)
        if digest(disk.size, table.level1) != disk.digest:
            raise Corrupt(f"{files.table.name} does not have the digest of the record")
    except Corrupt as exc:
        recovered = Table.recovered(fd, disk.size, disk.digest, exc.reason)
        if recovered is None:
            raise
        return recovered
    return table


def _opened(path: Path) -> int:
    try:
        return open_file(path)
    except OSError as exc:
        if not is_medium_error(exc):
            raise
        raise Corrupt(f"{path.name} cannot be read: {exc.strerror}") from exc


def become_reader(fd: int, place: Place, revision: str) -> None:
    """Take the reader's lock on an open image. NoRevision when it was just removed, Busy."""
    lock.share(fd, f"{place.name}/{revision}")
    if os.fstat(fd).st_nlink == 0:
        raise gone(place, revision)


def gone(place: Place, revision: str) -> NoRevision:
    """The error for a revision that vanished while it was being opened."""
    return NoRevision(
        f"{place.name}: revision {revision} was removed meanwhile",
        hint="see what there is with: backyfs status",
    )
