"""What every test of the engine asks of a repository."""

from __future__ import annotations

import os
from contextlib import closing

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
