"""Repositories for the tests of readers, written straight through the store (no engine)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from backyfs.model import FRAME, Consistency, Partition
from backyfs.store.record import Draft, Record
from backyfs.store.repository import Repository
from tests.images import text_like


def content(frames: int, seed: int = 0, tail: int = 0) -> bytes:
    """`frames` frames, each random, text-like or zero, and `tail` bytes more."""
    rng = random.Random(seed)
    parts = []
    for _ in range(frames):
        kind = rng.choice(("random", "text", "zero"))
        parts.append(
            rng.randbytes(FRAME)
            if kind == "random"
            else text_like(rng, FRAME)
            if kind == "text"
            else bytes(FRAME)
        )
    return b"".join(parts) + rng.randbytes(tail)


def add_revision(
    repository: Repository,
    disks: Mapping[str, bytes] | bytes,
    *,
    time: datetime | None = None,
    tags: tuple[str, ...] = (),
    partitions: Mapping[str, tuple[Partition, ...]] | None = None,
) -> Record:
    """One more revision with these disks ("disk" if just bytes are given)."""
    contents = {"disk": disks} if isinstance(disks, bytes) else disks
    parent = next(reversed(repository.revisions()), None)
    with (
        repository.writing() as intent,
        repository.begin(intent, parent, time=time) as staging,
    ):
        for name, data in contents.items():
            staging.disk(name, len(data)).write(0, data)
        return staging.commit(Draft(Consistency.CRASH, tags=tags, partitions=partitions or {}))


def make_vm(base: Path, name: str, *disks: bytes, store: str = "packs") -> Repository:
    """A repository `base`/`name` with one revision for each of `disks`."""
    repository = Repository.create(base / name, store)
    for data in disks:
        add_revision(repository, data)
    return repository
