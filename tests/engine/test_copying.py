"""Copies have the same bytes, ids, times, tags, order and digests, whatever the formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio

from backyfs.engine.backup import back_up
from backyfs.engine.copying import copy, differences, missing
from backyfs.engine.progress import Phase
from backyfs.engine.tags import add_tags
from backyfs.engine.trust import distrust
from backyfs.engine.verification import verify
from backyfs.errors import Busy, Corrupt, UsageError
from backyfs.model import FRAME, Extent
from backyfs.store.record import Record
from backyfs.store.repository import Repository
from tests.engine.checks import content, damage_frame, files, sound
from tests.engine.conftest import Stores
from tests.engine.memory import MemorySource, disk
from tests.engine.revisions import START, clock, record

CONTENTS = [
    {"root": disk("ab.c" * 300, tail=100)},
    {"root": disk("ab.c" * 299 + "aX..", tail=100), "data": disk("xyz")},
    {"root": disk("ab.c" * 299 + "aX..", tail=100), "data": disk("x.zw", tail=7)},
    {"root": disk("ab.c" * 10, tail=1), "data": disk("")},
    {"data": disk("........q")},
]


async def filled(repository: Repository) -> list[Record]:
    """A history with growth, shrinkage, disks that come and go, tags and trust."""
    source = MemorySource()
    start = datetime(2026, 3, 1, tzinfo=UTC)
    for number, contents in enumerate(CONTENTS):
        source.contents = contents
        at = start + timedelta(days=number)
        await back_up(repository, source, tags=["daily"], now=clock(at))
    records = repository.revisions()
    add_tags(repository, [records[1]], ["manual:keep"])
    distrust(repository, [records[2]], "the clock was wrong")
    await verify(repository, [records[3]])
    return records


def same(source: Repository, target: Repository) -> None:
    """The target has all that the source has, but for what depends on the format."""
    ours, theirs = source.revisions(), target.revisions()
    assert [record.id for record in theirs] == [record.id for record in ours]
    for mine, other in zip(ours, theirs, strict=True):
        assert source.state(mine) == target.state(other)
        for name, found in mine.disks.items():
            assert other.disks[name].digest == found.digest
            assert content(target, other, name) == content(source, mine, name)
            assert other.disks[name].source == found.source
            assert other.disks[name].partitions == found.partitions
        assert replace(mine.stats, stored=0) == replace(other.stats, stored=0)
        kept = ("id", "time", "tool", "consistency", "reason", "verification")
        assert [getattr(mine, name) for name in kept] == [getattr(other, name) for name in kept]


@pytest.mark.parametrize("source", ["packs", "cow"])
@pytest.mark.parametrize("target", ["packs", "cow"])
async def test_between_all_formats(stores: Stores, source: str, target: str) -> None:
    one, other = stores(source), stores(target)
    records = await filled(one)
    result = await copy(one, other)
    assert result.copied == [record.id for record in records]
    same(one, other)
    sound(other)


async def test_only_differences_are_stored(stores: Stores) -> None:
    one, other = stores("packs"), stores("packs")
    await filled(one)
    await copy(one, other)
    for mine, theirs in zip(one.revisions(), other.revisions(), strict=True):
        assert theirs.stats.stored <= mine.stats.stored + 1024


async def test_again_copies_nothing(stores: Stores) -> None:
    one, other = stores("packs"), stores("packs")
    records = await filled(one)
    await copy(one, other)
    before = files(other)
    result = await copy(one, other)
    assert (result.copied, result.present) == ([], [record.id for record in records])
    assert files(other) == before


async def test_it_goes_on_where_it_stopped(stores: Stores) -> None:
    """Also when the source lost old revisions, and the target lost some that it had."""
    one, other = stores("packs"), stores("packs")
    source = MemorySource({"disk": disk("abcd")})
    first = await back_up(one, source)
    source.contents["disk"] = disk("abcX")
    second = await back_up(one, source)
    await copy(one, other)
    other.remove([first.id])
    source.contents["disk"] = disk("aYcX")
    third = await back_up(one, source)
    one.remove([second.id])
    result = await copy(one, other)
    assert result.copied == [third.id]
    assert [record.id for record in other.revisions()] == [second.id, third.id]
    assert content(other, other.record(third.id)) == disk("aYcX")


@pytest.mark.parametrize("kind", ["packs", "cow"])
async def test_what_others_rest_on_is_not_copied_again(stores: Stores, kind: str) -> None:
    """Source and target keep other revisions. One that the target has no more would have its files
    replaced there, in which a later one has frames.
    """
    one, other = stores("packs"), stores(kind)
    source = MemorySource()
    records = []
    for number, root in enumerate(("abcd", "aBcd", "aBCd", "aBCD", "ABCD")):
        source.contents = {"root": disk(root * 9), "data": disk("xY" if number else "xy")}
        records.append(await back_up(one, source, now=clock(START + timedelta(days=number))))
        if number == 3:
            await copy(one, other)
    third = other.record(records[2].id)
    kept = [content(other, third, name) for name in third.disks]
    other.remove([records[1].id, records[3].id])
    other.gc()
    one.remove([records[0].id, records[2].id])
    result = await copy(one, other)
    assert result.copied == [records[3].id, records[4].id]
    assert [content(other, third, name) for name in third.disks] == kept
    for mine in one.revisions()[1:]:
        copied = other.record(mine.id)
        assert content(other, copied, "root") == content(one, mine, "root")
    sound(other)


@pytest.mark.parametrize("kind", ["packs", "cow"])
async def test_a_copy_heals_the_target(stores: Stores, kind: str) -> None:
    """The next revision has a frame that is damaged there: it is read from the source."""
    one, other = stores("packs"), stores(kind)
    source = MemorySource({"disk": disk("abcd")})
    await back_up(one, source)
    await copy(one, other)
    damage_frame(other, other.revisions()[0], 0)
    await verify(other, other.revisions())
    assert other.damage()
    source.contents = {"disk": disk("aXcd")}
    await back_up(one, source)
    await copy(one, other)
    sound(other)
    for mine, theirs in zip(one.revisions(), other.revisions(), strict=True):
        assert content(other, theirs) == content(one, mine)


@pytest.mark.parametrize("damaged", [False, True])
async def test_a_state_that_a_crash_left_does_not_count(stores: Stores, damaged: bool) -> None:
    one, other = stores("packs"), stores("packs")
    records = await filled(one)
    await copy(one, other)
    left = other.layout.state(records[4].id)
    distrust(other, [records[4]], "by hand")
    before = left.read_bytes()
    other.remove([records[4].id])
    left.write_bytes(before[:-20] if damaged else before)
    await copy(one, other)
    same(one, other)


async def test_a_damaged_original_is_not_copied(stores: Stores) -> None:
    one, other = stores("packs"), stores("packs")
    source = MemorySource({"disk": disk("abcd")})
    first = await back_up(one, source)
    source.contents["disk"] = disk("abXd")
    second = await back_up(one, source)
    damage_frame(one, second, 2)
    with pytest.raises(Corrupt) as caught:
        await copy(one, other)
    assert (caught.value.revision, caught.value.offset) == (second.id, 2 * FRAME)
    assert [record.id for record in other.revisions()] == [first.id]
    sound(other)
    damage_frame(one, second, 2)  # flips it back
    assert (await copy(one, other)).copied == [second.id]
    same(one, other)


class Then:
    """Progress that does something as a revision begins to be copied, each thing once."""

    def __init__(self, *what: Callable[[], object]) -> None:
        self._what = list(what)

    def start(self, phase: Phase, total: int) -> None:
        if phase is Phase.COPY and self._what:
            self._what.pop(0)()

    def advance(self, count: int) -> None:
        """Nothing."""


async def three(repository: Repository) -> list[Record]:
    source = MemorySource()
    for day, frames in enumerate(("abcd", "aBcd", "aBCd")):
        source.contents = {"root": disk(frames), "data": disk(frames[::-1])}
        await back_up(repository, source, now=clock(START + timedelta(days=day)))
    return repository.revisions()


@pytest.mark.parametrize("kind", ["packs", "cow"])
async def test_what_is_removed_meanwhile_is_left_out(stores: Stores, kind: str) -> None:
    one, other = stores(kind), stores("packs")
    ids = [record.id for record in await three(one)]
    result = await copy(one, other, progress=Then(lambda: one.remove(ids[1:2])))
    assert (result.copied, result.removed) == ([ids[0], ids[2]], [ids[1]])
    same(one, other)
    sound(other)


async def test_a_source_that_goes_is_an_error(stores: Stores, tmp_path: Path) -> None:
    one, other = stores("packs"), stores("packs")
    await three(one)
    with pytest.raises(Corrupt, match="revisions/ is missing"):
        await copy(one, other, progress=Then(lambda: one.path.rename(tmp_path / "away")))


@pytest.mark.parametrize("kind", ["packs", "cow"])
async def test_two_copies_into_one_target(stores: Stores, kind: str) -> None:
    """Who waited looks again what is there."""
    one, other = stores("packs"), stores(kind)
    ids = [record.id for record in await three(one)]
    results = []

    async def run() -> None:
        results.append(await copy(one, Repository.open(other.path), wait_s=60))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        nursery.start_soon(run)
    assert sorted(each for result in results for each in result.copied) == ids
    assert [sorted([*result.copied, *result.present]) for result in results] == [ids, ids]
    same(one, other)
    sound(other)


async def test_a_writer_in_the_target(stores: Stores) -> None:
    one, other = stores("packs"), stores("packs")
    await filled(one)
    with other.writing(), pytest.raises(Busy):
        await copy(one, other)


async def test_onto_itself(packs: Repository) -> None:
    with pytest.raises(UsageError, match="same"):
        await copy(packs, Repository.open(packs.path))


async def test_a_backup_goes_on_in_the_copy(stores: Stores) -> None:
    """Bookmarks are copied, so the source's changes may be used there."""
    one, other = stores("packs"), stores("packs")
    source = MemorySource({"disk": disk("abcd")}, tracking=True)
    await back_up(one, source)
    await copy(one, other)
    source.contents["disk"][0] ^= 1
    made = await back_up(other, source)
    assert made.stats.read == FRAME
    assert content(other, made) == source.contents["disk"]


