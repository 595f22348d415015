"""What any store format must do: store/contract.py in executable form.

`StoreContract` holds the tests; a subclass gives the fixture `home`, a directory for repositories
of its `kind`. `Machine` is the long version: any sequence of backups, removals, collections and
crashes, after which every kept revision reads back byte for byte.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import struct
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
from blake3 import blake3
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from backyfs.errors import Corrupt, NoRevision
from backyfs.extents import whole_frames
from backyfs.model import FRAME, Consistency, Extent
from backyfs.store import meter
from backyfs.store.contract import SharingImage, StoredImage
from backyfs.store.fs import Fs
from backyfs.store.record import Draft, Record
from backyfs.store.repository import Repository

DRAFT = Draft(Consistency.CRASH)
GROUP = 1024 * FRAME


# ---- content and its digest --------------------------------------------------------------------


def noise(length: int, seed: int = 0) -> bytes:
    """Bytes that do not compress."""
    return random.Random(seed).randbytes(length)


def frame(seed: int) -> bytes:
    """A frame: 0 is zeros, an even seed noise, an odd one noise in its first half only."""
    if not seed:
        return bytes(FRAME)
    return noise(FRAME, seed) if seed % 2 == 0 else noise(FRAME // 2, seed) + bytes(FRAME // 2)


def image_of(*seeds: int, tail: bytes = b"") -> bytes:
    """Frames one after the other, and the bytes of a short last one."""
    return b"".join(map(frame, seeds)) + tail


def frame_hashes(content: bytes) -> list[bytes]:
    """The hash of each frame, from the definition."""
    padded = (content[at : at + FRAME].ljust(FRAME, b"\0") for at in range(0, len(content), FRAME))
    return [blake3(data).digest() if any(data) else bytes(32) for data in padded]


def node(hashes: Sequence[bytes]) -> bytes:
    """A node of the digest's tree, from the definition."""
    joined = b"".join(hashes)
    return blake3(joined).digest() if any(joined) else bytes(32)


def level1(hashes: Sequence[bytes]) -> list[bytes]:
    """The hashes of groups of 1024 frames."""
    return [node(hashes[at : at + 1024]) for at in range(0, len(hashes), 1024)]


def digest_of(content: bytes) -> str:
    """The digest of a disk, from the definition in docs/format.md."""
    level = level1(frame_hashes(content))
    while len(level) > 1:
        level = level1(level)
    root = level[0] if level else bytes(32)
    return blake3(b"bfs1" + struct.pack("<QI", len(content), FRAME) + root).hexdigest()


def changes(old: bytes, new: bytes) -> list[Extent]:
    """The frames in which two contents differ, as a source with a change list tells them."""
    end = len(new)
    return [
        Extent(at, min(FRAME, end - at))
        for at in range(0, end, FRAME)
        if old[at : at + FRAME] != new[at : at + FRAME]
    ]


