"""Healing: putting good frames where the quarantine says that bad ones are.

The only write into a published file: a whole frame whose hash is the recorded one, or all hashes
of a group, proven by level 1; then fsync, then it is read again, and only then its record in the
quarantine goes. Hashes are written by group since a group is whole blocks of the table: of a block
that cannot be read, no part can be written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from backyfs.errors import BackyfsError, Corrupt, Unsupported
from backyfs.model import FRAME
from backyfs.store.cow.blocks import BLOCK, ZERO_FRAME, mended
from backyfs.store.cow.damage import ID_LENGTH
from backyfs.store.cow.image import CowImage
from backyfs.store.cow.table import hash_at
from backyfs.store.digest import FAN_OUT, HASH, frame_count
from backyfs.store.format import Place
from backyfs.store.fs import forget_pages, open_file, read_exactly, read_file
from backyfs.store.layout import RECORD_SUFFIX
from backyfs.store.quarantine import WHOLE
from backyfs.store.record import DiskRecord, Record


class Healer:
    """The quarantined frames of all images of one disk; writes good ones where they belong."""

    def __init__(self, place: Place, disk: str) -> None:
        self._place = place
        self._bad: dict[str, set[int]] = {}
        for bad in place.quarantine.bad():
            if bad.unit[ID_LENGTH + 1 :] == disk and bad.number != WHOLE:
                self._bad.setdefault(bad.unit, set()).add(bad.number)
        self.frames = frozenset(number for numbers in self._bad.values() for number in numbers)
        self._images: dict[str, CowImage | None] = {}

    def heal(self, number: int, good: bytes) -> None:
        """Mend frame `number` wherever it is recorded as bad and `good` helps."""
        for unit, numbers in self._bad.items():
            if number in numbers:
                image = self._image(unit)
                if image is not None and _heal(self._place, image, number, good):
                    numbers.discard(number)

    def _image(self, unit: str) -> CowImage | None:
        if unit not in self._images:
            self._images[unit] = self._open(unit)
        return self._images[unit]

    def _open(self, unit: str) -> CowImage | None:
        for record, disk in owners(self._place, f"{unit}.img"):
            with contextlib.suppress(BackyfsError):
                return CowImage.open(self._place, record.id, disk, check=True)
        return None

    def close(self) -> None:
        """Give back descriptors and locks."""
        for image in self._images.values():
            if image is not None:
                image.close()
        self._images.clear()


def mend_hashes(place: Place, image: CowImage, group: int) -> None:
    """Write the hashes of a group anew if they cannot be read and the image proves them."""
    if not image.table.readable(group):
        with contextlib.suppress(Corrupt):  # nothing proves them
            _write_hashes(place, image, group, image.column(group))


def owners(place: Place, file: str) -> Iterator[tuple[Record, DiskRecord]]:
    """The revisions and disks whose readable records name a file."""
    for path in sorted(place.layout.revisions.glob(f"*{RECORD_SUFFIX}")):
        with contextlib.suppress(OSError, Corrupt, Unsupported):
            record = Record.decode(read_file(path), path.name)
            for disk in record.disks.values():
                if file in disk.files:
                    yield record, disk


def _heal(place: Place, image: CowImage, number: int, good: bytes) -> bool:
    """Whether the frame of a published image reads well now; writes only what its hash allows.

    Reading it well also takes it off the quarantine (CowImage.check).
    """
    if number >= frame_count(image.size):
        return False
    try:
        recorded = image.hashes(number, 1)
    except Corrupt:  # nothing says any more what the frame should be
        return False
    length = min(FRAME, image.size - number * FRAME)
    good = good[:length].ljust(length, b"\0")
    forget_pages(image.fd, number * FRAME, length)  # the medium counts, not a cached copy
    frame = mended(_salvaged(image.fd, number, good), good, recorded)
    if frame is None:
        return False
    _rewrite(place, image, number, frame, recorded)
    return image.check(number, 1) == []


def _salvaged(fd: int, number: int, good: bytes) -> bytes:
    """The frame as stored, with the source's blocks in place of unreadable ones."""
    blocks = []
    for at in range(0, len(good), BLOCK):
        length = min(BLOCK, len(good) - at)
        try:
            blocks.append(read_exactly(fd, length, number * FRAME + at))
        except (OSError, EOFError):
            blocks.append(good[at : at + length])
    return b"".join(blocks)


def _rewrite(place: Place, image: CowImage, number: int, frame: bytes, recorded: bytes) -> None:
    if image.frame(number) != frame:
        _write_frame(place, image.files.image, number, frame)
    if not _entry_is(image, number, recorded):
        group = number // FAN_OUT
        _write_hashes(place, image, group, image.column(group))


def _write_hashes(place: Place, image: CowImage, group: int, column: bytes) -> None:
    with _writable(image.files.table) as fd:
        place.fs.pwrite(fd, column, hash_at(group * FAN_OUT), image.files.table)
        place.fs.fsync(fd, image.files.table)


def _write_frame(place: Place, path: Path, number: int, frame: bytes) -> None:
    offset, fs = number * FRAME, place.fs
    with _writable(path) as fd:
        if frame == ZERO_FRAME[: len(frame)]:
            fs.punch(fd, offset, len(frame), path)
        else:
            fs.pwrite(fd, frame, offset, path)
        fs.fsync(fd, path)


def _entry_is(image: CowImage, number: int, recorded: bytes) -> bool:
    group, within = divmod(number, FAN_OUT)
    try:
        return image.table.column(group).startswith(recorded, within * HASH)
    except (OSError, EOFError):
        return False


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[int]:
    fd = open_file(path, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)
