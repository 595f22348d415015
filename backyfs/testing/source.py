"""What every source must do, in executable form; the text is backyfs/source/contract.py.

For a source of your own, derive from `SourceContract` in a file that pytest collects, and give it
a fixture `subject` that returns a `Subject`:

    from backyfs.testing.source import SourceContract, Subject

    class TestMySource(SourceContract):
        @pytest.fixture
        def subject(self, tmp_path: Path) -> Subject: ...

Its disks should be between 1 MiB and 32 MiB, hold some data and some zeros, and at least one of
them should have a size that is no multiple of 64 KiB.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol
from uuid import UUID

import pytest

from backyfs.errors import BackyfsError, SourceUnavailable
from backyfs.model import Consistency, Extent, is_name, is_revision_id
from backyfs.source.contract import (
    Backups,
    Bookmark,
    DiskSnapshot,
    Session,
    Snapshot,
    Source,
    session,
)

FIRST, SECOND = "20261121T220112Z-0001", "20261121T230112Z-0002"
assert is_revision_id(FIRST)
assert is_revision_id(SECOND)
BACKUPS = Backups(UUID("8bfe0a02-1dd4-4a7f-9d76-5e8a1a4c1b9e"), {FIRST, SECOND})


class Subject(Protocol):
    """A source and power over what is behind it."""

    @property
    def source(self) -> Source:
        """The source under test; the same one every time."""

    def content(self) -> dict[str, bytes]:
        """What all disks hold at this moment."""

    def write(self, disk: str, offset: int, data: bytes) -> None:
        """Change a disk behind the source's back, as a running VM does."""

    def take_away(self) -> None:
        """Make the source unavailable."""


def whole(disk: DiskSnapshot) -> bytes:
    """The bytes of a disk as the engine would put them together: data, zeros elsewhere."""
    image = bytearray(disk.size)
    for extent in disk.data():
        image[extent.offset : extent.end] = disk.read(extent.offset, extent.length)
    return bytes(image)


def listing_is_sound(extents: list[Extent], size: int) -> None:
    """Sorted, disjoint, none empty, all inside the disk."""
    for extent in extents:
        assert 0 <= extent.offset < extent.end <= size
    for one, other in itertools.pairwise(extents):
        assert one.end <= other.offset


def patched(before: bytes, after: bytes, extents: Iterable[Extent]) -> bytes:
    """What the engine makes of a content and extents of a later one: `after`, if none is missed."""
    image = bytearray(before[: len(after)].ljust(len(after), b"\0"))
    for extent in extents:
        image[extent.offset : extent.end] = after[extent.offset : extent.end]
    return bytes(image)


def open_descriptors() -> set[str]:
    """What this process has open, to see that nothing is left."""
    return {f"{fd}:{os.readlink(f'/proc/self/fd/{fd}')}" for fd in _descriptors()}


def _descriptors() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


