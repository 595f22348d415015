"""What every test of the engine asks of a repository."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from backyfs.model import FRAME
from backyfs.store.packs.image import PackImage
from backyfs.store.record import Record
from backyfs.store.repository import Repository


def content(repository: Repository, record: Record, disk: str = "disk") -> bytes:
    """All bytes of a disk, read back and checked."""
    with closing(repository.open_disk(record, disk)) as image:
        return image.read(0, image.size)


def files(repository: Repository) -> dict[str, int]:
    """Every file of the repository with its size, but the lock's."""
    found = {}
    for directory, _, names in os.walk(repository.path):
        for name in names:
            path = os.path.join(directory, name)
            if name not in ("lock", "lock.meta"):
                found[os.path.relpath(path, repository.path)] = os.stat(path).st_size
    return found


def sound(repository: Repository) -> None:
    """No invariant is violated, nothing is damaged, nobody holds the writer's lock."""
    assert repository.fsck() == []
    assert repository.damage() == {}
    with repository.writing():
        pass


def flip(path: Path, offset: int) -> None:
    """Damage one byte of a file, behind everybody's back."""
    with open(path, "r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte[0] ^ 0xFF]))
        stream.flush()
        os.fsync(stream.fileno())  # or the file system's map of extents would not know yet


def damage_frame(repository: Repository, record: Record, number: int, disk: str = "disk") -> None:
    """Damage the stored bytes of a frame: of all revisions that share it (packs), or of one."""
    if repository.store == "cow":
        flip(repository.layout.revisions / f"{record.id}.{disk}.img", number * FRAME + 100)
        return
    with closing(repository.open_disk(record, disk)) as image:
        assert isinstance(image, PackImage)
        place = image.locate(number)
        assert place is not None
        library = image._library
        segment = library.segment(place.unit)
        offset, length = segment.entry(place.number)[:2]
        flip(segment.pack.path, offset + length // 2)
