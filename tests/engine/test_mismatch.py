"""A source that leaves something out of its change list: caught, kept, doubted, put right."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import trio

from backyfs.config import DAILY
from backyfs.engine import mismatch, sampling
from backyfs.engine.backup import back_up
from backyfs.engine.clock import utc_now
from backyfs.engine.copying import copy
from backyfs.engine.health import Expected, Severity, examine
from backyfs.engine.sampling import Sampling
from backyfs.engine.scheduling.history import History, observe
from backyfs.engine.scheduling.processes import contents_of
from backyfs.engine.trust import distrust, trust
from backyfs.engine.verification import verify
from backyfs.errors import Corrupt, NoSpace
from backyfs.model import FRAME, Consistency, Extent, Trust
from backyfs.source.contract import Bookmark
from backyfs.store import lock
from backyfs.store.fs import Fs
from backyfs.store.record import DiskRecord, Record, Stats
from backyfs.store.repository import Repository
from tests.engine.checks import content, sound
from tests.engine.conftest import Stores
from tests.engine.lying import LyingSource
from tests.engine.memory import MemoryDisk, MemorySource, disk, frame
from tests.engine.revisions import START, record
from tests.engine.test_faults import CancelAtStep

ALL = Sampling(share=1.0)
NONE = Sampling(share=0.0)
ZERO = bytes(FRAME)


def lying(frames: str = "abcd....", tail: int = 700) -> LyingSource:
    return LyingSource({"disk": disk(frames, tail=tail)})


# It is caught


@pytest.mark.parametrize(
    ("number", "data"),
    [
        pytest.param(1, frame("x"), id="other data"),
        pytest.param(2, ZERO, id="data that became zero"),
        pytest.param(5, frame("x"), id="data in a hole"),
        pytest.param(8, frame("x"), id="the short last frame"),
    ],
)
async def test_a_lie_is_caught(repository: Repository, number: int, data: bytes) -> None:
    source = lying()
    first = await back_up(repository, source)
    before = bytes(source.contents["disk"])
    source.put(number, data)
    record = await back_up(repository, source, sampling=ALL)
    assert content(repository, record) == before  # so it is wrong
    assert (record.trust, record.verification) == (Trust.DISTRUSTED, "sample")
    assert record.stats.wrong_frames == 1
    assert record.reason.startswith("1 of 9 sampled frames differ from the source; ")
    assert repository.state(record).lasting
    assert source.published == 2

    report = repository.reports.read(record.id)
    assert (report.base, report.wrong_frames, report.sampled_frames) == (first.id, 1, 9)
    length = min(FRAME, len(before) - number * FRAME)
    (found,) = report.frames
    assert (found.disk, found.offset, found.length) == ("disk", number * FRAME, length)
    stem = repository.layout.reports / f"{record.id}.disk.{number * FRAME}"
    assert stem.with_name(stem.name + ".source").read_bytes() == data[:length]
    assert stem.with_name(stem.name + ".stored").read_bytes() == before[number * FRAME :][:length]
    sound(repository)


async def test_the_next_backup_reads_everything_and_is_trusted(repository: Repository) -> None:
    source = lying()
    await back_up(repository, source)
    source.put(1, ZERO)
    await back_up(repository, source, sampling=ALL)
    second = await back_up(repository, source, sampling=ALL)
    assert source.since == {}
    assert content(repository, second) == source.contents["disk"]
    assert (second.trust, second.verification) == (Trust.TRUSTED, "full")
    assert (second.stats.believed, second.stats.sampled) == (0, 0)
    source.omitted.clear()
    source.contents["disk"][3 * FRAME] ^= 1
    third = await back_up(repository, source, sampling=ALL)
    assert source.since
    assert (third.trust, third.verification) == (Trust.TRUSTED, "sample")
    assert third.stats.wrong_frames == 0
    assert content(repository, third) == source.contents["disk"]


async def test_what_is_right_is_only_counted(packs: Repository) -> None:
    source = MemorySource({"disk": disk("abcd....", tail=700), "b": disk("xy")}, tracking=True)
    first = await back_up(packs, source)
    assert (first.verification, first.stats.believed) == ("full", 0)
    source.contents["disk"][FRAME] ^= 1
    source.read_bytes = 0
    record = await back_up(packs, source)
    assert (record.trust, record.verification) == (Trust.TRUSTED, "sample")
    size = 9 * FRAME + 700
    assert record.stats.believed == record.stats.sampled == size
    assert (record.stats.sampled_frames, record.stats.sample_cut) == (10, False)
    assert record.stats.verified == FRAME
    assert source.read_bytes == 2 * FRAME + size  # what changed twice, all else once
    assert packs.reports.revisions() == []
    assert packs.record(record.id) == record


async def test_the_time_limit_is_recorded(packs: Repository) -> None:
    source = lying()
    await back_up(packs, source)
    times = iter(range(1000))
    record = await back_up(
        packs, source, sampling=Sampling(1.0, 0.5, clock=lambda: float(next(times)))
    )
    assert (record.stats.sampled, record.stats.sample_cut) == (0, True)
    assert record.stats.believed == len(source.contents["disk"])


async def test_when_nothing_is_sampled(packs: Repository) -> None:
    """Not of a live source, whose changes are no lies; not without verification; not unasked."""
    source = lying()
    await back_up(packs, source)
    source.put(1, ZERO)
    for live, check, setting in [(True, True, ALL), (False, False, ALL), (False, True, NONE)]:
        source.live = live
        record = await back_up(packs, source, verify=check, sampling=setting)
        assert (record.trust, record.stats.sampled) == (Trust.TRUSTED, 0)
        assert record.verification == ("sample" if check else "none")
        assert record.stats.believed == len(source.contents["disk"])


async def test_only_the_disk_that_was_not_read_is_sampled(packs: Repository) -> None:
    source = lying()
    await back_up(packs, source)
    source.contents["new"] = disk("xyz")
    record = await back_up(packs, source, sampling=ALL)
    assert record.stats.believed == record.stats.sampled == 8 * FRAME + 700


class Moody(MemorySource):
    """A snapshot whose second frame reads otherwise when it is first asked for."""

    def _disk(self, name: str, number: int, since: Mapping[str, Bookmark]) -> MemoryDisk:
        made = super()._disk(name, number, since)

        class MoodyDisk(MemoryDisk):
            asked = 0

            def read(self, offset: int, length: int) -> bytes:
                data = bytearray(super().read(offset, length))
                if offset <= FRAME < offset + length and self.bookmark != {"snapshot": 1}:
                    data[FRAME - offset] ^= self.asked == 0
                    self.asked += 1
                return bytes(data)

        data = bytes(self.contents[name])
        return MoodyDisk(self, name, data, made.bookmark, made.changed())


async def test_a_source_that_reads_differently_is_torn_and_no_liar(packs: Repository) -> None:
    source = Moody({"disk": disk("abcd")}, tracking=True)
    await back_up(packs, source)
    record = await back_up(packs, source, sampling=ALL)
    assert (record.trust, record.consistency) == (Trust.TRUSTED, Consistency.TORN)
    assert (record.stats.torn_frames, record.stats.wrong_frames) == (1, 0)
    assert packs.reports.revisions() == []


async def test_the_usual_sample_catches_most_of_many_lies(
    packs: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the whole engine, at 10 % of 200 frames: 20 lies are found in 9 of 10 cases."""
    monkeypatch.setattr(sampling, "FRAMES_MIN", 1)
    caught = 0
    for seed in range(8):
        source = LyingSource({"disk": bytearray()})
        source.contents["disk"] += frame("a") * 200
        await back_up(packs, source)
        for number in random.Random(seed).sample(range(200), 20):
            source.put(number, ZERO)
        setting = Sampling(0.1, rng=random.Random(seed))
        record = await back_up(packs, source, sampling=setting)
        assert record.stats.sampled_frames == 20
        caught += record.trust is Trust.DISTRUSTED
        packs.remove([r.id for r in packs.revisions()], force=True)
    assert caught >= 5


