"""A state file that cannot be read may hold a tag that protects: nothing is decided without it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from backyfs.config.schedule import DAILY
from backyfs.engine.expire import expire
from backyfs.model import Consistency
from backyfs.store.record import Draft
from backyfs.store.repository import Repository

NOW = datetime(2026, 11, 21, tzinfo=UTC)


def test_a_damaged_state_protects(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "vm", "packs")
    ids = []
    for days in range(900, 880, -1):
        with repository.writing() as intent:
            time = NOW - timedelta(days=days)
            with repository.begin(intent, None, time=time) as staging:
                staging.disk("disk", 5).write(0, b"12345")
                draft = Draft(Consistency.CRASH, tags=("daily",))
                ids.append(staging.commit(draft).id)
    protected, other = ids[0], ids[1]
    repository.update_state(protected, lambda state: replace(state, tags=("manual:keep",)))
    path = repository.layout.state(protected)
    path.write_bytes(path.read_bytes().replace(b"manual", b"mangal"))

    result = expire(repository, DAILY, NOW)
    assert other in result.removed
    assert protected not in result.removed
    assert repository.record(protected).id == protected
    assert protected in repository.damage()
