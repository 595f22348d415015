"""What goes wrong during a backup: it leaves nothing behind, and says what it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import pytest
import trio

from backyfs.engine.backup import back_up
from backyfs.errors import BackyfsError, Corrupt, NoSpace, SourceUnavailable
from backyfs.model import FRAME, Consistency
from backyfs.source.contract import Bookmark
from backyfs.store.contract import Buffer
from backyfs.store.fs import Fs
from backyfs.store.repository import Repository
from tests.engine.checks import content, files, sound
from tests.engine.memory import MemoryDisk, MemorySource, disk, frame

BIG = "abcd" * 40  # five batches of 2 MiB


def failing_at(count: int, action: Callable[[], None]) -> Callable[[str, int, int], None]:
    """A read hook that acts at read number `count`, counted from 1."""
    seen = 0

    def hook(name: str, offset: int, length: int) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            action()

    return hook


def refuse() -> None:
    raise SourceUnavailable("the cluster is gone")


# The source fails


@pytest.mark.parametrize("count", range(1, 13))
async def test_the_source_fails_at_any_read(repository: Repository, count: int) -> None:
    """Five reads to store, five to compare; after that there is nothing left to fail."""
    source = MemorySource({"disk": disk(BIG)})
    first = await back_up(repository, source)
    before = files(repository)
    source.contents["disk"] = disk(BIG.upper(), seed=1)
    source.before_read = failing_at(count, refuse)
    try:
        await back_up(repository, source)
    except SourceUnavailable as exc:
        assert count <= 10
        assert exc.message == "the cluster is gone"
        assert files(repository) == before
        assert [record.id for record in repository.revisions()] == [first.id]
    else:
        assert count > 10
    assert source.entered == source.left == 2
    assert content(repository, first) == disk(BIG)
    sound(repository)


async def test_an_image_that_shrinks_meanwhile(packs: Repository) -> None:
    source = MemorySource({"disk": disk(BIG)}, live=True)

    def shrink() -> None:
        del source.contents["disk"][10 * FRAME :]

    source.before_read = failing_at(2, shrink)
    with pytest.raises(SourceUnavailable, match="ends at"):
        await back_up(packs, source)
    assert packs.revisions() == []


async def test_a_bug_in_a_source_comes_out_as_it_is(packs: Repository) -> None:
    def bug() -> None:
        raise RuntimeError("bug")

    source = MemorySource({"disk": disk("a")}, before_read=failing_at(1, bug))
    with pytest.raises(RuntimeError, match="bug"):
        await back_up(packs, source)
    sound(packs)


async def test_a_source_that_cannot_tidy_up_fails_no_backup(
    packs: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    source = MemorySource({"disk": disk("ab")}, on_published=refuse)
    record = await back_up(packs, source)
    assert packs.revisions() == [record]
    assert "the cluster is gone" in str(caplog.records[0].args)
    sound(packs)


# The source changes


async def test_a_live_source_that_changes_is_torn(repository: Repository) -> None:
    source = MemorySource({"disk": disk(BIG)}, live=True)

    def change() -> None:
        for number in (0, 1, 100):
            source.contents["disk"][number * FRAME] ^= 1

    source.before_read = failing_at(6, change)  # all has been read once
    record = await back_up(repository, source)
    assert record.consistency is Consistency.TORN
    assert record.stats.torn_frames == 3
    assert "3 frames changed" in record.reason
    assert content(repository, record) == disk(BIG)
    sound(repository)


async def test_data_that_appears_in_a_hole_is_torn(packs: Repository) -> None:
    source = MemorySource({"disk": disk("ab....")}, live=True)

    def write() -> None:
        source.contents["disk"][4 * FRAME : 5 * FRAME] = frame("new")

    source.before_read = failing_at(1, write)  # by then the holes have been listed
    record = await back_up(packs, source)
    assert record.stats.torn_frames == 1


async def test_data_that_vanishes_is_torn(packs: Repository) -> None:
    source = MemorySource({"disk": disk("abcdef" + "." * 60 + "gh")}, live=True)

    def discard() -> None:
        source.contents["disk"][66 * FRAME :] = bytes(2 * FRAME)

    source.before_read = failing_at(3, discard)
    record = await back_up(packs, source)
    assert record.stats.torn_frames == 2


async def test_a_change_outside_of_the_change_list_is_not_looked_for(packs: Repository) -> None:
    source = MemorySource({"disk": disk("abcdef")}, live=True, tracking=True)
    await back_up(packs, source)
    source.contents["disk"][0] ^= 1

    def change() -> None:
        source.contents["disk"][5 * FRAME] ^= 1

    source.before_read = failing_at(1, change)
    record = await back_up(packs, source)
    assert record.consistency is Consistency.CRASH
    assert record.stats.read == FRAME


class Flaky(MemorySource):
    """Says that its snapshots are frozen, and returns other bytes from the second read on."""

    @property
    def flips(self) -> bool:
        return self.read_bytes > 4 * FRAME

    def _disk(self, name: str, number: int, since: Mapping[str, Bookmark]) -> MemoryDisk:
        source = self

        class FlakyDisk(MemoryDisk):
            def read(self, offset: int, length: int) -> bytes:
                data = bytearray(super().read(offset, length))
                data[0] ^= source.flips
                return bytes(data)

        return FlakyDisk(self, name, bytes(self.contents[name]), {}, None)


async def test_a_frozen_snapshot_that_reads_differently_is_torn(packs: Repository) -> None:
    """A cable, a memory module, a bug: not to be relied on, but there may be nothing better."""
    record = await back_up(packs, Flaky({"disk": disk("abcd")}))
    assert record.consistency is Consistency.TORN
    assert record.reason.startswith("1 frames of the frozen snapshot")


# The store fails


async def test_stored_bytes_that_read_back_wrong_fail_the_backup(
    packs: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await back_up(packs, MemorySource({"disk": disk("abcd")}))
    before = files(packs)
    original = Fs.writev

    def lying(self: Fs, fd: int, pieces: Sequence[Buffer], path: object = "") -> None:
        """A disk that says it has written, and has not quite."""
        data = bytearray(b"".join(pieces))
        if len(data) > 4 * FRAME:
            data[2 * FRAME] ^= 1
        original(self, fd, [data], path)

    monkeypatch.setattr(Fs, "writev", lying)
    with pytest.raises(Corrupt, match="nothing is published") as caught:
        await back_up(packs, MemorySource({"disk": disk("ABCDEFGH")}))
    assert (caught.value.disk, caught.value.length) == ("disk", FRAME)
    monkeypatch.undo()
    assert [record.id for record in packs.revisions()] == [first.id]
    assert {k: v for k, v in files(packs).items() if "quarantine" not in k} == before


class Full(Fs):
    """A file system that is full from operation `at` on; `at` 0: never."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def call(self, name: str) -> None:
        if name in ("write", "writev", "pwrite", "create", "mkdir"):
            self.count += 1
            if self.at and self.count >= self.at:
                raise OSError(28, "No space left on device")


