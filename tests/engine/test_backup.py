"""A backup: what it stores, what it reads, what it says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import trio

from backyfs.config.schedule import DAILY
from backyfs.engine.backup import back_up
from backyfs.engine.progress import Phase
from backyfs.engine.trust import distrust
from backyfs.errors import Busy, SourceUnavailable, UsageError
from backyfs.model import FRAME, Consistency, Extent
from backyfs.source.contract import Backups
from backyfs.source.throttle import Rate, ThrottledSource
from backyfs.store.repository import Repository
from tests.engine.checks import content, files, sound
from tests.engine.conftest import Stores
from tests.engine.memory import MemorySource, disk, frame


@pytest.mark.parametrize("tail", [0, 1, 511, 4096, FRAME - 1])
async def test_every_byte_comes_back(repository: Repository, tail: int) -> None:
    source = MemorySource({"disk": disk("ab..c.aa", tail=tail)})
    record = await back_up(repository, source)
    assert content(repository, record) == source.contents["disk"]
    assert record.size == 8 * FRAME + tail
    assert record.disks["disk"].source == {"type": "memory", "bookmark": {"snapshot": 1}}
    assert (source.entered, source.left, source.published) == (1, 1, 1)
    sound(repository)


async def test_an_empty_disk_and_a_disk_of_zeros(repository: Repository) -> None:
    source = MemorySource({"empty": bytearray(), "zeros": bytearray(3 * FRAME + 5)})
    record = await back_up(repository, source)
    assert content(repository, record, "empty") == b""
    assert content(repository, record, "zeros") == bytes(3 * FRAME + 5)
    assert record.stats.changed == 0
    sound(repository)


async def test_several_disks_are_one_revision(repository: Repository) -> None:
    source = MemorySource(
        {"root": disk("ab.c"), "data": disk("x" * 5, tail=77), "swap": disk("..")}
    )
    first = await back_up(repository, source)
    source.contents["data"][FRAME : 2 * FRAME] = frame("new")
    second = await back_up(repository, source)
    assert list(second.disks) == ["root", "data", "swap"]
    for name, data in source.contents.items():
        assert content(repository, second, name) == data
    assert content(repository, first, "data") == disk("x" * 5, tail=77)
    assert second.parent == first.id
    sound(repository)


async def test_a_disk_that_comes_and_one_that_goes(repository: Repository) -> None:
    source = MemorySource({"a": disk("ab"), "b": disk("cd")})
    first = await back_up(repository, source)
    source.contents = {"b": disk("cd"), "c": disk("ef")}
    second = await back_up(repository, source)
    assert list(second.disks) == ["b", "c"]
    assert content(repository, second, "c") == disk("ef")
    assert content(repository, first, "a") == disk("ab")
    sound(repository)


@pytest.mark.parametrize("old", [0, 1, FRAME - 1, FRAME, 3 * FRAME, 3 * FRAME + 100])
@pytest.mark.parametrize("new", [0, 1, FRAME - 1, FRAME, 3 * FRAME, 3 * FRAME + 100])
async def test_any_size_may_follow_any_other(packs: Repository, old: int, new: int) -> None:
    source = MemorySource({"disk": disk("abcd")[:old]}, tracking=True)
    await back_up(packs, source)
    source.contents["disk"] = disk("abcd")[:new]
    second = await back_up(packs, source)
    assert content(packs, second) == disk("abcd")[:new]
    source.contents["disk"] = disk("abcd")[:new].ljust(5 * FRAME, b"\0")
    third = await back_up(packs, source)
    assert content(packs, third) == source.contents["disk"]


async def test_shrink_then_grow_shows_zeros(repository: Repository) -> None:
    source = MemorySource({"disk": disk("abcd")}, tracking=True)
    await back_up(repository, source)
    source.contents["disk"] = disk("a", tail=0)[: FRAME // 2]
    await back_up(repository, source)
    source.contents["disk"] = source.contents["disk"].ljust(4 * FRAME, b"\0")
    grown = await back_up(repository, source)
    assert content(repository, grown) == disk("a")[: FRAME // 2].ljust(4 * FRAME, b"\0")


async def test_what_became_zero_is_zero(repository: Repository) -> None:
    source = MemorySource({"disk": disk("abcd")})
    await back_up(repository, source)
    source.contents["disk"] = disk("a..d")
    record = await back_up(repository, source)
    assert content(repository, record) == disk("a..d")
    sound(repository)


# What is read and written


async def test_holes_are_not_read(packs: Repository) -> None:
    source = MemorySource({"disk": disk("a" + "." * 100 + "b")})
    record = await back_up(packs, source, verify=False)
    assert source.read_bytes == record.stats.read == 2 * FRAME
    assert record.stats.changed == 2 * FRAME


async def test_a_change_list_is_all_that_is_read(repository: Repository) -> None:
    source = MemorySource({"disk": disk("abcdefgh")}, tracking=True)
    await back_up(repository, source)
    source.contents["disk"][3 * FRAME + 5000] ^= 1
    source.contents["disk"][6 * FRAME : 7 * FRAME] = bytes(FRAME)
    source.read_bytes = 0
    record = await back_up(repository, source, verify=False)
    assert source.since == {"disk": {"snapshot": 1}}
    assert source.read_bytes == record.stats.read == 2 * FRAME
    assert content(repository, record) == source.contents["disk"]


async def test_an_unchanged_backup_writes_next_to_nothing(repository: Repository) -> None:
    source = MemorySource({"disk": disk("abcdefgh" * 8)}, tracking=True)
    await back_up(repository, source)
    before = files(repository)
    record = await back_up(repository, source)
    assert record.stats.changed == 0
    assert record.stats.read == 0
    added = {name: size for name, size in files(repository).items() if before.get(name) != size}
    assert sum(added.values()) < 65536
    assert content(repository, record) == source.contents["disk"]


async def test_changes_of_the_caller_are_believed(repository: Repository) -> None:
    source = MemorySource({"disk": disk("abcdefgh")})
    await back_up(repository, source)
    source.contents["disk"][5 * FRAME] ^= 1
    source.read_bytes = 0
    record = await back_up(
        repository, source, changes={"disk": [Extent(5 * FRAME, 1)]}, verify=False
    )
    assert source.read_bytes == FRAME
    assert content(repository, record) == source.contents["disk"]


async def test_changes_of_the_caller_need_the_same_size(packs: Repository) -> None:
    source = MemorySource({"disk": disk("abcd")})
    await back_up(packs, source)
    source.contents["disk"] = disk("abcdXY")
    record = await back_up(packs, source, changes={"disk": []})
    assert content(packs, record) == source.contents["disk"]


async def test_changes_without_a_parent_mean_nothing(packs: Repository) -> None:
    source = MemorySource({"disk": disk("abcd")})
    record = await back_up(packs, source, changes={"disk": []})
    assert content(packs, record) == source.contents["disk"]


async def test_changes_behind_the_end_of_the_disk_are_of_another_one(packs: Repository) -> None:
    source = MemorySource({"disk": disk("abcd")})
    await back_up(packs, source)
    ids = [record.id for record in packs.revisions()]
    with pytest.raises(UsageError, match="change list of disk reaches beyond the disk of 262144"):
        await back_up(packs, source, changes={"disk": [Extent(3 * FRAME, FRAME + 1)]})
    assert [record.id for record in packs.revisions()] == ids
    record = await back_up(packs, source, changes={"disk": [Extent(3 * FRAME, FRAME)]})
    assert record.stats.read == FRAME


async def test_changes_for_a_disk_that_is_not_there(packs: Repository) -> None:
    source = MemorySource({"disk": disk("a")})
    with pytest.raises(UsageError, match="'other'"):
        await back_up(packs, source, changes={"other": []})
    assert packs.revisions() == []


async def test_another_source_type_gets_no_bookmark(packs: Repository) -> None:
    source = MemorySource({"disk": disk("abcd")}, tracking=True)
    await back_up(packs, source)
    await back_up(packs, replace(source, type="other"))
    assert source.since == {}


# What the parent must be


async def test_a_distrusted_parent_is_not_built_on_unread(repository: Repository) -> None:
    """The source would say that nothing changed since the wrong revision."""
    source = MemorySource({"disk": disk("abcd")}, tracking=True)
    first = await back_up(repository, source)
    source.contents["disk"] = disk("abXd")
    source.kept[1] = {"disk": bytes(source.contents["disk"])}
    distrust(repository, [first], "the source lied")
    second = await back_up(repository, source, changes={"disk": []})
    assert source.since == {}
    assert content(repository, second) == disk("abXd")
    assert second.parent == first.id


async def test_an_older_revision_that_the_source_remembers(repository: Repository) -> None:
    """What it knew of the newest one is gone: better the changes since an older one than a scan."""
    source = MemorySource({"disk": disk("abcd")}, tracking=True)
    first = await back_up(repository, source)
    source.contents["disk"] = disk("abXd")
    await back_up(repository, source)
    source.contents["disk"] = disk("aYXd")
    del source.kept[2]
    third = await back_up(repository, source, changes={"disk": []})
    assert (third.parent, third.stats.read) == (first.id, 2 * FRAME)
    assert content(repository, third) == disk("aYXd")
    del source.kept[1], source.kept[3]
    fourth = await back_up(repository, source)
    assert (fourth.parent, fourth.stats.read) == (third.id, 4 * FRAME)


async def test_nothing_is_looked_for_behind_a_distrusted_one(repository: Repository) -> None:
    source = MemorySource({"disk": disk("abcd")}, tracking=True)
    await back_up(repository, source)
    second = await back_up(repository, source)
    third = await back_up(repository, source)
    del source.kept[2], source.kept[3]
    distrust(repository, [second], "a whim")
    fourth = await back_up(repository, source)
    assert (fourth.parent, fourth.stats.read) == (third.id, 4 * FRAME)


async def test_a_session_is_entered_and_left(repository: Repository) -> None:
    source = MemorySource({"disk": disk("abcd")})
    told: list[Backups] = []

    class Prepared(MemorySource):
        @contextlib.contextmanager
        def session(self, backups: Backups) -> Iterator[MemorySource]:
            told.append(backups)
            yield source
            assert source.published == len(told)
            assert source.left == len(told)

    first = await back_up(repository, Prepared())
    second = await back_up(repository, ThrottledSource(Prepared(), Rate(1 << 40)))
    assert content(repository, second) == disk("abcd")
    assert [backups.repository for backups in told] == [repository.uuid] * 2
    assert [set(backups.revisions) for backups in told] == [set(), {first.id}]


async def test_a_parent_with_broken_files_is_passed_over(packs: Repository) -> None:
    source = MemorySource({"disk": disk("abcd")}, tracking=True)
    first = await back_up(packs, source)
    source.contents["disk"] = disk("abXd")
    second = await back_up(packs, source)
    (packs.layout.revisions / f"{second.id}.disk.map").unlink()
    source.contents["disk"] = disk("abYd")
    third = await back_up(packs, source, changes={"disk": []})
    assert third.parent == first.id
    assert third.seq == second.seq + 1
    assert content(packs, third) == disk("abYd")


async def test_a_torn_parent_is_read_whole(packs: Repository) -> None:
    source = MemorySource({"disk": disk("abcd")}, live=True, tracking=True)
    count = 0

    def change(name: str, offset: int, length: int) -> None:
        nonlocal count
        count += 1
        source.contents["disk"][0] ^= count == 2

    source.before_read = change
    torn = await back_up(packs, source)
    assert torn.consistency is Consistency.TORN
    record = await back_up(packs, source)
    assert source.since == {}
    assert content(packs, record) == source.contents["disk"]


# What it says


async def test_the_record_says_how_it_was_made(packs: Repository) -> None:
    now = datetime(2026, 11, 21, 22, 1, 12, tzinfo=UTC)
    source = MemorySource({"disk": disk("ab.c")})
    record = await back_up(packs, source, tags=["daily", "manual:x"], now=lambda: now)
    assert record.time == now
    assert record.id.startswith("20261121T220112Z-")
    assert record.tags == ("daily", "manual:x")
    assert record.consistency is Consistency.CRASH
    assert record.reason == "made in memory"
    assert record.verification == "full"
    assert record.stats.read == record.stats.changed == record.stats.verified == 3 * FRAME
    assert 3 * FRAME < record.stats.stored < 4 * FRAME
    assert record.stats.torn_frames == 0
    assert packs.record(record.id) == record


async def test_unverified_is_recorded(packs: Repository) -> None:
    source = MemorySource({"disk": disk("ab.c")})
    record = await back_up(packs, source, verify=False)
    assert (record.verification, record.stats.verified) == ("none", 0)
    assert source.read_bytes == 3 * FRAME


async def test_tags_must_be_in_the_schedule(packs: Repository) -> None:
    source = MemorySource({"disk": disk("a")})
    with pytest.raises(UsageError, match="'hourli'"):
        await back_up(packs, source, tags=["hourli"], schedule=DAILY)
    assert source.entered == 0
    await back_up(packs, source, tags=["daily", "manual:a"], schedule=DAILY)
    record = await back_up(packs, source, tags=["hourli"], schedule=DAILY, force=True)
    assert record.tags == ("hourli",)


async def test_an_impossible_tag_is_refused_even_by_force(packs: Repository) -> None:
    with pytest.raises(UsageError):
        await back_up(packs, MemorySource({"disk": disk("a")}), tags=["a/b"], force=True)


class Recorder:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.phases: list[tuple[Phase, int, int]] = []

    def start(self, phase: Phase, total: int) -> None:
        self.phases.append((phase, total, 0))

    def advance(self, count: int) -> None:
        phase, total, done = self.phases[-1]
        self.phases[-1] = (phase, total, done + count)


async def test_progress_counts_each_phase_to_its_end(packs: Repository) -> None:
    recorder = Recorder()
    source = MemorySource({"a": disk("ab.c" * 20), "b": disk(".x", tail=9)})
    await back_up(packs, source, progress=recorder)
    size = 82 * FRAME + 9
    data = 61 * FRAME + 9
    assert recorder.phases == [
        (Phase.BACKUP, size, size),
        (Phase.STORED, data, data),
        (Phase.SOURCE, data, data),
    ]


# Locks


async def test_a_second_backup_is_busy_at_once(packs: Repository) -> None:
    source = MemorySource({"disk": disk("a")})
    with packs.writing(), pytest.raises(Busy):
        await back_up(packs, source)
    assert source.entered == 0


async def test_waiting_for_the_lock(packs: Repository) -> None:
    source = MemorySource({"disk": disk("a")})
    async with trio.open_nursery() as nursery:
        with packs.writing():
            nursery.start_soon(lambda: back_up(packs, source, wait_s=20))
            await trio.sleep(0.3)
            assert source.entered == 0
    assert len(packs.revisions()) == 1


async def test_waiting_ends(packs: Repository) -> None:
    with packs.writing(), pytest.raises(Busy):
        await back_up(packs, MemorySource({"disk": disk("a")}), wait_s=0.3)


async def test_waiting_can_be_cancelled(packs: Repository) -> None:
    with packs.writing(), trio.move_on_after(0.1) as scope:
        await back_up(packs, MemorySource({"disk": disk("a")}), wait_s=3600)
    assert scope.cancelled_caught


async def test_a_source_without_disks_is_unavailable(packs: Repository) -> None:
    with pytest.raises(SourceUnavailable, match="no disks"):
        await back_up(packs, MemorySource({}))
    assert packs.revisions() == []


async def test_both_formats_have_equal_digests(stores: Stores) -> None:
    source = MemorySource({"disk": disk("ab.cd..e", tail=1234)})
    records = [await back_up(stores(store), source) for store in ("packs", "cow")]
    assert records[0].disks["disk"].digest == records[1].disks["disk"].digest
