"""A backup that heals says so, in the log and in the record's reason."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from backyfs.model import FRAME, Consistency
from backyfs.store.record import Draft, Record
from backyfs.store.repository import Repository


def back_up(repository: Repository, data: bytes, parent: Record | None) -> Record:
    with repository.writing() as intent, repository.begin(intent, parent) as staging:
        staging.disk("disk", len(data)).write(0, data)
        return staging.commit(Draft(Consistency.CRASH, reason="read live"))


def test_what_was_healed_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    repository = Repository.create(tmp_path / "vm", "packs")
    data = b"".join(bytes([1 + number]) * FRAME for number in range(4))
    first = back_up(repository, data, None)
    (pack,) = repository.layout.packs.iterdir()
    stored = bytearray(pack.read_bytes())
    stored[100] ^= 0x40
    pack.write_bytes(stored)
    image = repository.open_disk(first, "disk")
    assert image.check(0, 4) == [0]
    image.close()
    assert "damaged frame" in caplog.text

    with caplog.at_level(logging.WARNING):
        second = back_up(repository, data, first)
    assert second.reason == "read live; 1 damaged frame put right"
    assert "put right" in caplog.text
    assert repository.damage() == {}
    for record in (first, second):
        image = repository.open_disk(record, "disk")
        assert image.read(0, len(data)) == data
        image.close()
