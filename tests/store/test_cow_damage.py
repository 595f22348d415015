"""Damage of cow revisions: found, told, never spread, healed by the next backup."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import pytest

from backyfs.errors import Corrupt
from backyfs.model import FRAME, Extent
from backyfs.store.cow.image import CowImage
from backyfs.store.digest import FAN_OUT, HASH
from backyfs.store.fs import SYSTEM, Fs, forget_pages
from backyfs.store.quarantine import WHOLE, Bad, Quarantine
from backyfs.store.record import Record
from backyfs.store.repository import Repository
from tests.conftest import SmallFs
from tests.filesystems import spoil_medium
from tests.store.contract import (
    DRAFT,
    GROUP,
    back_up,
    covered,
    digest_of,
    frame,
    image_of,
    noise,
    read_all,
)
from tests.store.test_faults_inodes import within

MIB = 1 << 20
BLOCK = 4096
HEAD = 4096


@pytest.fixture
def repository(reflink_dir: Path) -> Repository:
    return Repository.create(reflink_dir / "vm", "cow")


def image_path(repository: Repository, record: Record) -> Path:
    return repository.layout.revisions / f"{record.id}.disk.img"


def table_path(repository: Repository, record: Record) -> Path:
    return repository.layout.revisions / f"{record.id}.disk.sum"


def flip(path: Path, offset: int, mask: int = 1) -> None:
    """Flip bits of one byte of a file, in that file alone."""
    with open(path, "r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ mask]))


def lose(path: Path, offset: int, length: int) -> None:
    """Make a hole of a range, durably."""
    fd = os.open(path, os.O_RDWR)
    SYSTEM.punch(fd, offset, length)
    os.fsync(fd)
    os.close(fd)


@contextlib.contextmanager
def both_opened(
    repository: Repository, one: Record, other: Record
) -> Iterator[tuple[CowImage, CowImage]]:
    """The disk in two revisions."""
    with (
        closing(repository.open_disk(one, "disk")) as first,
        closing(repository.open_disk(other, "disk")) as second,
    ):
        assert isinstance(first, CowImage)
        assert isinstance(second, CowImage)
        yield first, second


def check(repository: Repository, record: Record) -> list[int]:
    """Bad frames of a disk."""
    with closing(repository.open_disk(record, "disk")) as image:
        return image.check(0, -(-image.size // FRAME))


def damaged(repository: Repository) -> dict[str, list[Extent | None]]:
    """What the repository knows to be damaged."""
    return {
        revision: [item.extent for item in items] for revision, items in repository.damage().items()
    }


# ---- the medium --------------------------------------------------------------------------------


@pytest.fixture(params=["xfs", "btrfs"])
def on_a_medium(request: pytest.FixtureRequest, small_fs: SmallFs) -> tuple[Repository, Path]:
    """A repository on a file system of its own, and the file that is its medium."""
    place = small_fs(request.param, 300 * MIB)
    return Repository.create(place / "vm", "cow"), place.parent / f"{request.param}.img"


def sync(repository: Repository) -> None:
    """Have everything on the medium and nothing in the page cache."""
    for path in repository.layout.revisions.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        forget_pages(fd)
        os.close(fd)


def test_a_bad_block_is_bad_in_all_that_share_it(on_a_medium: tuple[Repository, Path]) -> None:
    repository, medium = on_a_medium
    contents = [image_of(2, 4, 6, 8)]
    # The second changes another block of the frame, the third another frame, the fourth the block.
    contents.append(contents[0][: FRAME + 5000] + b"second" + contents[0][FRAME + 5006 :])
    contents.append(contents[1][:100] + b"third" + contents[1][105:])
    at = FRAME + 9 * BLOCK
    contents.append(contents[2][:at] + b"fourth" + contents[2][at + 6 :])
    records: list[Record] = []
    for number, content in enumerate(contents):
        parent, known = (records[-1], contents[number - 1]) if records else (None, None)
        records.append(back_up(repository, content, parent, known).record)
    sync(repository)
    assert spoil_medium(medium, contents[0][at : at + BLOCK]) == 1
    repository = Repository.open(repository.path)
    assert damaged(repository) == {}
    assert check(repository, records[1]) == [1]
    # Found in one, known of all that share the block.
    assert damaged(repository) == {record.id: [Extent(FRAME, FRAME)] for record in records[:3]}
    for record, content in zip(records, contents, strict=True):
        with closing(repository.open_disk(record, "disk")) as image:
            assert image.read(0, FRAME) == content[:FRAME]
            assert image.read(2 * FRAME, 2 * FRAME) == content[2 * FRAME :]
            if record is not records[3]:
                with pytest.raises(Corrupt) as caught:
                    image.read(FRAME, 10)
                assert (caught.value.revision, caught.value.offset) == (record.id, FRAME)
    # The guest is back at the third state: one frame of the source heals all three, though two
    # of them hold it with another block.
    made = back_up(repository, contents[2], records[3], contents[3])
    assert covered(made.required["disk"]) == {1}
    assert damaged(repository) == {}
    sync(repository)
    for record, content in zip([*records, made.record], [*contents, contents[2]], strict=True):
        assert read_all(repository, record) == content
        assert check(repository, record) == []


def test_reading_finds_it_too(on_a_medium: tuple[Repository, Path]) -> None:
    repository, medium = on_a_medium
    content = image_of(2, 4, tail=noise(5000))
    record = back_up(repository, content).record
    sync(repository)
    assert spoil_medium(medium, content[FRAME + BLOCK : FRAME + 2 * BLOCK]) == 1
    repository = Repository.open(repository.path)
    with closing(repository.open_disk(record, "disk")) as image:
        for _ in range(2):
            with pytest.raises(Corrupt) as caught:
                image.read(100, len(content) - 100)
            assert (caught.value.offset, caught.value.length) == (FRAME, FRAME)
        assert image.read(2 * FRAME, 5000) == content[2 * FRAME :]
    assert damaged(repository) == {record.id: [Extent(FRAME, FRAME)]}
    with closing(repository.open_disk(record, "disk", check=False)) as image:
        if "btrfs" in str(medium):  # which checks by itself; XFS hands out what it reads
            with pytest.raises(Corrupt):
                image.read(FRAME, FRAME)
        else:
            assert image.read(FRAME, FRAME) != content[FRAME : 2 * FRAME]


def test_what_was_written_just_now_is_looked_at(repository: Repository) -> None:
    """It lies nowhere yet: the file system still has the clone in the place of its parent."""
    data = noise(8 * FRAME)
    first = back_up(repository, data).record
    changed = data[:FRAME] + frame(9) + data[2 * FRAME :]
    second = back_up(repository, changed, first).record
    flip(image_path(repository, second), 5 * FRAME + 9)
    with both_opened(repository, first, second) as (before, image):
        assert 5 in covered(image.unshared(before))


def test_an_unreadable_parent_block_does_not_stop_a_backup(
    on_a_medium: tuple[Repository, Path],
) -> None:
    repository, medium = on_a_medium
    content = image_of(2, 4, 6)
    first = back_up(repository, content).record
    sync(repository)
    spoil_medium(medium, content[FRAME : FRAME + BLOCK])
    changed = content[: FRAME + 5000] + b"changed" + content[FRAME + 5007 :]
    made = back_up(Repository.open(repository.path), changed, first, content)
    sync(repository)
    assert check(repository, made.record) == []
    assert read_all(repository, made.record) == changed
    assert check(repository, first) == [1]


@pytest.mark.parametrize("suffix", ["img", "sum"])
def test_looking_where_else_a_block_is_waits_for_no_fifo(
    repository: Repository, suffix: str
) -> None:
    content = image_of(2, 4, 6, 8)
    first = back_up(repository, content)
    second = back_up(repository, content[:-1] + b"2", first.record, content)
    sync(repository)
    flip(image_path(repository, first.record), 77)
    victim = image_path(repository, second.record).with_suffix(f".{suffix}")
    victim.unlink()
    os.mkfifo(victim)

    def found() -> None:
        assert check(repository, first.record) == [0]

    within(60, found)


def test_a_lost_block_is_not_shared(repository: Repository) -> None:
    content = image_of(2, 4, 6)
    first = back_up(repository, content).record
    second = back_up(repository, image_of(2, 4, 8), first, content).record
    lose(image_path(repository, second), FRAME + 2 * BLOCK, BLOCK)
    with both_opened(repository, first, second) as (old, new):
        assert covered(new.unshared(old)) == {1, 2}  # who checks the rest checks all there is
        assert new.check(1, 1) == [1]


@pytest.mark.parametrize("suffixes", [("img", "sum"), ("sum",)])
def test_lost_hashes_are_not_shared(repository: Repository, suffixes: Sequence[str]) -> None:
    """Nothing tells that there was ever anything; the revision before has it all."""
    content = image_of(2, 4, *[0] * 1022, 6)
    first = back_up(repository, content).record
    second = back_up(repository, content[:-FRAME] + image_of(8), first, content).record
    for suffix in suffixes:
        at, length = (HEAD, 4096) if suffix == "sum" else (0, 2 * FRAME)
        lose(image_path(repository, second).with_suffix(f".{suffix}"), at, length)
    with both_opened(repository, first, second) as (old, new):
        assert covered(new.unshared(old)) == set(range(1025))
        assert covered(old.unshared(new)) >= {1024}
        assert new.check(0, 2) == [0, 1]


# ---- tables ------------------------------------------------------------------------------------


def test_a_damaged_frame_hash_costs_no_data(repository: Repository) -> None:
    content = image_of(2, 4, 0, 6)
    record = back_up(repository, content).record
    for number in range(4):
        flip(table_path(repository, record), HEAD + number * 32 + 5)
        fresh = Repository.open(repository.path)
        assert read_all(fresh, record) == content  # level 1 confirms what the data hashes to
        with closing(fresh.open_disk(record, "disk")) as image:
            assert image.hashes(0, 2) == image.hashes(0, 4)[:64]
        assert check(fresh, record) == [number]
        extent = Extent(number * FRAME, FRAME)
        assert damaged(fresh) == {kept.id: [extent] for kept in fresh.revisions()}
        made = back_up(fresh, content, record, content)
        assert covered(made.required["disk"]) == {number}
        assert made.record.disks["disk"].files == record.disks["disk"].files
        assert damaged(fresh) == {}
        assert fresh.fsck() == []


def test_an_unnoticed_damaged_hash_does_not_spread(repository: Repository) -> None:
    content = image_of(2, 4, 6)
    record = back_up(repository, content).record
    flip(table_path(repository, record), HEAD + 32 + 5)
    changed = image_of(2, 4, 8)
    made = back_up(repository, changed, record, content)
    assert made.record.disks["disk"].digest == digest_of(changed)
    assert read_all(repository, made.record) == changed
    assert damaged(repository) == {}
    assert repository.fsck() == []


def test_a_group_nothing_proves_is_taken_from_the_source(repository: Repository) -> None:
    content = image_of(2, 4, 6, 8)
    record = back_up(repository, content).record
    flip(table_path(repository, record), HEAD + 5)
    flip(image_path(repository, record), 2 * FRAME)
    repository = Repository.open(repository.path)
    with closing(repository.open_disk(record, "disk")) as image:
        with pytest.raises(Corrupt) as caught:
            image.read(3 * FRAME, 1)
        assert (caught.value.offset, caught.value.length) == (0, 4 * FRAME)
        with pytest.raises(Corrupt):
            image.hashes(1, 1)
    changed = image_of(2, 4, 6, 10)
    made = back_up(repository, changed, record, content)
    assert covered(made.required["disk"]) == {0, 1, 2, 3}
    assert made.record.disks["disk"].digest == digest_of(changed)
    assert read_all(repository, made.record) == changed
    assert check(repository, made.record) == []
    assert set(damaged(repository)) == {record.id}


def test_what_is_required_must_be_written(repository: Repository) -> None:
    content = image_of(2, 4, 6)
    record = back_up(repository, content).record
    flip(table_path(repository, record), HEAD + 5)
    flip(image_path(repository, record), 2 * FRAME)
    with repository.writing() as intent, repository.begin(intent, record) as staging:
        staging.disk("disk", len(content)).write(FRAME, frame(8))
        with pytest.raises(Corrupt, match="not stored again"):
            staging.seal()
    assert repository.revisions() == [record]


def test_damage_left_alone_is_the_clones_too(repository: Repository) -> None:
    content = image_of(2, 4, 6)
    first = back_up(repository, content).record
    flip(image_path(repository, first), FRAME)
    assert check(repository, first) == [1]
    with repository.writing() as intent, repository.begin(intent, first) as staging:
        staging.disk("disk", len(content)).write(0, frame(8))
        second = staging.commit(DRAFT)
    assert damaged(repository) == {
        first.id: [Extent(FRAME, FRAME)],
        second.id: [Extent(FRAME, FRAME)],
    }


def test_many_bad_frames_are_recorded_one_by_one(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To list all that is known for each would take hours where a table is lost."""
    content = image_of(*range(2, 82, 2))
    first = back_up(repository, content).record
    listings = Mock(side_effect=Quarantine.bad, autospec=True)
    monkeypatch.setattr(Quarantine, "bad", lambda self: listings(self))

    def listings_to_find(*frames: int) -> int:
        for number in frames:
            flip(image_path(repository, first), number * FRAME)
        listings.reset_mock()
        with closing(repository.open_disk(first, "disk")) as image:
            assert set(image.check(0, 40)) >= set(frames)
        return listings.call_count

    assert listings_to_find(3) == listings_to_find(*range(4, 40)) > 0
    assert len(repository.quarantine.bad()) == 37
    listings.reset_mock()
    back_up(repository, content, first, content)
    assert listings.call_count < 10
    assert check(repository, first) == []