async def test_a_full_file_system_at_any_operation(tmp_path: object, packs: Repository) -> None:
    source = MemorySource({"disk": disk("abcd")})
    first = await back_up(packs, source)
    source.contents["disk"] = disk("ABCD")
    before = files(packs)
    for at in range(1, 100):
        full = Repository.open(packs.path, fs=Full(at))
        try:
            record = await back_up(full, source)
        except NoSpace:
            assert files(packs) == before
            assert [record.id for record in packs.revisions()] == [first.id]
        else:
            assert at > 4
            assert content(packs, record) == disk("ABCD")
            break
    else:
        pytest.fail("it never succeeds")
    sound(packs)


# Cancelled


async def test_cancelled_at_any_point_all_or_nothing(packs: Repository) -> None:
    """The cancellation moves through the whole backup, checkpoint by checkpoint."""
    source = MemorySource({"disk": disk(BIG)})
    first = await back_up(packs, source)
    source.contents["disk"] = disk(BIG, seed=2)
    before = files(packs)
    for count in range(1, 1000):
        with trio.CancelScope() as scope:
            instrument = CancelAtStep(count, scope)
            trio.lowlevel.add_instrument(instrument)
            try:
                await back_up(packs, source)
            finally:
                trio.lowlevel.remove_instrument(instrument)
        assert source.entered == source.left
        if len(packs.revisions()) > 1:
            break
        assert scope.cancelled_caught
        assert files(packs) == before
    else:
        pytest.fail("it never succeeds")
    assert count > 20
    old, new = packs.revisions()
    assert old == first
    assert content(packs, new) == disk(BIG, seed=2)
    assert source.published == 2
    sound(packs)


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope when the task has been run `count` times."""

    def __init__(self, count: int, scope: trio.CancelScope) -> None:
        self._left, self._scope = count, scope

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        if self._left == 0:
            self._scope.cancel()


async def test_the_record_decides_though_the_caller_is_cancelled(packs: Repository) -> None:
    """Cancelled while the source is told: the revision is there, and so is the return value."""
    source = MemorySource({"disk": disk("ab")})
    with trio.CancelScope() as scope:
        source.on_published = lambda: trio.from_thread.run_sync(scope.cancel)
        record = await back_up(packs, source)
    assert packs.revisions() == [record]


async def test_random_moments(packs: Repository) -> None:
    rng = random.Random(5)
    source = MemorySource({"disk": disk(BIG)})
    for _ in range(15):
        with trio.move_on_after(rng.random() * 0.08):
            await back_up(packs, source)
        assert source.entered == source.left
    assert all(isinstance(exc, BackyfsError) for exc in packs.unreadable().values())
    assert packs.unreadable() == {}
    for record in packs.revisions():
        assert content(packs, record) == disk(BIG)
    sound(packs)