# Whom it speaks against


async def test_older_revisions_that_took_the_frame_over_are_doubted(
    repository: Repository,
) -> None:
    """The lie began two revisions before it was found; only the first one had read the frame."""
    source = lying()
    full = await back_up(repository, source)
    second = await back_up(repository, source, sampling=NONE)
    source.put(1, ZERO)
    third = await back_up(repository, source, sampling=NONE)
    fourth = await back_up(repository, source, sampling=ALL)
    assert repository.reports.read(fourth.id).doubted == (third.id, second.id)
    trusts = [repository.state(record).trust for record in (full, second, third, fourth)]
    assert trusts == [Trust.TRUSTED, *[Trust.DISTRUSTED] * 3]
    assert repository.state(third).lasting
    assert fourth.id in repository.state(third).why


async def test_a_revision_that_stored_the_frame_saw_it(packs: Repository) -> None:
    source = lying()
    await back_up(packs, source)
    source.contents["disk"][FRAME : 2 * FRAME] = frame("new")
    stored = await back_up(packs, source, sampling=NONE)
    taken = await back_up(packs, source, sampling=NONE)
    source.put(1, ZERO)
    wrong = await back_up(packs, source, sampling=ALL)
    assert packs.reports.read(wrong.id).doubted == (taken.id,)
    assert packs.state(stored).trust is Trust.TRUSTED