def test_what_is_missing() -> None:
    days = [record(n, START + timedelta(days=n)) for n in range(6)]
    assert missing(days, []) == days
    assert missing(days, days[:3]) == days[3:]
    assert missing(days, [days[0], days[2]]) == days[3:]
    assert missing(days[3:], days[:2]) == days[3:]
    assert missing(days, days) == []
    assert missing([], days) == []
    strangers = [record(7, START + timedelta(days=4, hours=1))]
    with pytest.raises(UsageError, match="newer revisions, and none of them is of this source"):
        missing(days, strangers)
    assert missing(days[5:], strangers) == days[5:]


def test_what_is_missing_after_a_clock_that_was_ahead() -> None:
    gone = record(1, START + timedelta(days=300))
    built = replace(record(3, START + timedelta(days=1)), parent=gone.id)
    more = [record(2, START), built, *(record(n, START + timedelta(days=n)) for n in (4, 5))]
    assert missing(more[1:], [gone]) == more[1:]
    assert missing(more, [gone]) == more[1:]  # the first was there, for all one can tell


async def test_differences_are_whole_frames_of_the_image(packs: Repository) -> None:
    source = MemorySource({"disk": disk("abcd", tail=10)})
    first = await back_up(packs, source)
    source.contents["disk"] = disk("aX.")
    second = await back_up(packs, source)
    small, big = packs.open_disk(second, "disk"), packs.open_disk(first, "disk")
    assert list(differences(big, None)) == [Extent(0, 4 * FRAME + 10)]
    assert list(differences(big, small)) == [Extent(FRAME, 3 * FRAME + 10)]
    assert list(differences(small, big)) == [Extent(FRAME, 2 * FRAME)]
    assert list(differences(small, small)) == []
    assert list(differences(small, None)) == [Extent(0, 2 * FRAME)]
    small.close()
    big.close()
