"""Recording damaged frames of images.

The quarantine's unit is an image's file name without ".img", the number is the frame's. A block
that went bad is bad in every image that shares it, so whoever finds a bad frame also looks at
the other images of the disk.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from backyfs.log import TOLD
from backyfs.model import FRAME
from backyfs.store.cow.blocks import frame_hashes
from backyfs.store.cow.fiemap import places
from backyfs.store.cow.table import hash_at
from backyfs.store.digest import HASH
from backyfs.store.format import Place
from backyfs.store.fs import forget_pages, open_file, read_exactly
from backyfs.store.quarantine import Bad

log = logging.getLogger(__name__)

ID_LENGTH = 21
"""Characters of a revision id; a unit is the id, a dot and the disk's name."""


def frames_of(place: Place, unit: str) -> set[int]:
    """Quarantined frames of an image; WHOLE among them means all."""
    return {bad.number for bad in place.quarantine.bad() if bad.unit == unit}


def recorded(place: Place, unit: str, first: int, end: int) -> set[int]:
    """Quarantined frames of an image among [first, end)."""
    if end - first == 1:  # so are many healed, one by one: not to be listed for each
        return {first} if place.quarantine.holds(Bad(unit, first)) else set()
    return {number for number in frames_of(place, unit) if first <= number < end}


def clear(place: Place, unit: str, number: int) -> None:
    """A frame reads well again."""
    place.quarantine.clear(Bad(unit, number))
    log.info("frame reads well again", {"image": unit, "frame": number})


def report(place: Place, image: Path, fd: int, number: int, reason: str, revision: str) -> None:
    """Record a bad frame of an open image, and the same frame of others that share the bad block.

    `revision` is the one it was found in.
    """
    unit = image.stem
    if place.quarantine.holds(Bad(unit, number)):
        return
    _add(place, unit, number, reason, revision)
    for other in _also_bad(place, image, fd, number):
        if not place.quarantine.holds(Bad(other, number)):
            _add(place, other, number, f"shares a block with {unit}", other[:ID_LENGTH])


def _add(place: Place, unit: str, number: int, reason: str, revision: str) -> None:
    offset, disk = number * FRAME, unit[ID_LENGTH + 1 :]
    values = {"image": unit, "offset": offset, "reason": reason}
    log.error("damaged frame", values, extra=TOLD)
    place.quarantine.add(Bad(unit, number), reason, revision=revision, disk=disk, offset=offset)


def _also_bad(place: Place, image: Path, fd: int, number: int) -> Iterator[str]:
    mine = places(fd, number * FRAME, FRAME)
    suffix = image.name[ID_LENGTH:]
    for path in place.layout.revisions.iterdir() if mine else ():
        if path.name[ID_LENGTH:] == suffix and path != image:
            with contextlib.suppress(OSError):
                if _is_bad(path, number, mine):
                    yield path.stem


def _is_bad(path: Path, number: int, suspects: set[int]) -> bool:
    """Whether a frame uses one of these blocks and does not have the hash beside its image."""
    fd = open_file(path)
    try:
        length = min(FRAME, os.fstat(fd).st_size - number * FRAME)
        if length <= 0 or not suspects & places(fd, number * FRAME, length):
            return False
        forget_pages(fd, number * FRAME, length)
        try:
            data = read_exactly(fd, length, number * FRAME)
        except (OSError, EOFError):
            return True
        table = open_file(path.with_suffix(".sum"))
        try:
            return frame_hashes(data) != os.pread(table, HASH, hash_at(number))
        finally:
            os.close(table)
    finally:
        os.close(fd)