# ---- every byte --------------------------------------------------------------------------------


@contextlib.contextmanager
def changed_file(path: Path, data: bytes) -> Iterator[None]:
    """The file with other content, put back in the end."""
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(whole)


def test_a_flip_anywhere_is_found(xfs_dir: Path) -> None:
    repository = Repository.create(xfs_dir / "vm", "cow")
    content = image_of(2, 0, 3, tail=noise(3000))
    record = back_up(repository, content).record
    other = back_up(repository, image_of(8)).record
    for path in (image_path(repository, record), table_path(repository, record)):
        whole = path.read_bytes()
        for at in [*range(0, 64, 7), *range(64, len(whole), 3001), len(whole) - 1, len(whole) - 33]:
            with changed_file(path, whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]):
                fresh = Repository.open(repository.path)
                bad: list[int] = []
                with contextlib.suppress(Corrupt):
                    bad = check(fresh, record)
                assert bad or fresh.damage_of(record), (path.name, at)
                assert set(fresh.damage()) == {record.id}
                assert all(frame == at // FRAME for frame in bad) or path.suffix == ".sum"
                assert read_all(fresh, other) == image_of(8)
                with contextlib.suppress(Corrupt):
                    assert read_all(fresh, record) == content
            with contextlib.suppress(Corrupt):
                check(Repository.open(repository.path), record)  # reads well again
            assert repository.quarantine.bad() == set()
    assert read_all(repository, record) == content


def test_a_wrong_table_is_not_taken(repository: Repository) -> None:
    one = back_up(repository, image_of(2, 4)).record
    two = back_up(repository, image_of(6, 8)).record
    with (
        changed_file(table_path(repository, one), table_path(repository, two).read_bytes()),
        pytest.raises(Corrupt, match="not what the record says"),
    ):
        repository.open_disk(one, "disk")


def test_a_whole_unit_in_quarantine(repository: Repository) -> None:
    record = back_up(repository, image_of(2, 4)).record
    repository.quarantine.add(Bad(f"{record.id}.disk", WHOLE), "by hand")
    assert damaged(repository) == {record.id: [Extent(0, 2 * FRAME)]}


# ---- healing -----------------------------------------------------------------------------------


def test_older_images_are_healed_where_only_they_are_hit(repository: Repository) -> None:
    contents = [image_of(2, 4, 6), image_of(2, 4, 8)]
    first = back_up(repository, contents[0]).record
    second = back_up(repository, contents[1], first, contents[0]).record
    flip(image_path(repository, first), FRAME + 77)  # unshares the block: the second is whole
    assert check(repository, first) == [1]
    assert check(repository, second) == []
    made = back_up(repository, contents[1], second, contents[1])
    assert covered(made.required["disk"]) == {1}
    assert damaged(repository) == {}
    assert read_all(repository, first) == contents[0]
    assert made.record.disks["disk"].files == second.disks["disk"].files


def test_nothing_is_read_or_healed_behind_a_link(repository: Repository) -> None:
    """Who fills a directory and owns the guest would write what he likes, where he likes."""
    content = image_of(2, 4)
    record = back_up(repository, content).record
    flip(image_path(repository, record), 5)
    assert check(repository, record) == [0]
    outside = repository.path.parent / "outside"
    outside.write_bytes(noise(len(content), seed=9))
    image_path(repository, record).unlink()
    image_path(repository, record).symlink_to(outside)
    with pytest.raises(Corrupt, match="it is a symbolic link"):
        repository.open_disk(record, "disk", check=False)
    back_up(repository, content, record, content)
    assert outside.read_bytes() == noise(len(content), seed=9)


def test_healing_a_short_last_frame_and_a_hole(repository: Repository) -> None:
    content = image_of(2, 0, tail=noise(777))
    record = back_up(repository, content).record
    flip(image_path(repository, record), FRAME + 5)
    flip(image_path(repository, record), 2 * FRAME + 5)
    assert check(repository, record) == [1, 2]
    back_up(repository, content, record, content)
    assert damaged(repository) == {}
    assert check(repository, record) == []
    assert image_path(repository, record).read_bytes() == content


def test_healing_while_the_disk_is_resized(repository: Repository) -> None:
    content = image_of(2, 4, tail=noise(777))
    record = back_up(repository, content).record
    flip(image_path(repository, record), 2 * FRAME + 5)
    assert check(repository, record) == [2]
    grown = content + bytes(2 * FRAME)
    made = back_up(repository, grown, record, content)
    assert damaged(repository) == {}
    for kept, expected in ((record, content), (made.record, grown)):
        assert read_all(repository, kept) == expected
        assert check(repository, kept) == []


def test_a_reader_sees_the_healed_frame(repository: Repository) -> None:
    content = image_of(2, 4)
    record = back_up(repository, content).record
    flip(image_path(repository, record), 5)
    with closing(repository.open_disk(record, "disk")) as image:
        with pytest.raises(Corrupt):
            image.read(0, 1)
        back_up(repository, content, record, content)
        assert image.read(0, len(content)) == content


def test_only_what_the_hash_allows_is_written_into_a_published_file(
    repository: Repository,
) -> None:
    content = image_of(2, 4, 6)
    record = back_up(repository, content).record
    flip(image_path(repository, record), FRAME + 77)
    assert check(repository, record) == [1]
    spoiled = image_path(repository, record).read_bytes()
    # Two blocks of the source's frame differ now, one of them the bad one.
    changed = bytearray(content)
    changed[FRAME + 80] ^= 1
    changed[FRAME + 5000] ^= 1
    back_up(repository, bytes(changed), record, content)
    assert image_path(repository, record).read_bytes() == spoiled
    assert set(damaged(repository)) == {record.id}


def test_a_damaged_parent_at_the_cut_of_a_shrinking_disk(repository: Repository) -> None:
    content = image_of(2, 4, 6)
    record = back_up(repository, content).record
    flip(image_path(repository, record), FRAME + 77)
    size = FRAME + 5000
    with repository.writing() as intent, repository.begin(intent, record) as staging:
        writer = staging.disk("disk", size)
        assert writer.required() == [Extent(FRAME, 5000)]
        writer.write(FRAME, content[FRAME:size])
        made = staging.commit(DRAFT)
    assert read_all(repository, made) == content[:size]
    assert check(repository, made) == []
    assert check(repository, record) == [1]


def test_an_unproven_group_behind_the_end_of_a_shrinking_disk(repository: Repository) -> None:
    content = image_of(2) + bytes(GROUP - FRAME) + image_of(4, 6)
    record = back_up(repository, content).record
    flip(table_path(repository, record), HEAD + 1024 * 32 + 5)
    flip(image_path(repository, record), GROUP + FRAME)
    size = GROUP // 2
    made = back_up(repository, content[:size], record)
    assert read_all(repository, made.record) == content[:size]
    assert check(repository, made.record) == []


def _flip_head(path: Path) -> None:
    flip(path, 20)


def _zero_head(path: Path) -> None:
    with open(path, "r+b") as stream:
        stream.write(bytes(HEAD))


def _flip_level1(path: Path) -> None:
    flip(path, path.stat().st_size - 5)


def _flip_level1_of_zeros(path: Path) -> None:
    flip(path, path.stat().st_size - 2 * HASH + 5)


def _cut_level1(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3 * HASH)


def _lengthen(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


_TABLE_DAMAGE = [
    _flip_head,
    _zero_head,
    _flip_level1,
    _flip_level1_of_zeros,
    _cut_level1,
    _lengthen,
]


@pytest.mark.parametrize("damage", _TABLE_DAMAGE)
@pytest.mark.parametrize("size", ["same", "less", "more"])
def test_the_digest_makes_up_for_head_and_level_1(
    repository: Repository, damage: Callable[[Path], None], size: str
) -> None:
    hole = 2 * FAN_OUT * FRAME
    content = image_of(2, 0, 3) + bytes(hole) + image_of(5)
    record = back_up(repository, content).record
    damage(table_path(repository, record))
    fresh = Repository.open(repository.path)
    assert fresh.structure(record) == []
    assert set(fresh.damage()) == {record.id}
    assert read_all(fresh, record) == content
    assert check(fresh, record) == []
    # It serves as a parent, and what is made from it is sound.
    later = {"same": content, "less": content[:-1], "more": content + image_of(7)}[size]
    made = back_up(fresh, later, record, content).record
    assert read_all(fresh, made) == later
    assert check(fresh, made) == []
    ((revision, (problem,)),) = fresh.damage().items()
    assert revision == record.id
    assert fresh.fsck() == [f"{record.id}/disk: {problem.reason}"]


class _WrongHeads(Fs):
    """Tables do not hold what was written."""

    def rename(self, source: Path, target: Path) -> None:
        if target.suffix == ".sum":
            _flip_head(source)
        super().rename(source, target)


def test_a_new_table_that_is_wrong_is_not_published(repository: Repository) -> None:
    fresh = Repository.open(repository.path, fs=_WrongHeads())
    with pytest.raises(Corrupt, match="checksum"):
        back_up(fresh, image_of(2, 4))
    assert repository.revisions() == []


def test_what_keeps_nothing_from_being_read_hides_no_bad_frame(repository: Repository) -> None:
    record = back_up(repository, image_of(2, 4, 6)).record
    _flip_head(table_path(repository, record))
    flip(image_path(repository, record), FRAME)
    assert check(repository, record) == [1]
    found = [item.extent for item in Repository.open(repository.path).damage_of(record)]
    assert found == [None, Extent(FRAME, FRAME)]


def test_a_parent_whose_files_are_no_use(repository: Repository) -> None:
    content = image_of(2, 4, 6)
    record = back_up(repository, content).record
    os.truncate(table_path(repository, record), HEAD)
    changed = image_of(2, 5, 6)
    made = back_up(repository, changed, record, content)
    assert made.required["disk"] == [Extent(0, len(content))]
    assert read_all(repository, made.record) == changed
    with closing(repository.open_disk(made.record, "disk")) as image:
        assert isinstance(image, CowImage)
    assert set(damaged(repository)) == {record.id}
