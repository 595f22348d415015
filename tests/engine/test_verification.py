"""Verification finds every damaged frame, names every revision it hits, and forgives."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from backyfs.engine.backup import back_up
from backyfs.engine.trust import distrust
from backyfs.engine.verification import Verdict, verify
from backyfs.model import FRAME, Extent, Trust
from backyfs.source.file import FileSource
from backyfs.store.contract import SharingImage
from backyfs.store.cow.table import hash_at
from backyfs.store.record import Record
from backyfs.store.repository import Repository
from tests.engine.checks import content, damage_frame, flip, sound
from tests.engine.conftest import Stores
from tests.engine.memory import MemorySource, disk, frame
from tests.engine.test_backup import Recorder


async def history(repository: Repository, *contents: str) -> list[Record]:
    source = MemorySource()
    made = []
    for frames in contents:
        source.contents = {"disk": disk(frames)}
        made.append(await back_up(repository, source))
    return made


def extents(verdict: Verdict) -> list[Extent | None]:
    return [item.extent for item in verdict.damage]


async def test_sound_revisions_become_verified(repository: Repository) -> None:
    records = await history(repository, "abcd", "abXd", "abXd..")
    at = datetime(2026, 5, 1, tzinfo=UTC)
    verdicts = await verify(repository, records, now=lambda: at)
    assert [verdict.sound for verdict in verdicts] == [True] * 3
    for record in records:
        state = repository.state(record)
        assert (state.trust, state.verified_at) == (Trust.VERIFIED, at)


async def test_quick_changes_nothing(repository: Repository) -> None:
    records = await history(repository, "abcd")
    assert (await verify(repository, records, quick=True))[0].sound
    assert repository.state(records[0]).trust is Trust.TRUSTED


async def test_a_distrusted_revision_that_is_sound_is_verified(packs: Repository) -> None:
    records = await history(packs, "abcd")
    distrust(packs, records, "moved by hand")
    assert packs.state(records[0]).why == "moved by hand"
    await verify(packs, records)
    assert packs.state(records[0]).trust is Trust.VERIFIED


async def test_a_bad_frame_is_named_in_every_revision_that_has_it(packs: Repository) -> None:
    records = await history(packs, "abcd", "abXd", "aYXd")
    damage_frame(packs, records[0], 1)
    verdicts = await verify(packs, records)
    assert extents(verdicts[0]) == extents(verdicts[1]) == [Extent(FRAME, FRAME)]
    assert verdicts[2].sound
    assert packs.state(records[0]).trust is Trust.TRUSTED
    assert packs.state(records[2]).trust is Trust.VERIFIED
    assert set(packs.damage()) == {records[0].id, records[1].id}


async def test_a_bad_frame_of_cow(stores: Stores) -> None:
    repository = stores("cow")
    records = await history(repository, "abcd", "abXd")
    damage_frame(repository, records[0], 2)
    verdicts = await verify(repository, records)
    assert extents(verdicts[0]) == [Extent(2 * FRAME, FRAME)]


async def test_the_next_revision_is_sound_though_it_shares_what_nothing_proves(
    stores: Stores,
) -> None:
    """One frame and the hash of another are hit: all of the group is lost, but not its blocks."""
    repository = stores("cow")
    source = MemorySource({"disk": disk("abcd")})
    first = await back_up(repository, source)
    damage_frame(repository, first, 2)
    flip(repository.layout.revisions / f"{first.id}.disk.sum", hash_at(1))
    await verify(repository, [first])
    second = await back_up(repository, source)
    verdicts = await verify(repository, [first, second])
    assert [verdict.sound for verdict in verdicts] == [False, True]
    assert content(repository, second) == disk("abcd")


async def test_the_last_short_frame(packs: Repository) -> None:
    source = MemorySource({"disk": disk("ab", tail=1000)})
    record = await back_up(packs, source)
    damage_frame(packs, record, 2)
    (verdict,) = await verify(packs, [record])
    assert extents(verdict) == [Extent(2 * FRAME, 1000)]


async def test_a_patch_is_bad_when_its_base_is(packs: Repository) -> None:
    source = MemorySource({"disk": disk("abcd")})
    first = await back_up(packs, source)
    source.contents["disk"][2 * FRAME : 2 * FRAME + 10] = b"0123456789"
    second = await back_up(packs, source)
    damage_frame(packs, first, 2)
    verdicts = await verify(packs, [first, second])
    assert [extents(verdict) for verdict in verdicts] == [[Extent(2 * FRAME, FRAME)]] * 2


async def test_what_reads_well_again_leaves_quarantine(packs: Repository) -> None:
    records = await history(packs, "abcd", "abXd")
    damage_frame(packs, records[0], 1)
    await verify(packs, records)
    assert packs.quarantine.bad()
    damage_frame(packs, records[0], 1)  # flips it back
    verdicts = await verify(packs, records)
    assert all(verdict.sound for verdict in verdicts)
    assert packs.quarantine.bad() == set()


async def test_a_base_that_reads_well_again_leaves_quarantine(packs: Repository) -> None:
    """Though the revision that held the base itself is gone."""
    source = MemorySource({"disk": disk("abcd")})
    first = await back_up(packs, source)
    source.contents["disk"][2 * FRAME : 2 * FRAME + 10] = b"0123456789"
    second = await back_up(packs, source)
    damage_frame(packs, first, 2)
    await verify(packs, [first, second])
    damage_frame(packs, first, 2)
    packs.remove([first.id])
    assert (await verify(packs, [second]))[0].sound
    assert packs.quarantine.bad() == set()


async def test_the_next_backup_heals_all_revisions(repository: Repository) -> None:
    """Found by verify, read from the source though it says nothing changed, whole again."""
    source = MemorySource({"disk": disk("abcdefgh")}, tracking=True)
    first = await back_up(repository, source)
    source.contents["disk"][6 * FRAME : 7 * FRAME] = frame("new")
    second = await back_up(repository, source)
    damage_frame(repository, second, 3)
    damage_frame(repository, second, 6)
    await verify(repository, [first, second])
    assert second.id in repository.damage()
    third = await back_up(repository, source)
    verdicts = await verify(repository, repository.revisions())
    assert [verdict.sound for verdict in verdicts] == [True] * 3
    assert content(repository, first) == disk("abcdefgh")
    assert content(repository, second) == content(repository, third) == source.contents["disk"]
    sound(repository)


def image_of(directory: Path, frames: str) -> dict[str, str]:
    """An image file with these frames, by the name of its disk."""
    path = directory / "disk.img"
    path.write_bytes(disk(frames))
    return {"disk": str(path)}


async def test_a_backup_with_a_list_of_changes_heals_too(
    repository: Repository, tmp_path: Path
) -> None:
    """`backup --changes`: the list leaves damaged frames out, and they are read all the same."""
    told = {"disk": [Extent(6 * FRAME, FRAME)]}
    paths = image_of(tmp_path, "abcdefgh")
    first = await back_up(repository, FileSource(paths))
    for number in (3, 6):
        damage_frame(repository, first, number)
    await verify(repository, [first])
    assert first.id in repository.damage()
    image_of(tmp_path, "abcdefXh")
    second = await back_up(repository, FileSource(paths, changes=told))
    assert second.stats.read == 2 * FRAME
    assert content(repository, second) == disk("abcdefXh")
    verdicts = await verify(repository, [first, second])
    assert extents(verdicts[0]) == [Extent(6 * FRAME, FRAME)]
    assert verdicts[1].sound


async def test_what_cannot_be_healed_stays_named_and_the_new_revision_is_whole(
    packs: Repository,
) -> None:
    source = MemorySource({"disk": disk("abcd")}, tracking=True)
    first = await back_up(packs, source)
    damage_frame(packs, first, 1)
    await verify(packs, [first])
    source.contents["disk"] = disk("aXcd")
    second = await back_up(packs, source)
    verdicts = await verify(packs, [first, second])
    assert extents(verdicts[0]) == [Extent(FRAME, FRAME)]
    assert verdicts[1].sound
    assert content(packs, second) == disk("aXcd")


async def test_shared_frames_are_read_once(packs: Repository) -> None:
    records = await history(packs, "abcd" * 10, "abcd" * 9 + "abcX", "." + "abcd" * 9)
    recorder = Recorder()
    await verify(packs, records, progress=recorder)
    ((_, total, done),) = recorder.phases
    # 40 frames, then the changed one, then a shift by one: all other letters at every place.
    assert total == done == (40 + 1 + 36) * FRAME


async def test_equal_content_stored_twice_is_read_twice(packs: Repository) -> None:
    """a, X, a again: the same hash in another place; only places count."""
    records = await history(packs, "abcd", "Xbcd", "abcd")
    damage_frame(packs, records[2], 0)
    verdicts = await verify(packs, [records[0], records[2]])
    assert verdicts[0].sound
    assert extents(verdicts[1]) == [Extent(0, FRAME)]


async def test_several_disks(packs: Repository) -> None:
    source = MemorySource({"a": disk("ab"), "b": disk("xyz")})
    records = [await back_up(packs, source)]
    source.contents = {"b": disk("xyZ"), "c": disk("q")}
    records.append(await back_up(packs, source))
    damage_frame(packs, records[0], 1, "b")
    verdicts = await verify(packs, records)
    assert [[item.disk for item in v.damage] for v in verdicts] == [["b"], ["b"]]


async def test_a_missing_map_is_damage_of_its_revision_only(packs: Repository) -> None:
    records = await history(packs, "abcd", "abXd")
    (packs.layout.revisions / f"{records[0].id}.disk.map").unlink()
    verdicts = await verify(packs, records)
    assert extents(verdicts[0]) == [None]
    assert verdicts[1].sound


async def test_a_flipped_record_is_damage(packs: Repository) -> None:
    records = await history(packs, "abcd")
    flip(packs.layout.record(records[0].id), 100)
    (verdict,) = await verify(packs, records)
    assert not verdict.sound


async def test_a_revision_removed_meanwhile(packs: Repository) -> None:
    records = await history(packs, "abcd", "abXd")
    packs.remove([records[0].id])
    verdicts = await verify(packs, records)
    assert (verdicts[0].removed, verdicts[0].sound, verdicts[1].sound) == (True, False, True)


async def test_a_writer_does_not_hold_it_up(packs: Repository) -> None:
    records = await history(packs, "abcd")
    with packs.writing(), trio.fail_after(10):
        assert (await verify(packs, records))[0].sound


async def test_a_map_that_names_the_wrong_frames_is_found(packs: Repository) -> None:
    """Each frame is sound, but two have changed places: the tree of hashes tells."""
    from dataclasses import replace

    from blake3 import blake3

    from backyfs.store.packs.extents import ExtentMap
    from backyfs.store.packs.runs import Run, Runs

    (record,) = await history(packs, "abcd")
    path = packs.layout.revisions / f"{record.id}.disk.map"
    old = ExtentMap.decode(path.read_bytes(), "map")
    runs = [Run(n, 1, 0, {0: 1, 1: 0}.get(n, n)) for n in range(4)]
    data = ExtentMap(old.size, old.segments, Runs(runs), old.groups).encode(packs.uuid)
    path.chmod(0o640)
    path.write_bytes(data)
    files = {path.name: blake3(data).hexdigest()}
    forged = replace(record, disks={"disk": replace(record.disks["disk"], files=files)})
    packs.layout.record(record.id).unlink()
    packs.layout.record(record.id).write_bytes(forged.encode())
    (verdict,) = await verify(packs, packs.revisions())
    assert extents(verdict) == [Extent(0, 4 * FRAME)]
    assert "digest" in verdict.damage[0].reason


async def test_damage_is_reported_though_it_cannot_be_recorded(
    packs: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a read-only medium."""

    def refuse(*args: object, **kwargs: object) -> bool:
        raise OSError(30, "Read-only file system")

    records = await history(packs, "abcd", "abXd", ".bXd", ".bXd" + "e")
    damage_frame(packs, records[0], 1)
    damage_frame(packs, records[0], 0)
    monkeypatch.setattr(packs.quarantine, "add", refuse)
    verdicts = await verify(packs, records)
    assert [extents(verdict) for verdict in verdicts] == [
        [Extent(0, 2 * FRAME)],
        [Extent(0, 2 * FRAME)],
        [Extent(FRAME, FRAME)],
        [Extent(FRAME, FRAME)],
    ]


