"""A parent that cannot be opened is never taken for zeros."""

from __future__ import annotations

from pathlib import Path

from backyfs.model import FRAME, Consistency, Extent
from backyfs.store.record import Draft
from backyfs.store.repository import Repository


def test_a_lost_parent_makes_everything_required(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "vm", "packs")
    size = 3 * FRAME + 5
    with repository.writing() as intent, repository.begin(intent, None) as staging:
        staging.disk("disk", size).write(0, b"x" * size)
        parent = staging.commit(Draft(Consistency.CRASH))
    (name,) = parent.disks["disk"].files
    (repository.layout.revisions / name).write_bytes(b"damaged")

    with repository.writing() as intent, repository.begin(intent, parent) as staging:
        assert staging.disk("disk", size).required() == [Extent(0, size)]
        assert staging.disk("new", size).required() == []