async def test_each_wrong_frame_speaks_for_itself(packs: Repository) -> None:
    source = lying()
    await back_up(packs, source)
    middle = await back_up(packs, source, sampling=NONE)
    source.contents["disk"][FRAME : 2 * FRAME] = frame("new")
    stored = await back_up(packs, source, sampling=NONE)
    source.put(1, ZERO)
    source.put(6, frame("x"))
    wrong = await back_up(packs, source, sampling=ALL)
    assert wrong.stats.wrong_frames == 2
    assert packs.reports.read(wrong.id).doubted == (stored.id, middle.id)


async def test_where_the_history_ends_nobody_knows(packs: Repository) -> None:
    source = lying()
    first = await back_up(packs, source)
    second = await back_up(packs, source, sampling=NONE)
    packs.remove([first.id])
    source.put(1, ZERO)
    wrong = await back_up(packs, source, sampling=ALL)
    assert packs.reports.read(wrong.id).doubted == (second.id,)


async def test_a_newer_one_than_the_base_is_doubted_too(packs: Repository) -> None:
    """The source has forgotten the newest one, so that the backup is built on the one before."""
    source = lying()
    first = await back_up(packs, source)
    second = await back_up(packs, source, sampling=NONE)
    del source.kept[2]
    source.put(1, ZERO)
    wrong = await back_up(packs, source, sampling=ALL)
    assert wrong.parent == first.id
    assert (packs.reports.read(wrong.id).base, wrong.trust) == (first.id, Trust.DISTRUSTED)
    assert packs.reports.read(wrong.id).doubted == (second.id,)


async def test_who_cannot_be_read_is_doubted(packs: Repository) -> None:
    source = lying()
    await back_up(packs, source)
    second = await back_up(packs, source, sampling=NONE)
    source.contents["disk"][0] ^= 1
    third = await back_up(packs, source, sampling=NONE)
    wrong = [
        sampling.Wrong("disk", Extent(5 * FRAME, FRAME), "00" * 32, "11" * 32, b""),
        sampling.Wrong("other", Extent(0, FRAME), "00" * 32, "11" * 32, b""),
    ]
    (packs.layout.revisions / next(iter(second.disks["disk"].files))).chmod(0o600)
    (packs.layout.revisions / next(iter(second.disks["disk"].files))).write_bytes(b"rotten")
    assert mismatch.doubted(packs, wrong) == [third, second]
    packs.remove([second.id, third.id], force=True)
    assert mismatch.doubted(packs, wrong) == []


# Nothing but a person lifts it


async def test_verifying_stored_bytes_does_not_lift_it(packs: Repository) -> None:
    source = lying()
    await back_up(packs, source)
    source.put(1, ZERO)
    record = await back_up(packs, source, sampling=ALL)
    (verdict,) = await verify(packs, [record])
    assert verdict.sound
    state = packs.state(record)
    assert (state.trust, state.lasting) == (Trust.DISTRUSTED, True)
    assert state.verified_at is not None
    distrust(packs, [record], "by hand")
    await verify(packs, [record])
    assert packs.state(record).trust is Trust.DISTRUSTED
    trust(packs, [record])
    state = packs.state(record)
    assert (state.trust, state.lasting, state.why) == (Trust.TRUSTED, False, "")
    assert packs.reports.revisions() == [record.id]


async def test_the_scheduler_does_not_verify_it_again_and_again(packs: Repository) -> None:
    source = lying()
    first = await back_up(packs, source, now=lambda: utc_now() - timedelta(hours=1))
    source.put(1, ZERO)
    record = await back_up(packs, source, sampling=ALL)
    contents = contents_of(packs.path)
    assert contents.quarantined == 1
    history = observe(History(), contents.revisions, steady=0, wall=utc_now().timestamp())
    assert history.distrusted == ""
    assert history.good is not None
    assert history.good.id == first.id
    assert history.last is not None
    assert history.last.id == record.id
    distrust(packs, [first], "by hand")
    again = observe(History(), contents_of(packs.path).revisions, steady=0, wall=0)
    assert again.distrusted == first.id


async def test_a_copy_is_as_distrusted_as_its_original(stores: Stores) -> None:
    mine, other = stores("packs"), stores("packs")
    source = lying()
    await back_up(mine, source)
    source.put(1, ZERO)
    await back_up(mine, source, sampling=ALL)
    distrust(mine, mine.revisions()[:1], "by hand")
    await copy(mine, other)
    states = [[r.state(record) for record in r.revisions()] for r in (mine, other)]
    assert states[0] == states[1]
    assert [state.lasting for state in states[1]] == [False, True]