async def test_sharing_is_told_by_place(packs: Repository) -> None:
    records = await history(packs, "abcd", "abXd", "abXd....e")
    images = [packs.open_disk(record, "disk") for record in records]
    assert all(isinstance(image, SharingImage) for image in images)
    one, two, three = (image for image in images if isinstance(image, SharingImage))
    assert list(two.unshared(one)) == [Extent(2 * FRAME, FRAME)]
    assert list(one.unshared(two)) == [Extent(2 * FRAME, FRAME)]
    assert list(three.unshared(two)) == [Extent(8 * FRAME, FRAME)]
    assert list(two.unshared(three)) == []
    for image in images:
        image.close()


async def test_cancelled_it_judges_nothing(packs: Repository) -> None:
    records = await history(packs, "abcd" * 64)
    with trio.CancelScope() as scope:
        recorder = Recorder()
        recorder.advance = lambda count: scope.cancel()  # type: ignore[method-assign]
        await verify(packs, records, progress=recorder)
    assert scope.cancelled_caught
    assert packs.state(records[0]).trust is Trust.TRUSTED


async def test_hashes_that_do_not_lead_to_the_digest(packs: Repository) -> None:
    """All frames read well, but it is another disk that the record tells of."""
    (record,) = await history(packs, "abcd")
    other = replace(record.disks["disk"], digest="0" * 64)
    packs.layout.record(record.id).write_bytes(replace(record, disks={"disk": other}).encode())
    packs = Repository.open(packs.path)
    (verdict,) = await verify(packs, packs.revisions())
    assert [item.reason for item in verdict.damage] == [
        "the group hashes do not lead to the digest"
    ]