class SourceContract:
    """The suite."""

    @pytest.fixture
    def subject(self) -> Subject:
        """The source to test, with power over it."""
        raise AssertionError("the derived class defines it")

    @contextlib.contextmanager
    def snapshot(
        self, subject: Subject, revision: str, since: Mapping[str, Bookmark]
    ) -> Iterator[Snapshot]:
        """A snapshot as the engine takes it: in a session, if the source has such a thing."""
        with (
            session(subject.source, BACKUPS) as source,
            source.snapshot(revision, since) as snapshot,
        ):
            yield snapshot

    def bookmarks(self, subject: Subject) -> dict[str, Bookmark]:
        """What the engine would keep of a snapshot taken now: bookmarks, by way of JSON."""
        with self.snapshot(subject, FIRST, {}) as snapshot:
            kept = {name: disk.bookmark for name, disk in snapshot.disks.items()}
            snapshot.published()
        return {name: json.loads(json.dumps(bookmark)) for name, bookmark in kept.items()}

    def test_it_has_a_type_and_disks_with_names(self, subject: Subject) -> None:
        assert is_name(subject.source.type)
        names = list(subject.source.disks())
        assert names
        assert len(set(names)) == len(names)
        assert all(is_name(name) for name in names)
        assert set(names) == set(subject.content())

    def test_a_snapshot_has_all_disks_as_they_are(self, subject: Subject) -> None:
        content = subject.content()
        with self.snapshot(subject, FIRST, {}) as snapshot:
            assert set(snapshot.disks) == set(content)
            for name, disk in snapshot.disks.items():
                assert disk.size == len(content[name])
                assert whole(disk) == content[name]

    def test_it_says_what_the_snapshot_is_worth(self, subject: Subject) -> None:
        with self.snapshot(subject, FIRST, {}) as snapshot:
            assert snapshot.consistency in set(Consistency)
            assert snapshot.reason
            assert "\n" not in snapshot.reason
            assert isinstance(snapshot.frozen, bool)

    def test_what_is_not_listed_as_data_is_zero(self, subject: Subject) -> None:
        content = subject.content()
        with self.snapshot(subject, FIRST, {}) as snapshot:
            for name, disk in snapshot.disks.items():
                listed = list(disk.data())
                listing_is_sound(listed, disk.size)
                assert patched(b"", content[name], listed) == content[name]
                assert list(disk.data()) == listed

    def test_any_range_reads_as_it_is(self, subject: Subject) -> None:
        content, rng = subject.content(), random.Random(1)
        with self.snapshot(subject, FIRST, {}) as snapshot:
            for name, disk in snapshot.disks.items():
                ends = [0, 1, 511, 512, 4096, 65_535, disk.size - 1, disk.size]
                places = ends + [rng.randrange(disk.size) for _ in range(60)]
                for one, other in itertools.pairwise(places):
                    offset, end = min(one, other), max(one, other)
                    data = disk.read(offset, end - offset)
                    assert type(data) is bytes
                    assert data == content[name][offset:end]

    def test_a_range_outside_of_the_disk_is_a_bug(self, subject: Subject) -> None:
        with self.snapshot(subject, FIRST, {}) as snapshot:
            for disk in snapshot.disks.values():
                for offset, length in [(-1, 1), (0, disk.size + 1), (disk.size, 1), (1, -1)]:
                    with pytest.raises(ValueError, match="outside"):
                        disk.read(offset, length)
                assert disk.read(disk.size, 0) == b""

    def test_many_threads_read_at_once(self, subject: Subject) -> None:
        content = subject.content()
        with self.snapshot(subject, FIRST, {}) as snapshot, ThreadPoolExecutor(8) as pool:
            for name, disk in snapshot.disks.items():
                pieces = [
                    (at, min(100_001, disk.size - at)) for at in range(0, disk.size, 100_001)
                ] * 3
                random.Random(2).shuffle(pieces)
                for (at, length), data in zip(
                    pieces,
                    pool.map(lambda piece, disk=disk: disk.read(*piece), pieces),
                    strict=True,
                ):
                    assert data == content[name][at : at + length]

    def test_without_a_bookmark_everything_may_have_changed(self, subject: Subject) -> None:
        with self.snapshot(subject, FIRST, {}) as snapshot:
            assert all(disk.changed() is None for disk in snapshot.disks.values())

    @pytest.mark.parametrize("bookmark", [{}, {"size": -1}, {"path": 5, "nonsense": [None]}])
    def test_a_bookmark_of_something_else_is_no_guess(
        self, subject: Subject, bookmark: Bookmark
    ) -> None:
        names = subject.source.disks()
        with session(subject.source, BACKUPS) as source:
            if isinstance(source, Session):
                assert not source.remembers({})
                assert not source.remembers(dict.fromkeys(names, bookmark))
        with self.snapshot(subject, SECOND, dict.fromkeys(names, bookmark)) as snapshot:
            assert all(disk.changed() is None for disk in snapshot.disks.values())

    def test_changes_since_a_bookmark_miss_nothing(self, subject: Subject) -> None:
        before, since = subject.content(), self.bookmarks(subject)
        for name, content in before.items():
            subject.write(name, 0, b"first bytes")
            subject.write(name, len(content) // 2, b"in the middle" * 1000)
            subject.write(name, len(content) - 512, b"last bytes")
        after = subject.content()
        with self.snapshot(subject, SECOND, since) as snapshot:
            for name, disk in snapshot.disks.items():
                assert whole(disk) == after[name]
                changes = disk.changed()
                if changes is not None:
                    listing_is_sound(list(changes.extents), disk.size)
                    assert patched(before[name], after[name], changes.extents) == after[name]

    def test_what_it_remembers_it_can_tell(self, subject: Subject) -> None:
        since = self.bookmarks(subject)
        with session(subject.source, BACKUPS) as source:
            if not isinstance(source, Session) or not source.remembers(since):
                return
            with source.snapshot(SECOND, since) as snapshot:
                assert all(disk.changed() is not None for disk in snapshot.disks.values())

    def test_a_frozen_snapshot_stays_as_it_was(self, subject: Subject) -> None:
        content = subject.content()
        with self.snapshot(subject, FIRST, {}) as snapshot:
            if not snapshot.frozen:
                pytest.skip("this source reads what the VM is writing, and says so")
            for name, before in content.items():
                subject.write(name, 0, b"written later")
                subject.write(name, len(before) // 2, os.urandom(100_000))
            assert {name: whole(disk) for name, disk in snapshot.disks.items()} == content
        assert subject.content() != content

    def test_two_snapshots_at_a_time(self, subject: Subject) -> None:
        content = subject.content()
        with (
            self.snapshot(subject, FIRST, {}) as one,
            self.snapshot(subject, SECOND, {}) as other,
        ):
            for snapshot in (one, other):
                assert {name: whole(disk) for name, disk in snapshot.disks.items()} == content

    def test_publishing_may_be_told_or_not_and_more_than_once(self, subject: Subject) -> None:
        with self.snapshot(subject, FIRST, {}) as snapshot:
            snapshot.published()
            snapshot.published()
        with self.snapshot(subject, SECOND, {}):
            pass
        with self.snapshot(subject, FIRST, {}):
            pass

    def test_nothing_is_kept_open(self, subject: Subject) -> None:
        before = open_descriptors()
        with pytest.raises(ZeroDivisionError), self.snapshot(subject, FIRST, {}) as snapshot:
            for disk in snapshot.disks.values():
                disk.read(0, 1)
            raise ZeroDivisionError
        assert open_descriptors() == before

    def test_reading_after_the_end_fails(self, subject: Subject) -> None:
        with self.snapshot(subject, FIRST, {}) as snapshot:
            disks = list(snapshot.disks.values())
        for disk in disks:
            with pytest.raises((BackyfsError, ValueError)):
                disk.read(0, 512)

    def test_a_source_that_is_not_there_is_one_clear_error(self, subject: Subject) -> None:
        subject.take_away()
        before = open_descriptors()
        with pytest.raises(SourceUnavailable) as caught:
            subject.source.disks()
        assert "\n" not in caught.value.message
        with pytest.raises(SourceUnavailable), self.snapshot(subject, FIRST, {}):
            raise AssertionError("a snapshot of what is not there")
        assert open_descriptors() == before
