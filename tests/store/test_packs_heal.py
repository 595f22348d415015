"""A backup that heals says so, in the log and in the record's reason."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest

from backyfs.model import FRAME, Consistency
from backyfs.store.record import Draft, Record
from backyfs.store.repository import Repository
from tests.store import faults


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


def test_what_cannot_be_put_back_is_stored_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pack is not rewritten without a frame that cannot be read, which the source has no more:
    the backup goes on, and should the medium give the frame again, it is there.
    """
    repository = Repository.create(tmp_path / "vm", "packs")
    rng = random.Random(1)
    data = rng.randbytes(8 * FRAME)
    first = back_up(repository, data, None)
    (pack,) = repository.layout.packs.iterdir()
    before = pack.read_bytes()
    second, sixth = (before.index(data[number * FRAME : number * FRAME + 99]) for number in (1, 5))
    new = data[: 5 * FRAME] + rng.randbytes(FRAME) + data[6 * FRAME :]
    bad = ((pack, second, second + 4096), (pack, sixth, sixth + 4096))
    with faults.unreadable(monkeypatch, *bad):
        image = repository.open_disk(first, "disk")
        assert image.check(0, 8) == [1, 5]
        image.close()
        record = back_up(repository, new, first)
        assert (record.reason, record.stats.stored > 2 * FRAME) == ("read live", True)
        told = {item.message: str(item.args) for item in caplog.records}
        assert f"packs/{pack.name}, offset" in told["damaged frames cannot be put back"]
        image = repository.open_disk(record, "disk")
        assert image.check(0, 8) == []
        assert image.read(0, len(new)) == new
        image.close()
        assert repository.damage().keys() == {first.id}
    assert pack.read_bytes() == before
    image = repository.open_disk(first, "disk")
    assert image.check(0, 8) == []
    assert image.read(0, len(data)) == data
    image.close()
    assert (repository.damage(), repository.fsck()) == ({}, [])