async def test_check_says_so_until_the_report_is_gone(packs: Repository) -> None:
    source = lying()
    await back_up(packs, source)
    source.put(1, ZERO)
    record = await back_up(packs, source, sampling=ALL)
    await back_up(packs, source)

    def found() -> dict[str, tuple[Severity, str]]:
        health = examine(Expected("vm", packs.path, DAILY), utc_now(), lock.Held.now())
        return {f.kind: (f.severity, f.text) for f in health.findings}

    severity, text = found()["mismatch"]
    assert severity is Severity.WARNING
    assert record.id in text
    packs.reports.path(record.id).write_bytes(b"rotten")
    assert "mismatch" in found()
    for path in packs.layout.reports.glob(f"{record.id}.*"):
        path.unlink()
    assert found().keys() == {"distrusted"}


# The evidence


async def test_evidence_is_bounded(packs: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    source = LyingSource({"disk": bytearray(100 * FRAME)})
    await back_up(packs, source)
    for number in range(100):
        source.put(number, frame("x"))
    record = await back_up(packs, source, sampling=ALL)
    report = packs.reports.read(record.id)
    assert (report.wrong_frames, len(report.frames)) == (100, 64)
    assert len(list(packs.layout.reports.glob("*.source"))) == 16
    assert len(list(packs.layout.reports.glob("*.stored"))) == 16
    monkeypatch.setattr("backyfs.store.reports.WITH_CONTENT_MAX", 1)
    await back_up(packs, source)
    source.put(3, frame("y"))
    later = await back_up(packs, source, sampling=ALL)
    assert packs.reports.revisions() == sorted([record.id, later.id])
    assert len(list(packs.layout.reports.glob("*.source"))) == 16


async def test_a_report_of_nonsense_is_corrupt(packs: Repository) -> None:
    packs.layout.reports.mkdir()
    path = packs.reports.path("20260101T000000Z-aaaa")
    with pytest.raises(Corrupt, match="cannot be read"):
        packs.reports.read("20260101T000000Z-aaaa")
    path.write_bytes(b"{}")
    with pytest.raises(Corrupt, match="checksum"):
        packs.reports.read("20260101T000000Z-aaaa")
    (packs.layout.reports / "notes.json").write_text("ours")
    assert packs.reports.revisions() == ["20260101T000000Z-aaaa"]


class FullForReports(Fs):
    """No space left for evidence."""

    def create(self, path: Path, mode: int = 0o640) -> int:
        if path.parent.name == "reports":
            raise NoSpace("the store's file system is full")
        return super().create(path, mode)


async def test_without_space_for_evidence_it_is_distrusted_all_the_same(
    packs: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    full = Repository.open(packs.path, fs=FullForReports())
    source = lying()
    await back_up(full, source)
    second = await back_up(full, source, sampling=NONE)
    source.put(1, ZERO)
    record = await back_up(full, source, sampling=ALL)
    assert record.trust is Trust.DISTRUSTED
    assert full.state(second).trust is Trust.DISTRUSTED
    assert "the evidence cannot be kept" in caplog.text
    assert list(packs.layout.reports.iterdir()) == []


# Cancelled


async def test_cancelled_at_any_point_evidence_and_revision_are_together(
    packs: Repository,
) -> None:
    source = lying()
    first = await back_up(packs, source)
    source.put(1, ZERO)
    for count in range(1, 1000):
        with trio.CancelScope() as scope:
            instrument = CancelAtStep(count, scope)
            trio.lowlevel.add_instrument(instrument)
            try:
                await back_up(packs, source, sampling=ALL)
            finally:
                trio.lowlevel.remove_instrument(instrument)
        made = [record for record in packs.revisions() if record != first]
        assert packs.reports.revisions() == [record.id for record in made]
        assert packs.state(first).trust is Trust.TRUSTED
        if made:
            break
    else:
        pytest.fail("it never succeeds")
    assert packs.state(made[0]).trust is Trust.DISTRUSTED
    sound(packs)


async def test_a_source_that_fails_during_the_sample_fails_the_backup(packs: Repository) -> None:
    source = lying()
    await back_up(packs, source)
    source.before_read = _raising(ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        await back_up(packs, source, sampling=ALL)
    assert len(packs.revisions()) == 1
    sound(packs)


def _raising(kind: type[Exception]) -> Callable[[str, int, int], None]:
    def hook(name: str, offset: int, length: int) -> None:
        raise kind

    return hook


# Records of other versions


def test_stats_of_other_versions(packs: Repository) -> None:
    older = Stats.of({"read": 1, "changed": 2, "seconds": 0.5})
    assert (older.read, older.believed, older.sample_cut) == (1, None, False)
    assert Stats.of({"read": 1, "of_the_future": [1]}).read == 1


def test_a_record_keeps_what_was_sampled() -> None:
    stats = Stats(believed=5, sampled=4, sampled_frames=3, sample_cut=True, wrong_frames=2)
    disks = {"disk": DiskRecord("disk", FRAME, "", {})}
    made = replace(record(1, START), stats=stats, disks=disks)
    assert Record.decode(made.encode(), "it").stats == stats
