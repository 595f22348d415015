"""Expiry and purge: retention's decisions on a real repository; tags and trust by hand."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from backyfs.config.schedule import Rule, Schedule
from backyfs.engine.backup import back_up
from backyfs.engine.expire import expire
from backyfs.engine.purge import purge
from backyfs.engine.tags import add_tags, checked_tags, remove_tags, set_tags
from backyfs.engine.trust import distrust
from backyfs.errors import Busy, Corrupt, NoRevision, UsageError
from backyfs.model import Trust
from backyfs.store.record import Record
from backyfs.store.repository import Repository
from tests.engine.checks import content, damage_frame, files, flip, sound
from tests.engine.memory import MemorySource, disk
from tests.engine.revisions import clock

SCHEDULE: Schedule = {"daily": Rule(86400, 2), "weekly": Rule(7 * 86400, 1)}
START = datetime(2026, 3, 1, tzinfo=UTC)
NOW = START + timedelta(days=5, hours=1)


async def daily(repository: Repository, tags: Iterable[Iterable[str]]) -> list[Record]:
    source = MemorySource({"disk": disk("abcd")})
    for number, given in enumerate(tags):
        source.contents["disk"][0] = number
        at = START + timedelta(days=number)
        await back_up(repository, source, tags=list(given), now=clock(at))
    return repository.revisions()


SIX = [["daily", "weekly"], ["daily"], ["daily", "manual:x"], ["daily"], ["daily"], ["daily"]]


async def test_expired_revisions_go_and_the_rest_is_whole(packs: Repository) -> None:
    records = await daily(packs, SIX)
    result = expire(packs, SCHEDULE, NOW)
    assert result.removed == [records[1].id, records[3].id]
    assert (result.in_use, result.kept) == ([], [])
    left = packs.revisions()
    assert [record.id for record in left] == [records[n].id for n in (0, 2, 4, 5)]
    assert [packs.state(record).tags for record in left] == [
        ("weekly",),
        ("manual:x",),
        ("daily",),
        ("daily",),
    ]
    assert [content(packs, record)[0] for record in left] == [0, 2, 4, 5]
    sound(packs)


async def test_a_dry_run_changes_nothing(packs: Repository) -> None:
    records = await daily(packs, SIX)
    before = files(packs)
    result = purge(packs, SCHEDULE, NOW, dry_run=True)
    assert result.expiry.removed == [records[1].id, records[3].id]
    assert files(packs) == before
    assert packs.state(records[0]).tags == ("daily", "weekly")


async def test_purge_frees_space(packs: Repository) -> None:
    await daily(packs, [["daily"]] * 6)
    before = sum(files(packs).values())
    result = purge(packs, SCHEDULE, NOW)
    assert len(result.expiry.removed) == 4
    assert sum(files(packs).values()) < before
    sound(packs)
    assert [content(packs, record)[0] for record in packs.revisions()] == [4, 5]


async def test_what_is_read_stays_until_the_next_time(packs: Repository) -> None:
    records = await daily(packs, [["daily"]] * 6)
    with closing(packs.open_disk(records[0], "disk")) as image:
        result = expire(packs, SCHEDULE, NOW)
        assert result.in_use == [records[0].id]
        assert len(result.removed) == 3
        assert image.read(0, 1) == b"\0"
    assert expire(packs, SCHEDULE, NOW).removed == [records[0].id]


async def test_a_tag_set_meanwhile_protects(
    packs: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = await daily(packs, [["daily"]] * 6)
    remove = packs.remove

    def slow(*args: object, **kwargs: object) -> object:
        add_tags(packs, [records[0]], ["manual:wait"])
        return remove(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(packs, "remove", slow)
    result = expire(packs, SCHEDULE, NOW)
    assert result.kept == [records[0].id]
    assert len(result.removed) == 3
    assert packs.state(records[0]).tags == ("daily", "manual:wait")


async def test_what_went_meanwhile_is_no_error(
    packs: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two purges of one VM: the second waited for the lock, and has less to do then."""
    records = await daily(packs, [["daily", "weekly"], *[["daily"]] * 5])
    remove = packs.remove

    def waited(*args: object, **kwargs: object) -> object:
        remove([records[0].id, records[1].id])
        return remove(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(packs, "remove", waited)
        result = purge(packs, SCHEDULE, NOW).expiry
    assert result.removed == [records[2].id, records[3].id]
    assert (result.in_use, result.kept) == ([], [])
    assert packs.revisions() == records[4:]
    sound(packs)


async def test_what_protects_is_looked_for_again_when_the_lock_is_held(
    packs: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile somebody removed the newest: one that was due is the last good one now."""
    records = await daily(packs, [["old"]] * 3)
    distrust(packs, [records[0]], "by hand")
    remove = packs.remove

    def waited(*args: object, **kwargs: object) -> object:
        remove([records[2].id])
        return remove(*args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(packs, "remove", waited)
        result = expire(packs, SCHEDULE, NOW)
    assert (result.removed, result.kept) == ([records[0].id], [records[1].id])
    assert packs.revisions() == [records[1]]


async def test_a_writer_makes_it_busy(packs: Repository) -> None:
    await daily(packs, [["daily"]] * 6)
    with packs.writing(), pytest.raises(Busy):
        expire(packs, SCHEDULE, NOW)
    assert len(packs.revisions()) == 6


async def test_nothing_due_needs_no_lock(packs: Repository) -> None:
    await daily(packs, [["daily"]] * 2)
    with packs.writing():
        assert expire(packs, SCHEDULE, NOW).removed == []


async def test_a_damaged_revision_is_not_the_newest_good_one(packs: Repository) -> None:
    source = MemorySource({"disk": disk("abcd")})
    good = await back_up(packs, source, tags=["old"], now=lambda: START)
    source.contents["disk"] = disk("WXYZ")
    bad = await back_up(packs, source, tags=["old"], now=lambda: START + timedelta(days=1))
    source.contents["disk"] = disk("WXYQ")
    await back_up(packs, source, tags=["old"], now=lambda: START + timedelta(days=2))
    damage_frame(packs, bad, 1)
    with closing(packs.open_disk(bad, "disk")) as image:
        assert image.check(0, 4) == [1]
    assert expire(packs, SCHEDULE, NOW).removed == [bad.id]
    assert packs.revisions()[0] == good


async def test_gc_refuses_while_a_record_is_unreadable(packs: Repository) -> None:
    records = await daily(packs, [["daily"]] * 3)
    flip(packs.layout.record(records[1].id), 200)
    with pytest.raises(Corrupt):
        purge(packs, SCHEDULE, NOW)
    assert content(packs, records[0]) is not None


# Tags


def test_tags_are_checked_against_the_schedule() -> None:
    assert checked_tags(["weekly", "daily", "daily"], SCHEDULE) == ("daily", "weekly")
    assert checked_tags(["manual:before upgrade"], SCHEDULE) == ("manual:before upgrade",)
    assert checked_tags(["anything"], None) == ("anything",)
    assert checked_tags(["anything"], SCHEDULE, force=True) == ("anything",)
    with pytest.raises(UsageError, match="'anything'"):
        checked_tags(["daily", "anything"], SCHEDULE)
    with pytest.raises(UsageError):
        checked_tags(["no/slash"], None)


async def test_tags_are_set_added_and_removed(packs: Repository) -> None:
    (record,) = await daily(packs, [["daily"]])
    assert add_tags(packs, [record], ["b", "a"])[0].tags == ("a", "b", "daily")
    assert remove_tags(packs, [record], ["b", "zzz"])[0].tags == ("a", "daily")
    assert set_tags(packs, [record], ["x"])[0].tags == ("x",)
    assert packs.state(record).tags == ("x",)
    assert packs.record(record.id).tags == ("daily",)


async def test_expected_tags(packs: Repository) -> None:
    (record,) = await daily(packs, [["daily", "weekly"]])
    set_tags(packs, [record], ["x"], expect=["weekly", "daily"])
    with pytest.raises(UsageError, match="the tags are x"):
        add_tags(packs, [record], ["y"], expect=["daily"])
    assert packs.state(record).tags == ("x",)


async def test_tags_of_a_revision_that_is_gone(packs: Repository) -> None:
    (record,) = await daily(packs, [["daily"]])
    packs.remove([record.id])
    with pytest.raises(NoRevision):
        add_tags(packs, [record], ["y"])


async def test_distrust_keeps_the_tags(packs: Repository) -> None:
    (record,) = await daily(packs, [["daily"]])
    (state,) = distrust(packs, [record], "looked odd")
    assert (state.trust, state.why, state.tags) == (Trust.DISTRUSTED, "looked odd", ("daily",))
    assert packs.state(record) == state