def covered(extents: Iterable[Extent]) -> set[int]:
    """Numbers of the frames that extents touch."""
    return {n for e in extents for n in range(e.offset // FRAME, -(-e.end // FRAME))}


def bytes_of_data(content: bytes) -> int:
    """Bytes of the frames that are not zero."""
    frames = (content[at : at + FRAME] for at in range(0, len(content), FRAME))
    return sum(len(frame) for frame in frames if any(frame))


class Before(Fs):
    """Does something before the first operation of a name."""

    def __init__(self, name: str, do: Callable[[], object]) -> None:
        self._name, self._do = name, do

    def call(self, name: str) -> None:
        if name == self._name:
            self._name = ""
            self._do()


# ---- making revisions --------------------------------------------------------------------------


@dataclass
class Made:
    """A revision and what making it told."""

    record: Record
    changed: int = 0
    stored: int = 0
    written: dict[str, list[Extent]] = field(default_factory=dict)
    required: dict[str, list[Extent]] = field(default_factory=dict)


def back_up(
    repository: Repository,
    disks: Mapping[str, bytes] | bytes,
    parent: Record | None = None,
    known: Mapping[str, bytes] | bytes | None = None,
    *,
    batch: int = 3,
) -> Made:
    """Make a revision. With `known` (the parent's content) only what differs is handed over."""
    contents = {"disk": disks} if isinstance(disks, bytes) else disks
    before = {"disk": known} if isinstance(known, bytes) else known or {}
    with repository.writing() as intent, repository.begin(intent, parent) as staging:
        changed = 0
        required = {}
        for name, content in contents.items():
            writer = staging.disk(name, len(content))
            required[name] = writer.required()
            extents = [Extent(0, len(content))] if content else []
            if name in before:
                extents = changes(before[name], content) + required[name]
            for extent in whole_frames(extents, len(content)):
                for at in range(extent.offset, extent.end, batch * FRAME):
                    changed += writer.write(at, content[at : min(at + batch * FRAME, extent.end)])
        staging.seal()
        written = {name: staging.written(name) for name in contents}
        record = staging.commit(DRAFT)
        return Made(record, changed, staging.stored_bytes, written, required)


def read_all(repository: Repository, record: Record, disk: str = "disk") -> bytes:
    """All bytes of a disk."""
    with closing(repository.open_disk(record, disk)) as image:
        return image.read(0, image.size)


def files(repository: Repository) -> set[str]:
    """Names of all files but the locks, the log and the meter's."""
    return {
        str(path.relative_to(repository.path))
        for path in repository.path.rglob("*")
        if path.is_file()
        and path.name not in ("lock", "lock.meta")
        and path.parent.name != meter.DIRECTORY
    }


def spoil(repository: Repository, record: Record, number: int, disk: str = "disk") -> None:
    """Flip a bit of the stored frame `number`, as a failing medium does."""
    with closing(repository.open_disk(record, disk)) as image:
        path, offset = _stored_at(image, number)
    with open(path, "r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 0x10]))


def _stored_at(image: StoredImage, number: int) -> tuple[Path, int]:
    """A file of the store and an offset in it that frame `number` lives on."""
    from backyfs.store.cow.image import CowImage
    from backyfs.store.packs.image import PackImage

    if isinstance(image, CowImage):
        return image.files.image, number * FRAME + 100
    assert isinstance(image, PackImage)
    place = image.locate(number)
    assert place is not None, "a hole cannot be spoiled"
    segment = image._library.segment(place.unit)
    offset, length = segment.entry(place.number)[:2]
    return segment.pack.path, offset + length // 2


# ---- the suite ---------------------------------------------------------------------------------

SIZES = [0, 1, 511, 4096, 4097, FRAME - 1, FRAME, FRAME + 1, 3 * FRAME + 12345, 5 * FRAME]


class StoreContract:
    """Tests of one format. A subclass sets `kind` and gives the fixture `home`."""

    kind: ClassVar[str]

    @pytest.fixture
    def repository(self, home: Path) -> Repository:
        """An empty repository."""
        return Repository.create(home / "vm", self.kind)

    # A revision and its bytes

    def test_a_new_repository_is_empty_and_sound(self, repository: Repository) -> None:
        assert repository.revisions() == []
        assert repository.fsck() == []
        assert repository.damage() == {}
        assert repository.store == self.kind
        assert Repository.open(repository.path).uuid == repository.uuid

    def test_a_reason_that_a_guest_wrote_is_kept_printable(self, repository: Repository) -> None:
        reason = "the agent says: \ud800 \x1b[2J\n\u00e4"
        with repository.writing() as intent, repository.begin(intent, None) as staging:
            staging.disk("disk", 0)
            record = staging.commit(replace(DRAFT, reason=reason))
        assert record.reason == r"the agent says: \ud800 \x1b[2J\nä"
        assert repository.record(record.id) == record

    @pytest.mark.parametrize("size", SIZES)
    def test_round_trip_of_any_size(self, repository: Repository, size: int) -> None:
        content = noise(size, seed=size)
        made = back_up(repository, content)
        disk = made.record.disks["disk"]
        assert (disk.size, disk.digest) == (size, digest_of(content))
        assert Repository.open(repository.path).revisions() == [made.record]
        with closing(repository.open_disk(made.record, "disk")) as image:
            assert image.size == size
            assert image.digest == disk.digest
            assert image.read(0, size) == content
            assert image.hashes(0, -(-size // FRAME)) == b"".join(frame_hashes(content))
            assert image.groups() == b"".join(level1(frame_hashes(content)))
            assert image.check(0, -(-size // FRAME)) == []
        assert repository.fsck() == []

    def test_the_digest_is_what_the_format_says(self, repository: Repository) -> None:
        # Fixed values: a digest must never change, in either format, on any machine.
        made = back_up(repository, {"a": b"", "b": b"backyfs", "c": bytes(FRAME + 1)})
        assert [disk.digest for disk in made.record.disks.values()] == [
            blake3(b"bfs1" + struct.pack("<QI", 0, 65536) + bytes(32)).hexdigest(),
            blake3(
                b"bfs1"
                + struct.pack("<QI", 7, 65536)
                + blake3(blake3(b"backyfs".ljust(65536, b"\0")).digest()).digest()
            ).hexdigest(),
            blake3(b"bfs1" + struct.pack("<QI", 65537, 65536) + bytes(32)).hexdigest(),
        ]

    def test_reads_of_any_range(self, repository: Repository) -> None:
        content = image_of(2, 0, 3, 0, 0, 4, tail=noise(777))
        record = back_up(repository, content).record
        edges = [0, 1, 4095, 4096, FRAME - 1, FRAME, FRAME + 1, 2 * FRAME, 3 * FRAME - 7]
        edges += [5 * FRAME + 9, 6 * FRAME, len(content) - 1, len(content)]
        with closing(repository.open_disk(record, "disk")) as image:
            for start in edges:
                for end in (end for end in edges if end >= start):
                    assert image.read(start, end - start) == content[start:end]
                    buffer = bytearray(b"?" * (end - start))
                    image.read_into(start, memoryview(buffer))
                    assert buffer == content[start:end]
                    assert image.try_read(start, end - start) in (None, content[start:end])

    def test_a_range_outside_the_disk_is_an_error(self, repository: Repository) -> None:
        record = back_up(repository, noise(FRAME + 5)).record
        with closing(repository.open_disk(record, "disk")) as image:
            for offset, length in [(-1, 1), (0, -1), (0, FRAME + 6), (FRAME + 6, 0), (FRAME, 6)]:
                with pytest.raises(ValueError, match=r"\S"):
                    image.read(offset, length)
                with pytest.raises(ValueError, match=r"\S"):
                    image.try_read(offset, length)
                with pytest.raises(ValueError, match=r"\S"):
                    image.read_into(
                        offset if length >= 0 else -1, memoryview(bytearray(max(0, length)))
                    )

    def test_extents_are_the_data_and_the_rest_is_zeros(self, repository: Repository) -> None:
        content = image_of(0, 2, 4, 0, 0, 3, 0, tail=bytes(100))
        record = back_up(repository, content).record
        with closing(repository.open_disk(record, "disk")) as image:
            extents = list(image.extents())
        assert covered(extents) == {1, 2, 5}
        assert record.disks["disk"].data == bytes_of_data(content)
        position = 0
        for extent in extents:
            assert extent.length > 0
            assert extent.offset > position or extent.offset == position == 0
            assert not any(content[position : extent.offset])
            position = extent.end
        assert position <= len(content)
        assert not any(content[position:])

    def test_a_descriptor_of_the_image_reads_its_bytes(self, repository: Repository) -> None:
        content = image_of(2, 0, 3, tail=b"end")
        record = back_up(repository, content).record
        with closing(repository.open_disk(record, "disk", check=False)) as image:
            assert image.read(0, len(content)) == content
            fd = image.raw_fd()
            if fd is not None:
                assert os.pread(fd, len(content) + 1, 0) == content
        image.close()  # once more: harmless

    def test_an_unknown_disk(self, repository: Repository) -> None:
        record = back_up(repository, b"x").record
        with pytest.raises(NoRevision, match="no disk 'data'"):
            repository.open_disk(record, "data")

    def test_many_threads_read_one_image(self, repository: Repository) -> None:
        content = image_of(2, 3, 0, 4, 5, 0, 6, 7, tail=noise(99))
        record = back_up(repository, content).record
        with closing(repository.open_disk(record, "disk")) as image:

            def read(seed: int) -> bool:
                rng = random.Random(seed)
                spans = [sorted(rng.choices(range(len(content) + 1), k=2)) for _ in range(40)]
                return all(image.read(a, b - a) == content[a:b] for a, b in spans)

            with ThreadPoolExecutor(8) as pool:
                assert all(pool.map(read, range(16)))

    # Writing

    def test_write_tells_the_bytes_of_frames_that_differ(self, repository: Repository) -> None:
        first = image_of(2, 0, 3, 4)
        made = back_up(repository, first)
        assert made.changed == 3 * FRAME
        second = bytearray(first)
        second[2 * FRAME + 5] ^= 1
        second[FRAME + 100] = 7
        made = back_up(repository, bytes(second), made.record)
        assert made.changed == 2 * FRAME
        assert covered(made.written["disk"]) == {1, 2}
        assert read_all(repository, made.record) == second

    def test_only_whole_frames_are_taken(self, repository: Repository) -> None:
        with repository.writing() as intent, repository.begin(intent, None) as staging:
            writer = staging.disk("disk", 2 * FRAME + 10)
            for offset, length in [
                (1, FRAME),
                (0, 5),
                (2 * FRAME, 9),
                (2 * FRAME, 11),
                (-FRAME, 1),
            ]:
                with pytest.raises(ValueError, match=r"\S"):
                    writer.write(offset, b"x" * length)
                with pytest.raises(ValueError, match=r"\S"):
                    writer.zero(offset, length)
            assert writer.write(2 * FRAME, b"x" * 10)
            assert writer.write(0, b"") == 0

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_any_buffer_is_taken(self, repository: Repository, kind: Callable[..., bytes]) -> None:
        content = image_of(2, 0, 3, tail=b"tail")
        with repository.writing() as intent, repository.begin(intent, None) as staging:
            staging.disk("disk", len(content)).write(0, kind(content))
            record = staging.commit(DRAFT)
        assert read_all(repository, record) == content

    def test_frames_in_any_order_from_many_threads(self, repository: Repository) -> None:
        old = image_of(*range(40))
        new = image_of(*(seed + 100 if seed % 3 else seed for seed in range(40)), tail=b"more")
        parent = back_up(repository, old).record
        for before in (None, parent):
            with repository.writing() as intent, repository.begin(intent, before) as staging:
                writer = staging.disk("disk", len(new))
                numbers = list(range(41))
                random.Random(5).shuffle(numbers)
                with ThreadPoolExecutor(8) as pool:
                    offsets = [number * FRAME for number in numbers]
                    list(pool.map(writer.write, offsets, [new[o : o + FRAME] for o in offsets]))
                record = staging.commit(DRAFT)
            assert record.disks["disk"].digest == digest_of(new)
            assert read_all(repository, record) == new
        assert repository.fsck() == []

    def test_frames_never_written_keep_the_parents_content(self, repository: Repository) -> None:
        content = image_of(2, 0, 3, tail=b"tail")
        parent = back_up(repository, content).record
        with repository.writing() as intent, repository.begin(intent, parent) as staging:
            staging.disk("disk", len(content)).write(FRAME, frame(8))
            record = staging.commit(DRAFT)
        assert read_all(repository, record) == image_of(2, 8, 3, tail=b"tail")
        with repository.writing() as intent, repository.begin(intent, None) as staging:
            staging.disk("disk", len(content)).write(FRAME, frame(8))
            record = staging.commit(DRAFT)
        assert read_all(repository, record) == image_of(0, 8, 0, tail=bytes(4))

    def test_zero(self, repository: Repository) -> None:
        content = image_of(2, 4, 0, 3, 6, tail=b"tail")
        parent = back_up(repository, content).record
        with repository.writing() as intent, repository.begin(intent, parent) as staging:
            writer = staging.disk("disk", len(content))
            writer.zero(FRAME, 3 * FRAME)
            writer.zero(5 * FRAME, 4)
            record = staging.commit(DRAFT)
        expected = image_of(2, 0, 0, 0, 6, tail=bytes(4))
        assert read_all(repository, record) == expected
        assert record.disks["disk"].digest == digest_of(expected)
        with closing(repository.open_disk(record, "disk")) as image:
            assert covered(image.extents()) == {0, 4}
        assert read_all(repository, parent) == content

    def test_zeros_written_are_holes_too(self, repository: Repository) -> None:
        parent = back_up(repository, image_of(2, 4, 6)).record
        record = back_up(repository, image_of(2, 0, 6), parent).record
        assert read_all(repository, record) == image_of(2, 0, 6)
        with closing(repository.open_disk(record, "disk")) as image:
            assert covered(image.extents()) == {0, 2}

    def test_an_unchanged_disk_names_its_parents_files(self, repository: Repository) -> None:
        content = {"root": image_of(2, 0, 3, tail=b"x"), "data": image_of(4)}
        first = back_up(repository, content).record
        before = files(repository)
        made = back_up(repository, content, first)
        assert made.record.disks["root"].files == first.disks["root"].files
        assert made.record.disks["data"].files == first.disks["data"].files
        assert (made.changed, made.stored) == (0, 0)
        assert made.written == {"root": [], "data": []}
        assert files(repository) - before == {f"revisions/{made.record.id}.json"}
        repository.remove([first.id])
        assert read_all(repository, made.record, "root") == content["root"]
        with (
            closing(repository.open_disk(made.record, "root")) as one,
            closing(repository.open_disk(made.record, "root")) as other,
            closing(repository.open_disk(made.record, "data")) as third,
        ):
            assert one.shared_with(other)
            assert not one.shared_with(third)

    def test_written_tells_what_was_stored_anew(self, repository: Repository) -> None:
        first = image_of(2, 4, 0, 6, 8, tail=b"tail")
        made = back_up(repository, first)
        assert {0, 1, 3, 4, 5} <= covered(made.written["disk"])
        second = image_of(2, 5, 10, 6, 8, tail=b"TAIL")
        made = back_up(repository, second, made.record, first)
        assert made.written["disk"] == [Extent(FRAME, 2 * FRAME), Extent(5 * FRAME, 4)]
        assert made.stored >= 2 * FRAME // 2

    def test_the_image_can_be_read_before_the_commit(self, repository: Repository) -> None:
        content = image_of(2, 0, 3, tail=b"tail")
        with repository.writing() as intent, repository.begin(intent, None) as staging:
            staging.disk("disk", len(content)).write(0, content)
            staging.seal()
            image = staging.image("disk")
            assert image.read(0, len(content)) == content
            assert image.check(0, 4) == []
            assert image.digest == digest_of(content)
            assert repository.revisions() == []
            record = staging.commit(DRAFT)
        assert record.disks["disk"].digest == digest_of(content)

    def test_leaving_without_commit_leaves_nothing(self, repository: Repository) -> None:
        parent = back_up(repository, image_of(2, 3)).record
        before = files(repository)
        for sealed in (False, True):
            with repository.writing() as intent, repository.begin(intent, parent) as staging:
                staging.disk("disk", 5 * FRAME).write(0, image_of(7, 8))
                if sealed:
                    staging.seal()
            assert files(repository) == before
            with (
                pytest.raises(ZeroDivisionError),
                repository.writing() as intent,
                repository.begin(intent, parent) as staging,
            ):
                staging.disk("disk", FRAME).write(0, frame(9))
                raise ZeroDivisionError
            assert files(repository) == before
        assert repository.revisions() == [parent]
        assert repository.fsck() == []

    def test_leaving_without_commit_is_in_nobodys_way(self, repository: Repository) -> None:
        """Somebody is about to publish a state: what is unfinished of theirs stays."""
        first = back_up(repository, image_of(2, 3)).record
        with repository.writing() as intent, contextlib.ExitStack() as left:
            staging = left.enter_context(repository.begin(intent, first))
            staging.disk("disk", 2 * FRAME).write(0, image_of(7, 8))
            other = Repository.open(repository.path, fs=Before("rename", left.close))
            other.update_state(first.id, lambda state: replace(state, tags=("kept",)))
        assert repository.state(first).tags == ("kept",)
        assert not [name for name in files(repository) if ".tmp" in name]

    def test_what_goes_while_a_writer_cleans_up_is_none_of_its_business(
        self, repository: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Damage and tags are recorded without its lock."""
        first = back_up(repository, image_of(2, 3)).record
        for path in (
            repository.layout.quarantine / "unit.0.json.0.tmp",
            repository.layout.revisions / f"{first.id}.other.map",
        ):
            path.touch()

            def looked_at(asked: Path, path: Path = path, **how: bool) -> os.stat_result:
                if asked == path:
                    path.unlink()
                return os.stat(asked, **how)

            with monkeypatch.context() as patch:
                patch.setattr(Path, "stat", looked_at)
                repository.gc()
            assert not path.exists()

    def test_unfinished_files_of_others_stay_for_a_day(self, repository: Repository) -> None:
        """Damage and configuration are written without the lock, copies perhaps by rsync."""
        first = back_up(repository, image_of(2, 3)).record
        repository.layout.reports.mkdir()
        unfinished = [
            repository.layout.quarantine / "unit.0.json.0.tmp",
            repository.layout.reports / f"{first.id}.json.0.tmp",
            repository.path / "config.0.tmp",
            repository.layout.revisions / f"{first.id}.other.map",
        ]
        for path in unfinished:
            path.touch()
        repository.gc()
        assert all(path.exists() for path in unfinished)
        two_days_ago = time.time() - 2 * 86_400
        for path in unfinished:
            os.utime(path, (two_days_ago, two_days_ago))
        repository.gc()
        assert not any(path.exists() for path in unfinished)
        assert repository.revisions() == [first]

    def test_what_a_killed_writer_left_goes_with_the_next(self, repository: Repository) -> None:
        first = back_up(repository, image_of(2, 3)).record
        crash(repository, first, image_of(8, 9), seal=True)
        assert repository.revisions() == [first]
        assert read_all(repository, first) == image_of(2, 3)
        before = files(repository)
        second = back_up(repository, image_of(2, 5), first).record
        assert [record.id for record in repository.revisions()] == [first.id, second.id]
        assert not [name for name in files(repository) & before if ".tmp" in name]
        assert repository.fsck() == []

    # Sizes

    @pytest.mark.parametrize("old", [0, 1, FRAME - 1, 2 * FRAME, 2 * FRAME + 5000, 4 * FRAME + 1])
    @pytest.mark.parametrize("new", [0, 1, FRAME, 2 * FRAME + 4096, 2 * FRAME + 6000, 5 * FRAME])
    def test_growing_and_shrinking(self, repository: Repository, old: int, new: int) -> None:
        first = noise(old, 1)
        second = first[:new].ljust(new, b"\0")
        parent = back_up(repository, first).record
        made = back_up(repository, second, parent, first)
        assert read_all(repository, made.record) == second
        assert made.record.disks["disk"].digest == digest_of(second)
        if old != new and min(old, new) // FRAME < -(-new // FRAME):
            assert min(old, new) // FRAME in covered(made.required["disk"])
        assert all(extent.end <= new for extent in made.required["disk"])
        assert read_all(repository, parent) == first
        assert repository.fsck() == []

    def test_shrink_then_grow_never_shows_old_bytes(self, repository: Repository) -> None:
        content = noise(4 * FRAME + 5000)
        record = back_up(repository, content).record
        for size in (FRAME + 100, 4 * FRAME + 5000, 3 * FRAME, 3 * FRAME + 1, 6 * FRAME):
            grown = content[:size].ljust(size, b"\0")
            record = back_up(repository, grown, record, content).record
            content = grown
            assert read_all(repository, record) == content
            with closing(repository.open_disk(record, "disk")) as image:
                assert image.check(0, -(-size // FRAME)) == []
        assert content == noise(4 * FRAME + 5000)[: FRAME + 100].ljust(6 * FRAME, b"\0")

    def test_more_frames_than_a_group(self, repository: Repository) -> None:
        size = GROUP + 3 * FRAME + 17
        pieces = {0: frame(2), 1023: frame(4), 1024: frame(3), 1027: b"tail of the disk."}
        content = bytearray(size)
        with repository.writing() as intent, repository.begin(intent, None) as staging:
            writer = staging.disk("disk", size)
            for number, data in pieces.items():
                writer.write(number * FRAME, data)
                content[number * FRAME : number * FRAME + len(data)] = data
            record = staging.commit(DRAFT)
        assert record.disks["disk"].digest == digest_of(bytes(content))
        made = back_up(repository, bytes(content[: GROUP - 5]), record, bytes(content))
        assert made.record.disks["disk"].digest == digest_of(bytes(content[: GROUP - 5]))
        for kept in (record, made.record):
            with closing(repository.open_disk(kept, "disk")) as image:
                assert covered(image.extents()) <= set(pieces)
                last = 1023 * FRAME
                assert image.read(last - 9, 2000) == content[last - 9 : last + 1991]
                assert image.check(0, -(-image.size // FRAME)) == []
        assert repository.fsck() == []

    def test_a_huge_sparse_disk_costs_what_it_holds(self, repository: Repository) -> None:
        size = 1 << 40
        far = size // FRAME - 5
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        sys.setprofile(count)
        try:
            self._use_a_huge_disk(repository, size, far)
        finally:
            sys.setprofile(None)
        assert calls < size // FRAME // 2  # several passes, none of which looks at every frame
        on_disk = sum(path.stat().st_blocks * 512 for path in repository.path.rglob("*"))
        assert on_disk < 4 << 20

    def _use_a_huge_disk(self, repository: Repository, size: int, far: int) -> None:
        with repository.writing() as intent, repository.begin(intent, None) as staging:
            writer = staging.disk("disk", size)
            writer.write(far * FRAME, frame(2))
            writer.zero(0, far * FRAME)
            first = staging.commit(DRAFT)
        with repository.writing() as intent, repository.begin(intent, first) as staging:
            writer = staging.disk("disk", size)
            writer.write(3 * FRAME, frame(4))
            writer.zero(far * FRAME, 5 * FRAME)
            second = staging.commit(DRAFT)
        for record, number in ((first, far), (second, 3)):
            with closing(repository.open_disk(record, "disk")) as image:
                assert covered(image.extents()) == {number}
                assert image.check(0, size // FRAME) == []
                assert image.hashes(number - 1, 3)[:32] == bytes(32)
                assert any(image.read(number * FRAME, FRAME))
        assert repository.fsck() == []

    # Many disks, many revisions

    def test_several_disks_come_and_go(self, repository: Repository) -> None:
        first = {"root": image_of(2, 3), "data.1": image_of(4, tail=b"x"), "swap": bytes(FRAME)}
        second = {"root": image_of(2, 5), "data.1": first["data.1"], "new": image_of(6)}
        one = back_up(repository, first).record
        two = back_up(repository, second, one).record
        for record, contents in ((one, first), (two, second)):
            assert list(record.disks) == list(contents)
            for name, content in contents.items():
                assert read_all(repository, record, name) == content
        assert repository.fsck() == []

    def test_any_revision_can_be_the_parent(self, repository: Repository) -> None:
        contents = [image_of(2, 3, 4), image_of(2, 5, 4), image_of(6, 5, 0)]
        records: list[Record] = []
        for content in contents:
            records.append(back_up(repository, content, records[0] if records else None).record)
        for record, content in zip(records, contents, strict=True):
            assert read_all(repository, record) == content
        assert [record.seq for record in repository.revisions()] == [1, 2, 3]

    @pytest.mark.parametrize("victim", [0, 1, 2, 3])
    def test_removing_one_leaves_the_others(self, repository: Repository, victim: int) -> None:
        contents = [image_of(2, 3, 4), image_of(2, 5, 4), image_of(2, 5, 4), image_of(2, 5, 7)]
        records: list[Record] = []
        for content in contents:
            records.append(back_up(repository, content, records[-1] if records else None).record)
        assert repository.remove([records[victim].id]).removed == [records[victim].id]
        repository.gc()
        assert repository.fsck() == []
        for number, (record, content) in enumerate(zip(records, contents, strict=True)):
            if number != victim:
                assert read_all(repository, record) == content
        with pytest.raises(NoRevision):
            repository.record(records[victim].id)
        repository.remove([record.id for record in repository.revisions()])
        repository.gc()
        assert files(repository) == {"repository.json"}

    def test_an_open_image_outlives_its_revision(self, repository: Repository) -> None:
        content = image_of(2, 0, 3)
        record = back_up(repository, content).record
        with closing(repository.open_disk(record, "disk")) as image:
            assert repository.remove([record.id]).in_use == [record.id]
            assert repository.revisions() == [record]
            assert repository.remove([record.id], force=True).removed == [record.id]
            assert repository.revisions() == []
            assert image.read(0, len(content)) == content
        with pytest.raises((NoRevision, Corrupt)):
            repository.open_disk(record, "disk")

    def test_what_two_images_share(self, repository: Repository) -> None:
        first, second = image_of(2, 4, 0, 6, 8), image_of(2, 5, 10, 6, 0)
        one = back_up(repository, first).record
        two = back_up(repository, second, one, first).record
        with (
            closing(repository.open_disk(one, "disk")) as old,
            closing(repository.open_disk(two, "disk")) as new,
        ):
            assert isinstance(old, SharingImage)
            assert isinstance(new, SharingImage)
            assert covered(new.unshared(old)) == {1, 2}
            assert covered(old.unshared(new)) == {1, 4}
            assert covered(old.unshared(old)) == set()

    # Damage

    def test_what_is_read_only_if_it_is_sound_records_nothing(self, repository: Repository) -> None:
        content = image_of(2, 4, 6)
        record = back_up(repository, content).record
        spoil(repository, record, 1)
        with closing(repository.open_disk(record, "disk")) as image:
            assert image.read_sound(5, FRAME - 5) in (None, content[5:FRAME])
            assert image.read_sound(FRAME - 5, 10) is None
        assert not repository.quarantine.bad()

    def test_a_damaged_frame_is_an_error_for_its_range_only(self, repository: Repository) -> None:
        content = image_of(2, 4, 6, tail=noise(500))
        record = back_up(repository, content).record
        spoil(repository, record, 1)
        repository = Repository.open(repository.path)
        with closing(repository.open_disk(record, "disk")) as image:
            assert image.read(0, FRAME) == frame(2)
            assert image.read(2 * FRAME, FRAME + 500) == content[2 * FRAME :]
            for offset, length in [(FRAME, 1), (2 * FRAME - 1, 1), (0, len(content))]:
                with pytest.raises(Corrupt) as caught:
                    image.read(offset, length)
                error = caught.value
                assert (error.vm, error.revision, error.disk) == ("vm", record.id, "disk")
                assert (error.offset, error.length) == (FRAME, FRAME)
                assert error.exit_code == 12
            assert image.check(0, 4) == [1]
            assert image.check(2, 2) == []
            assert image.check_all([(0, 1), (2, 2)]) == []
            assert image.check_all([(0, 2), (3, 1)]) == [1]
            assert image.check_all([]) == []
        assert [(d.disk, d.extent) for d in repository.damage()[record.id]] == [
            ("disk", Extent(FRAME, FRAME))
        ]

    def test_the_next_backup_heals_what_the_source_still_has(self, repository: Repository) -> None:
        content = image_of(2, 4, 6, 8)
        first = back_up(repository, content).record
        unchanged = back_up(repository, content, first).record
        spoil(repository, first, 1)
        repository = Repository.open(repository.path)
        with closing(repository.open_disk(unchanged, "disk")) as image:
            assert image.check(0, 4) == [1]
        assert set(repository.damage()) == {first.id, unchanged.id}
        changed = image_of(2, 4, 7, 8)
        made = back_up(repository, changed, unchanged, content)
        assert 1 in covered(made.required["disk"])
        repository = Repository.open(repository.path)
        assert repository.damage() == {}
        for record, expected in ((first, content), (unchanged, content), (made.record, changed)):
            assert read_all(repository, record) == expected
            with closing(repository.open_disk(record, "disk")) as image:
                assert image.check(0, 4) == []
        repository.gc()
        assert repository.fsck() == []

    def test_what_the_source_has_no_more_stays_damaged(self, repository: Repository) -> None:
        content = image_of(2, 4, 6)
        first = back_up(repository, content).record
        spoil(repository, first, 1)
        with closing(repository.open_disk(first, "disk")) as image:
            assert image.check(0, 3) == [1]
        made = back_up(repository, image_of(2, 10, 6), first, content)
        assert set(repository.damage()) == {first.id}
        assert read_all(repository, made.record) == image_of(2, 10, 6)
        with closing(repository.open_disk(made.record, "disk")) as image:
            assert image.check(0, 3) == []
        after = back_up(repository, image_of(2, 10, 6), made.record)
        assert after.changed == 0
        repository.remove([first.id])
        repository.gc()
        assert repository.damage() == {}

    def test_damage_nobody_noticed_does_not_spread(self, repository: Repository) -> None:
        content = image_of(2, 4, 6)
        first = back_up(repository, content).record
        spoil(repository, first, 1)
        changed = image_of(2, 5, 6)
        record = back_up(repository, changed, first).record
        assert read_all(repository, record) == changed

    def test_a_missing_or_cut_file_is_damage_of_its_revisions(self, repository: Repository) -> None:
        content = image_of(2, 4, 6)
        first = back_up(repository, content).record
        second = back_up(repository, image_of(3, 5, 7), None).record
        for name in list(first.disks["disk"].files):
            path = repository.layout.revisions / name
            whole = path.read_bytes()
            for broken in (None, whole[:-1], whole[: len(whole) // 2], b""):
                path.unlink(missing_ok=True)
                if broken is not None:
                    path.write_bytes(broken)
                fresh = Repository.open(repository.path)
                assert set(fresh.damage()) == {first.id}
                if not fresh.structure(first):  # what is left of it proves all of it
                    assert read_all(fresh, first) == content
                    continue
                with pytest.raises(Corrupt) as caught:
                    read_all(fresh, first)
                assert first.id in str(caught.value)
                with pytest.raises(Corrupt, match="nothing is deleted"):
                    fresh.gc()
                assert read_all(fresh, second) == image_of(3, 5, 7)
                # It is no parent any more: the next backup takes all from the source.
                made = back_up(fresh, content, first, content)
                assert read_all(fresh, made.record) == content
                fresh.remove([made.record.id])
            path.unlink(missing_ok=True)
            path.write_bytes(whole)
        assert Repository.open(repository.path).damage() == {}


def crash(repository: Repository, parent: Record | None, content: bytes, *, seal: bool) -> None:
    """Begin a backup and die: what a killed process leaves behind."""
    with repository.writing() as intent:
        staging = repository.begin(intent, parent)
        staging.disk("disk", len(content)).write(0, content)
        if seal:
            staging.seal()
        staging._stage.close()


# ---- any sequence of operations ----------------------------------------------------------------

_SEEDS = st.integers(0, 9)
_TAILS = st.sampled_from([0, 1, 4096, 50000])


class Machine(RuleBasedStateMachine):
    """Backs up, removes, collects, crashes and reopens, against a dictionary of bytes."""

    kind: ClassVar[str]
    home: ClassVar[Path]

    def __init__(self) -> None:
        super().__init__()
        self.repository = Repository.create(self.home / secrets.token_hex(6), self.kind)
        self.contents: dict[str, bytes] = {}
        self.latest = b""

    @initialize(seeds=st.lists(_SEEDS, max_size=6), tail=_TAILS)
    def first_backup(self, seeds: list[int], tail: int) -> None:
        self.latest = image_of(*seeds, tail=noise(tail))
        self._back_up(self.latest, None)

    def _back_up(self, content: bytes, parent: Record | None, known: bytes | None = None) -> None:
        made = back_up(self.repository, content, parent, known, batch=2)
        assert made.record.disks["disk"].digest == digest_of(content)
        self.contents[made.record.id] = content
        self.latest = content

    def _changed(self, numbers: Mapping[int, int], frames: int | None, tail: int) -> bytes:
        content = self.latest
        for number, seed in numbers.items():
            if (number + 1) * FRAME <= len(content):
                at = number * FRAME
                content = content[:at] + frame(seed) + content[at + FRAME :]
        if frames is None:
            return content
        size = frames * FRAME + tail
        return content[:size].ljust(size, b"\0")

    @rule(
        numbers=st.dictionaries(st.integers(0, 7), _SEEDS, max_size=4),
        frames=st.none() | st.integers(0, 7),
        tail=_TAILS,
        scan=st.booleans(),
    )
    def next_backup(
        self, numbers: dict[int, int], frames: int | None, tail: int, scan: bool
    ) -> None:
        content = self._changed(numbers, frames, tail)
        parent = next(reversed(self.repository.revisions()), None)
        known = self.contents[parent.id] if parent and not scan else None
        self._back_up(content, parent, known)

    @precondition(lambda self: self.contents)
    @rule(choice=st.integers(0), block=st.integers(0, 15), number=st.integers(0, 7))
    def backup_on_an_older_one(self, choice: int, block: int, number: int) -> None:
        records = self.repository.revisions()
        parent = records[choice % len(records)]
        known = self.contents[parent.id]
        at = number * FRAME + block * 4096
        content = known[:at] + b"changed"[: max(0, len(known) - at)] + known[at + 7 :]
        self._back_up(content[: len(known)], parent, known)

    @precondition(lambda self: self.contents)
    @rule(choice=st.integers(0))
    def remove(self, choice: int) -> None:
        revision = sorted(self.contents)[choice % len(self.contents)]
        assert self.repository.remove([revision]).removed == [revision]
        del self.contents[revision]

    @rule()
    def collect(self) -> None:
        self.repository.gc()

    @rule(seeds=st.lists(_SEEDS, max_size=4), seal=st.booleans())
    def die_in_a_backup(self, seeds: list[int], seal: bool) -> None:
        parent = next(reversed(self.repository.revisions()), None)
        crash(self.repository, parent, image_of(*seeds, tail=b"!"), seal=seal)

    @rule()
    def reopen(self) -> None:
        self.repository = Repository.open(self.repository.path)

    @invariant()
    def every_revision_reads_back(self) -> None:
        records = {record.id: record for record in self.repository.revisions()}
        assert set(records) == set(self.contents)
        for revision, content in self.contents.items():
            assert read_all(self.repository, records[revision]) == content
            (disk,) = records[revision].disks.values()
            assert disk.data == bytes_of_data(content)

    @invariant()
    def the_store_is_sound(self) -> None:
        assert self.repository.fsck() == []
        assert self.repository.damage() == {}
