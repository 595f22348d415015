"""A state file that cannot be read may hold a tag that protects, or a distrust: nothing is decided
without it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backyfs.config.schedule import DAILY
from backyfs.engine.backup import back_up
from backyfs.engine.expire import expire
from backyfs.engine.tags import add_tags, remove_tags, set_tags
from backyfs.engine.trust import distrust, trust, verified
from backyfs.engine.verification import verify
from backyfs.errors import Corrupt, Unsupported
from backyfs.model import Consistency, Trust
from backyfs.store.record import Draft, Record, sealed, unsealed
from backyfs.store.repository import Repository
from tests.engine.checks import content
from tests.engine.memory import MemorySource, disk
from tests.engine.test_verification import history

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


async def distrusted_and_damaged(repository: Repository) -> Record:
    """A revision that was distrusted before its state file was cut off."""
    (record,) = await history(repository, "abcd")
    distrust(repository, [record], "the host had bad memory")
    os.truncate(repository.layout.state(record.id), 100)
    return record


async def test_a_damaged_state_is_a_distrust(packs: Repository) -> None:
    record = await distrusted_and_damaged(packs)
    state = packs.state(record)
    assert (state.trust, state.lasting, state.verified_at) == (Trust.DISTRUSTED, True, None)
    assert state.tags == record.tags
    with pytest.raises(Corrupt, match="the state of revision"):
        packs.known_state(record)


@pytest.mark.parametrize("change", [set_tags, add_tags, remove_tags])
async def test_tags_of_a_damaged_state_are_refused(
    packs: Repository, change: Callable[..., object]
) -> None:
    record = await distrusted_and_damaged(packs)
    before = packs.layout.state(record.id).read_bytes()
    with pytest.raises(Corrupt, match=f"the state of revision {record.id}") as refusal:
        change(packs, [record], ["manual:zz"])
    assert f"backyfs distrust -r {record.id}" in refusal.value.hint
    assert packs.layout.state(record.id).read_bytes() == before


async def test_only_a_distrust_leads_out_of_a_damaged_state(packs: Repository) -> None:
    record = await distrusted_and_damaged(packs)
    with pytest.raises(Corrupt):
        trust(packs, [record])
    with pytest.raises(Corrupt):
        verified(packs, record, NOW)
    assert packs.state_problem(record.id)
    (state,) = distrust(packs, [record], packs.state(record).why)
    assert state.lasting, "for what the lost state was, reading stored bytes cannot tell"
    assert packs.known_state(record) == state
    assert packs.damage() == {}
    await verify(packs, [record])
    assert packs.known_state(record).trust is Trust.DISTRUSTED
    assert trust(packs, [record])[0].trust is Trust.TRUSTED
    assert add_tags(packs, [record], ["x"])[0].tags == ("x",)


async def test_no_backup_rests_on_a_damaged_state(packs: Repository) -> None:
    source = MemorySource({"disk": disk("abcd")}, tracking=True)
    record = await back_up(packs, source)
    distrust(packs, [record], "the source lied")
    os.truncate(packs.layout.state(record.id), 100)
    source.contents["disk"] = disk("abXd")
    source.kept[1] = {"disk": bytes(source.contents["disk"])}
    assert content(packs, await back_up(packs, source, changes={"disk": []})) == disk("abXd")


async def test_verification_does_not_touch_a_damaged_state(packs: Repository) -> None:
    record = await distrusted_and_damaged(packs)
    before = packs.layout.state(record.id).read_bytes()
    (verdict,) = await verify(packs, [record])
    assert [item.reason for item in verdict.damage] == [packs.state_problem(record.id)]
    assert packs.layout.state(record.id).read_bytes() == before


async def of_a_newer_format(repository: Repository) -> Record:
    """A revision whose state was written by a program to come."""
    (record,) = await history(repository, "abcd")
    add_tags(repository, [record], ["manual:keep"])
    path = repository.layout.state(record.id)
    path.write_bytes(sealed(unsealed(path.read_bytes(), "it") | {"format": 2, "held": True}))
    return record


async def test_a_newer_state_protects_and_is_told(packs: Repository) -> None:
    record = await of_a_newer_format(packs)
    state = packs.state(record)
    assert (state.trust, state.lasting, state.tags) == (Trust.DISTRUSTED, True, record.tags)
    (damage,) = packs.damage()[record.id]
    assert "has format 2; this program knows 1" in damage.reason
    (verdict,) = await verify(packs, [record])
    assert verdict.damage == [damage]
    await history(packs, "abcd")
    assert expire(packs, DAILY, NOW + timedelta(days=9000)).removed == []


@pytest.mark.parametrize(
    "change",
    [
        lambda packs, record: add_tags(packs, [record], ["x"]),
        lambda packs, record: distrust(packs, [record], "it looked odd"),
        lambda packs, record: trust(packs, [record]),
        lambda packs, record: verified(packs, record, NOW),
    ],
)
async def test_a_newer_state_is_never_replaced(
    packs: Repository, change: Callable[[Repository, Record], object]
) -> None:
    record = await of_a_newer_format(packs)
    before = packs.layout.state(record.id).read_bytes()
    with pytest.raises(Unsupported, match=f"the state of revision {record.id} has format 2"):
        change(packs, record)
    assert packs.layout.state(record.id).read_bytes() == before
