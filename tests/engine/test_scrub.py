"""Scrub reads everything once per pass, in as many runs as it takes."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest
import trio

from backyfs.engine.backup import back_up
from backyfs.engine.scrub import scrub
from backyfs.engine.scrub_position import STATE_NAME, Position, note_damage, position
from backyfs.model import FRAME
from backyfs.store.format import Damage
from backyfs.store.record import sealed, unsealed
from backyfs.store.repository import Repository
from tests.conftest import SmallFs
from tests.engine.checks import damage_frame, flip
from tests.engine.memory import MemorySource, disk
from tests.engine.test_backup import Recorder
from tests.engine.test_verification import history
from tests.filesystems import MIB, read_only


async def test_a_pass_reads_each_stored_frame_once(packs: Repository) -> None:
    await history(packs, "abcd" * 10, "abcd" * 9 + "abcX")
    at = datetime(2026, 5, 1, tzinfo=UTC)
    found = await scrub(packs, now=lambda: at)
    assert found.checked_bytes == 41 * FRAME
    assert (found.complete, found.bad_frames, found.damage) == (True, 0, {})
    assert position(packs) == Position(finished=at)


async def test_nothing_to_scrub(packs: Repository) -> None:
    found = await scrub(packs)
    assert (found.complete, found.checked_bytes) == (True, 0)


async def test_damage_is_found_and_named_in_all_revisions(packs: Repository) -> None:
    records = await history(packs, "abcd", "abXd")
    damage_frame(packs, records[0], 1)
    found = await scrub(packs)
    assert found.bad_frames == 1
    assert set(found.damage) == {record.id for record in records}


async def test_runs_without_time_do_nothing_and_lose_nothing(packs: Repository) -> None:
    await history(packs, "abcd")
    found = await scrub(packs, 0)
    assert (found.complete, found.checked_bytes) == (False, 0)


async def test_many_runs_make_one_pass(packs: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run has time for one piece; together they read everything once."""
    source = MemorySource({"a": disk("abcdefgh" * 20), "b": disk("x..y" * 30)})
    await back_up(packs, source)
    source.contents["a"] = disk("Xbcdefgh" * 20)
    await back_up(packs, source)
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    total = runs = 0
    while not (found := await scrub(packs, 2)).complete:
        total += found.checked_bytes
        runs += 1
        assert runs < 100
    total += found.checked_bytes
    assert runs > 4
    assert total == (160 + 60 + 20) * FRAME


async def test_removal_between_runs_does_no_harm(
    packs: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = await history(packs, "abcd" * 40, "aXcd" * 40, "aXYd" * 40)
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    assert not (await scrub(packs, 3)).complete
    packs.remove([records[0].id])
    damage_frame(packs, records[2], 159)
    bad = 0
    while not (found := await scrub(packs, 3)).complete:
        bad += found.bad_frames
    assert bad + found.bad_frames == 1


async def test_a_damaged_state_starts_over(packs: Repository) -> None:
    await history(packs, "abcd")
    await scrub(packs)
    flip(packs.path / STATE_NAME, 30)
    assert position(packs) == Position()
    assert (await scrub(packs)).checked_bytes == 4 * FRAME


@pytest.mark.parametrize("started", ["never", "0001-01-01T00:00:00+14:00", 7])
async def test_a_state_that_makes_no_sense_starts_over(packs: Repository, started: object) -> None:
    await scrub(packs)
    path = packs.path / STATE_NAME
    value = unsealed(path.read_bytes(), "")
    path.write_bytes(sealed({**value, "started": started}))
    assert position(packs) == Position()


async def test_damage_noted_meanwhile_stays_when_it_is_stopped(packs: Repository) -> None:
    records = await history(packs, "abcd", "abXd")
    recorder = Recorder()
    with trio.CancelScope() as scope:

        def advance(count: int) -> None:
            if position(packs).damaged:
                scope.cancel()
            else:  # before the first share's position is saved
                note_damage(packs, {records[1].id: [Damage("disk", None, "its map is damaged")]})

        recorder.advance = advance  # type: ignore[method-assign]
        await scrub(packs, progress=recorder)
    assert scope.cancelled_caught
    assert position(packs).damaged == {records[1].id}
    assert position(packs).seq == records[0].seq
    await scrub(packs)
    assert position(packs).damaged == set()


async def test_a_writer_does_not_hold_it_up(packs: Repository) -> None:
    await history(packs, "abcd")
    with packs.writing(), trio.fail_after(10):
        assert (await scrub(packs)).complete


async def test_fsck_knows_the_state(packs: Repository) -> None:
    await history(packs, "abcd")
    await scrub(packs)
    assert packs.fsck() == []


async def test_what_a_killed_scrub_left_is_removed(packs: Repository) -> None:
    await history(packs, "abcd")
    (packs.path / f"{STATE_NAME}.0a1b2c3d.tmp").write_text("half")
    await scrub(packs)
    assert [path.name for path in packs.path.glob("scrub*")] == [STATE_NAME]


async def test_a_read_only_store_is_read_from_the_same_place_each_time(
    small_fs: SmallFs, monkeypatch: pytest.MonkeyPatch
) -> None:
    mountpoint = small_fs("xfs", 300 * MIB)
    repository = Repository.create(mountpoint / "vm", "packs")
    records = await history(repository, "abcdefgh" * 20, "abcdefgh" * 19 + "abcdefgX")
    damage_frame(repository, records[0], 2)
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    with read_only(mountpoint):
        for _ in range(2):
            found = await scrub(repository, 2)
            assert (found.complete, found.unrecorded) == (False, "Read-only file system")
            assert (found.bad_frames, [*found.damage]) == (1, [records[0].id])
            assert position(repository) == Position()
        found = await scrub(repository)
        assert (found.complete, found.unrecorded) == (True, "Read-only file system")
        assert [*found.damage] == [record.id for record in records]
    assert repository.quarantine.bad() == set()
    found = await scrub(Repository.open(repository.path))
    assert (found.bad_frames, found.unrecorded) == (1, "")
    assert len(repository.quarantine.bad()) == 1
    assert position(repository).finished
