"""The cow format on real XFS and btrfs: what it shares, what it writes, what it costs."""

from __future__ import annotations

import filecmp
import logging
import os
import shutil
import subprocess
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from blake3 import blake3

from backyfs.cancelling import checking
from backyfs.errors import Busy, Corrupt, NoRevision, NoSpace, Unsupported, UsageError
from backyfs.model import FRAME, Extent
from backyfs.store import space
from backyfs.store.choice import choose_store
from backyfs.store.contract import Buffer
from backyfs.store.cow import files as cow_files
from backyfs.store.cow import target
from backyfs.store.cow.fiemap import extent_count
from backyfs.store.cow.image import CowImage
from backyfs.store.cow.reflink import cow_extent_size, is_btrfs
from backyfs.store.cow.stage import CowStage
from backyfs.store.cow.strategy import CowFormat
from backyfs.store.format import Place
from backyfs.store.fs import Fs
from backyfs.store.header import SUM_MAGIC, Header
from backyfs.store.record import Record
from backyfs.store.repository import Repository
from tests.conftest import SmallFs
from tests.store.contract import (
    DRAFT,
    Made,
    back_up,
    covered,
    digest_of,
    files,
    frame,
    image_of,
    noise,
    read_all,
    spoil,
)

MIB = 1 << 20
BLOCK = 4096


class Counting(Fs):
    """Counts calls and the bytes that are written."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.written = 0

    def call(self, name: str) -> None:
        self.calls.append(name)

    def pwrite(self, fd: int, data: Buffer, offset: int, path: object = "") -> None:
        self.written += len(data)
        super().pwrite(fd, data, offset, path)


@pytest.fixture
def repository(reflink_dir: Path) -> Repository:
    return Repository.create(reflink_dir / "vm", "cow")


def image_path(repository: Repository, record: Record, disk: str = "disk") -> Path:
    [name] = [name for name in record.disks[disk].files if name.endswith(".img")]
    return repository.layout.revisions / name


def table_path(repository: Repository, record: Record) -> Path:
    return image_path(repository, record).with_suffix(".sum")


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def used(path: Path) -> int:
    """Bytes in use on a file system, once all that is pending is done."""
    subprocess.run(["sync", "-f", path], check=True)
    status = os.statvfs(path)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def replaced(content: bytes, *blocks: int, seed: int = 77) -> bytes:
    """Content with some 4 KiB blocks replaced by noise."""
    changed = bytearray(content)
    for block in blocks:
        changed[block * BLOCK : (block + 1) * BLOCK] = noise(BLOCK, seed + block)
    return bytes(changed)


# ---- the place ---------------------------------------------------------------------------------


def test_is_btrfs(tmp_path: Path, xfs_dir: Path, btrfs_dir: Path, ext4_dir: Path) -> None:
    assert is_btrfs(btrfs_dir)
    assert not is_btrfs(xfs_dir)
    assert not is_btrfs(ext4_dir)
    assert not is_btrfs(btrfs_dir / "nothing" / "here")
    assert (choose_store(btrfs_dir), choose_store(xfs_dir)) == ("cow", "packs")


def test_a_file_system_without_reflinks_is_refused(ext4_dir: Path) -> None:
    with pytest.raises(UsageError, match=r"^store cow needs btrfs or XFS with reflink: ") as caught:
        Repository.create(ext4_dir / "vm", "cow")
    assert "\n" not in str(caught.value)
    assert "packs" in caught.value.hint
    assert not [path for path in ext4_dir.rglob("*") if path.is_file()]


def test_a_repository_moved_to_such_a_place_can_be_read(btrfs_dir: Path, ext4_dir: Path) -> None:
    first = image_of(2, 0, 3, tail=b"x")
    record = back_up(Repository.create(btrfs_dir / "vm", "cow"), first).record
    shutil.copytree(btrfs_dir / "vm", ext4_dir / "vm")
    moved = Repository.open(ext4_dir / "vm")
    assert read_all(moved, record) == first
    assert moved.fsck() == []
    assert back_up(moved, first, record).changed == 0
    before = files(moved)
    with pytest.raises(UsageError, match="store cow needs btrfs or XFS with reflink"):
        back_up(moved, image_of(2, 4, 3, tail=b"x"), record)
    assert files(moved) == before


def test_xfs_preallocates_no_more_than_a_block(xfs_dir: Path) -> None:
    repository = Repository.create(xfs_dir / "vm", "cow")
    assert cow_extent_size(repository.layout.revisions) == BLOCK
    first = back_up(repository, image_of(2, 4)).record
    second = back_up(repository, image_of(2, 6), first).record
    for record in (first, second):
        assert cow_extent_size(image_path(repository, record)) == BLOCK


# ---- what is stored ----------------------------------------------------------------------------


def test_an_image_is_a_plain_file(repository: Repository, tmp_path: Path) -> None:
    content = image_of(2, 0, 3, 4, 0, tail=noise(12345))
    record = back_up(repository, content).record
    path = image_path(repository, record)
    (tmp_path / "original").write_bytes(content)
    assert path.name == f"{record.id}.disk.img"
    assert path.stat().st_size == len(content)
    assert filecmp.cmp(path, tmp_path / "original", shallow=False)
    assert set(record.disks["disk"].files) == {path.name, f"{record.id}.disk.sum"}
    assert record.disks["disk"].files[path.name] == ""


def test_the_record_names_head_and_level_1_of_the_table(repository: Repository) -> None:
    content = image_of(2, 0, 3)
    record = back_up(repository, content).record
    data = table_path(repository, record).read_bytes()
    assert data[:8] == b"bfs-sum\n"
    assert data[4096:4128] == blake3(frame(2)).digest()
    assert data[4128:4160] == bytes(32)
    assert len(data) == 4096 + 3 * 32 + 32
    named = record.disks["disk"].files[table_path(repository, record).name]
    assert named == blake3(data[:4096] + data[4096 + 3 * 32 :]).hexdigest()


def test_zero_blocks_are_holes(repository: Repository) -> None:
    content = bytearray(noise(FRAME * 4))
    for block in (3, 4, 17, 40):
        content[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
    first = back_up(repository, bytes(content)).record
    assert allocated(image_path(repository, first)) == (64 - 4) * BLOCK
    content[20 * BLOCK : 24 * BLOCK] = bytes(4 * BLOCK)
    second = back_up(repository, bytes(content), first).record
    assert allocated(image_path(repository, second)) == (64 - 8) * BLOCK
    assert read_all(repository, second) == content
    with closing(repository.open_disk(second, "disk", check=False)) as image:
        assert Extent(18 * BLOCK, 2 * BLOCK) in list(image.extents())
    with closing(repository.open_disk(second, "disk")) as image:
        assert list(image.extents()) == [Extent(0, 4 * FRAME)]  # frames, where these are checked


def test_bytes_are_durable_before_they_have_a_name(repository: Repository) -> None:
    first = back_up(repository, noise(4 * FRAME)).record
    steps: list[tuple[str, str]] = []

    class Noted(Fs):
        def fsync(self, fd: int, path: object = "") -> None:
            super().fsync(fd, path)
            steps.append(("fsync", Path(str(path)).suffix))

        def rename(self, old: Path, new: Path) -> None:
            super().rename(old, new)
            steps.append(("rename", new.suffix))

        def sync_dir(self, path: Path) -> None:
            super().sync_dir(path)
            steps.append(("sync", path.name))

    back_up(Repository.open(repository.path, fs=Noted()), noise(4 * FRAME, 1), first)
    assert set(steps[:2]) == {("fsync", ".img"), ("fsync", ".sum")}
    assert set(steps[2:4]) == {("rename", ".img"), ("rename", ".sum")}
    assert steps[4:] == [
        ("sync", "revisions"),
        ("fsync", ".json"),
        ("rename", ".json"),
        ("sync", "revisions"),
    ]


def test_only_blocks_that_differ_are_written(repository: Repository) -> None:
    content = noise(64 * FRAME)
    first = back_up(repository, content).record
    # Two alone, three neighbours, the borders of a frame, one that becomes zeros.
    changed = bytearray(replaced(content, 5, 100, 200, 201, 202, 31, 32))
    changed[300 * BLOCK : 301 * BLOCK] = bytes(BLOCK)
    counting = Counting()
    fresh = Repository.open(repository.path, fs=counting)
    made = back_up(fresh, bytes(changed), first)
    frames = {0, 6, 12, 1, 2, 18}
    assert covered(made.written["disk"]) == frames
    level1 = 32
    assert made.stored == 7 * BLOCK + len(frames) * 32 + level1
    assert counting.calls.count("punch") == 1
    # The neighbours go out together, unless a frame ends between them.
    assert counting.calls.count("pwrite") <= 5 + len(frames) + 1 + 1
    assert read_all(fresh, made.record) == changed


def test_an_increment_takes_the_space_of_what_changed(small_fs: SmallFs) -> None:
    for kind in ("xfs", "btrfs"):
        place = small_fs(kind, 600 * MIB)
        repository = Repository.create(place / "vm", "cow")
        content = noise(96 * MIB)
        first = back_up(repository, content, batch=32).record
        full = used(place)
        blocks = range(7, len(content) // BLOCK, 53)  # 464 blocks, each in an extent of its own
        changed = replaced(content, *blocks)
        made = back_up(repository, changed, first, content)
        grown = used(place) - full
        assert grown < 1.5 * len(blocks) * BLOCK + 2 * MIB, kind
        assert made.stored < 1.2 * len(blocks) * BLOCK
        assert read_all(repository, made.record) == changed
        repository.remove([first.id])
        assert read_all(repository, made.record) == changed


def test_an_unchanged_disk_makes_no_file(repository: Repository) -> None:
    content = image_of(*range(2, 20))
    record = back_up(repository, content).record
    counting = Counting()
    fresh = Repository.open(repository.path, fs=counting)
    for known in (content, None):
        before = files(fresh)
        made = back_up(fresh, content, record, known)
        assert files(fresh) - before == {f"revisions/{made.record.id}.json"}
    assert "clone" not in counting.calls
    assert counting.written < 1000  # the intents


def test_the_number_of_syncs_is_bounded(repository: Repository) -> None:
    content = {"root": image_of(2, 3), "data": image_of(4)}
    record = back_up(repository, content).record
    counting = Counting()
    fresh = Repository.open(repository.path, fs=counting)
    back_up(fresh, {"root": image_of(2, 5), "data": image_of(4)}, record)
    syncs = [name for name in counting.calls if name in ("fsync", "fdatasync", "sync_dir")]
    assert len(syncs) <= 8


def test_a_frame_may_be_written_twice(repository: Repository) -> None:
    content = image_of(2, 4, 6)
    parent = back_up(repository, content).record
    with repository.writing() as intent, repository.begin(intent, parent) as staging:
        writer = staging.disk("disk", len(content))
        assert writer.write(0, frame(8)) == FRAME
        assert writer.write(0, frame(2)) == FRAME  # the parent's again
        writer.write(FRAME, frame(8))
        writer.write(FRAME, frame(10))
        writer.zero(2 * FRAME, FRAME)
        writer.write(2 * FRAME, frame(12))
        record = staging.commit(DRAFT)
    assert read_all(repository, record) == image_of(2, 10, 12)
    assert record.disks["disk"].digest == digest_of(image_of(2, 10, 12))


def test_much_data_is_synced_on_the_way(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "SYNC_BYTES", 4 * FRAME)
    counting = Counting()
    fresh = Repository.open(repository.path, fs=counting)
    content = image_of(*range(2, 42, 2))
    record = back_up(fresh, content, batch=2).record
    assert counting.calls.count("fdatasync") >= 5
    assert read_all(fresh, record) == content


# ---- fragmented images -------------------------------------------------------------------------


def with_limit(repository: Repository, extents_max: int) -> Repository:
    """The repository with a lower limit of extents."""
    fresh = Repository.open(repository.path)
    place = Place(fresh.layout, fresh.uuid, fresh.fs, fresh.quarantine)
    fresh.format = CowFormat(place, extents_max=extents_max)
    return fresh


def extents_of(repository: Repository, record: Record) -> int:
    with open(image_path(repository, record), "rb") as stream:
        return extent_count(stream.fileno())


def fragmented(repository: Repository) -> tuple[Record, bytes]:
    """An image of many extents, made by changing every other block."""
    content = noise(16 * FRAME)
    first = back_up(repository, content).record
    changed = replaced(content, *range(0, 256, 2))
    return back_up(repository, changed, first).record, changed


def notes_of(repository: Repository, parent: Record, content: bytes) -> tuple[Made, list[str]]:
    """Back up and tell what the stage noted."""
    with repository.writing() as intent, repository.begin(intent, parent) as staging:
        writer = staging.disk("disk", len(content))
        changed = writer.write(0, content)
        assert isinstance(staging._stage, CowStage)
        notes = staging._stage.notes
        return Made(staging.commit(DRAFT), changed), notes


def test_a_fragmented_image_is_written_as_a_fresh_file(
    repository: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    parent, content = fragmented(repository)
    many = extents_of(repository, parent)
    assert many > 100
    changed = replaced(content, 9)
    repository = with_limit(repository, 100)
    with caplog.at_level(logging.INFO):
        made, notes = notes_of(repository, parent, changed)
    assert notes == [f"disk disk: written as a fresh file, the parent has {many} extents"]
    assert notes[0] in caplog.text
    assert made.changed == FRAME
    assert extents_of(repository, made.record) < 10
    assert read_all(repository, made.record) == changed
    assert repository.fsck() == []
    made, notes = notes_of(repository, made.record, replaced(changed, 11))
    assert notes == []
    # An unchanged disk stays as it is, however fragmented.
    before = files(repository)
    unchanged, notes = notes_of(repository, parent, content)
    assert files(repository) - before == {f"revisions/{unchanged.record.id}.json"}
    assert notes == []


def test_a_fragmented_image_is_cloned_where_nothing_else_fits(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, content = fragmented(repository)
    changed = replaced(content, 9)
    repository = with_limit(repository, 100)
    monkeypatch.setattr(space, "free_bytes", lambda path: space.reserve_bytes(path) + 15 * FRAME)
    made, notes = notes_of(repository, parent, changed)
    assert len(notes) == 1
    assert "no fresh file" in notes[0]
    assert extents_of(repository, made.record) > 100
    assert read_all(repository, made.record) == changed
    monkeypatch.undo()
    made, notes = notes_of(repository, made.record, content)
    assert "written as a fresh file" in notes[0]
    assert read_all(repository, made.record) == content


def test_a_file_fragmented_from_the_start_is_not_written_again_and_again(
    repository: Repository,
) -> None:
    content = bytearray(noise(16 * FRAME))
    for block in range(0, 256, 2):
        content[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
    repository = with_limit(repository, 10)
    first = back_up(repository, bytes(content)).record
    assert extents_of(repository, first) >= 128
    made, notes = notes_of(repository, first, replaced(bytes(content), 1))
    assert notes == []
    assert made.changed == FRAME


def test_a_fresh_file_hides_no_damage(repository: Repository) -> None:
    parent, content = fragmented(repository)
    spoil(repository, parent, 5)
    repository = with_limit(repository, 100)
    with repository.writing() as intent, repository.begin(intent, parent) as staging:
        writer = staging.disk("disk", len(content))
        assert writer.required() == []  # nobody has seen it yet
        writer.write(9 * FRAME, replaced(content, 145)[9 * FRAME : 10 * FRAME])
        assert writer.required() == [Extent(5 * FRAME, FRAME)]
        record = staging.commit(DRAFT)
    assert set(repository.damage()) == {parent.id, record.id}
    with closing(repository.open_disk(record, "disk")) as image:
        assert image.check(0, 16) == [5]
        with pytest.raises(Corrupt):
            image.read(5 * FRAME, 1)
    healed = back_up(repository, replaced(content, 145), record)
    assert repository.damage() == {}
    for one, expected in ((parent, content), (record, replaced(content, 145))):
        assert read_all(repository, one) == expected
    assert healed.changed == 0


def test_a_fresh_file_is_not_blamed_for_what_it_has_anew(repository: Repository) -> None:
    """The frame that is copied is damaged; the source brings another in its place."""
    parent, content = fragmented(repository)
    spoil(repository, parent, 5)
    repository = with_limit(repository, 100)
    changed = replaced(content, 81)
    with repository.writing() as intent, repository.begin(intent, parent) as staging:
        staging.disk("disk", len(content)).write(5 * FRAME, changed[5 * FRAME : 6 * FRAME])
        record = staging.commit(DRAFT)
    assert set(repository.damage()) == {parent.id}
    assert read_all(repository, record) == changed


def test_a_fresh_file_is_given_up_when_it_is_cancelled(repository: Repository) -> None:
    parent, content = fragmented(repository)
    repository = with_limit(repository, 100)

    class Cancelled(BaseException):
        pass

    def cancelled() -> None:
        raise Cancelled

    with (
        pytest.raises(Cancelled),
        repository.writing() as intent,
        repository.begin(intent, parent) as staging,
        checking(cancelled),
    ):
        staging.disk("disk", len(content)).write(0, replaced(content, 1)[:FRAME])
    assert repository.revisions()[-1] == parent
    assert not list((repository.path / "revisions").glob("*.tmp"))


def test_a_fresh_file_keeps_no_garbage(repository: Repository) -> None:
    """What is copied of a damaged hole gives way to what the source has, its zeros, too."""
    content = noise(15 * FRAME) + bytes(3 * FRAME)
    first = back_up(repository, content).record
    content = replaced(content, *range(0, 240, 2))
    parent = back_up(repository, content, first).record
    with open(image_path(repository, parent), "r+b") as stream:
        for number in (15, 16):
            stream.seek(number * FRAME + 5000)
            stream.write(b"garbage")
    changed = replaced(content, 1, 15 * 16 + 4)
    repository = with_limit(repository, 100)
    with repository.writing() as intent, repository.begin(intent, parent) as staging:
        writer = staging.disk("disk", len(content))
        writer.write(0, changed[:FRAME])
        writer.write(15 * FRAME, changed[15 * FRAME : 16 * FRAME])
        writer.zero(16 * FRAME, 2 * FRAME)
        record = staging.commit(DRAFT)
    with closing(repository.open_disk(record, "disk")) as image:
        assert image.check(0, 18) == []
    assert read_all(repository, record) == changed


# ---- readers -----------------------------------------------------------------------------------


def test_only_an_unchecked_image_gives_its_descriptor(repository: Repository) -> None:
    record = back_up(repository, image_of(2)).record
    with closing(repository.open_disk(record, "disk")) as image:
        assert image.raw_fd() is None
    with closing(repository.open_disk(record, "disk", check=False)) as image:
        fd = image.raw_fd()
        assert fd is not None
        assert os.pread(fd, 10, 0) == frame(2)[:10]
        assert image.read(0, FRAME) == frame(2)
        assert image.try_read(0, FRAME) == frame(2)  # just read: in the page cache


def test_an_unchecked_image_hands_out_what_is_there(repository: Repository) -> None:
    record = back_up(repository, image_of(2, 4)).record
    with open(image_path(repository, record), "r+b") as stream:
        stream.write(b"!")
    with closing(repository.open_disk(record, "disk", check=False)) as image:
        assert image.read(0, 1) == b"!"
        assert image.check(0, 2) == [0]


def test_a_lost_block_is_an_error_not_zeros(repository: Repository) -> None:
    record = back_up(repository, image_of(0, 2, 4, 0)).record
    path = image_path(repository, record)
    fd = os.open(path, os.O_RDWR)
    Fs().punch(fd, 2 * FRAME, FRAME)
    os.close(fd)
    with closing(repository.open_disk(record, "disk")) as image:
        assert list(image.extents()) == [Extent(FRAME, 2 * FRAME)]
        with pytest.raises(Corrupt):
            image.read(2 * FRAME, 1)
        assert image.check(0, 4) == [2]
    with closing(repository.open_disk(record, "disk", check=False)) as image:
        assert list(image.extents()) == [Extent(FRAME, FRAME)]


def test_no_hole_is_believed_where_nothing_proves_it(repository: Repository) -> None:
    """Image and table lost the same frame: a restore would write zeros and call it whole."""
    content = image_of(2, 4, *[0] * 1022, 6, 0)
    record = back_up(repository, content).record
    path = image_path(repository, record)
    for file, at, length in ((path, FRAME, FRAME), (path.with_suffix(".sum"), 4096, 4096)):
        fd = os.open(file, os.O_RDWR)
        Fs().punch(fd, at, length)
        os.close(fd)
    with closing(repository.open_disk(record, "disk")) as image:
        assert list(image.extents()) == [Extent(0, 1025 * FRAME)]
        assert image.check(0, 1026) == list(range(1024))


def test_garbage_in_a_hole_is_damage(repository: Repository) -> None:
    record = back_up(repository, image_of(2, 0, 4)).record
    with open(image_path(repository, record), "r+b") as stream:
        stream.seek(FRAME + 5000)
        stream.write(b"garbage")
    with closing(repository.open_disk(record, "disk")) as image:
        assert image.check(0, 3) == [1]
        with pytest.raises(Corrupt):
            image.read(FRAME, FRAME)
    # A clone of it must not carry the garbage on: the frame is required.
    made = back_up(repository, image_of(2, 0, 6), record, image_of(2, 0, 4))
    assert covered(made.required["disk"]) == {1}
    assert read_all(repository, made.record) == image_of(2, 0, 6)
    assert repository.damage() == {}


def test_a_revision_removed_while_it_is_being_opened(repository: Repository) -> None:
    record = back_up(repository, image_of(2)).record
    place = repository.format._place  # type: ignore[attr-defined]
    disk = record.disks["disk"]
    fd = os.open(image_path(repository, record), os.O_RDONLY)
    repository.remove([record.id], force=True)
    with pytest.raises(NoRevision, match="removed meanwhile"):
        cow_files.become_reader(fd, place, record.id)
    os.close(fd)
    with pytest.raises(NoRevision, match="removed meanwhile"):
        CowImage.open(place, record.id, disk, check=True)


def test_a_reader_waits_out_a_removers_look(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    record = back_up(repository, image_of(2)).record
    fd = os.open(image_path(repository, record), os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    timer = threading.Timer(0.1, os.close, (fd,))
    timer.start()
    assert read_all(repository, record) == frame(2)
    timer.join()
    fd = os.open(image_path(repository, record), os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    monkeypatch.setattr("backyfs.store.lock._SHARE_WAIT_S", 0.05)
    with pytest.raises(Busy):
        repository.open_disk(record, "disk")
    os.close(fd)


# ---- no room -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_full_file_system(kind: str, small_fs: SmallFs, monkeypatch: pytest.MonkeyPatch) -> None:
    place = small_fs(kind, 300 * MIB)
    repository = Repository.create(place / "vm", "cow")
    content = noise(20 * MIB)
    first = back_up(repository, content, batch=32).record
    monkeypatch.setattr(space, "RESERVE_SHARE", 0.0)
    before = files(repository)
    huge = noise(8 * MIB) * 50  # does not fit
    with pytest.raises(NoSpace) as caught:
        back_up(repository, huge, first, batch=32)
    assert caught.value.exit_code == 14
    assert files(repository) == before
    assert read_all(repository, first) == content
    assert repository.fsck() == []
    deadline = time.monotonic() + 30
    while used(place) > 150 * MIB:  # the space comes back a little later
        assert time.monotonic() < deadline
        time.sleep(0.1)
    second = back_up(repository, replaced(content, 5, 6, 700), first).record
    assert read_all(repository, second) == replaced(content, 5, 6, 700)
    assert repository.fsck() == []


def test_the_reserve_is_looked_at_while_writing(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "SYNC_BYTES", 4 * FRAME)
    before = files(repository)

    def full(path: Path, need: int) -> None:
        raise NoSpace("nearly full")

    with repository.writing() as intent, repository.begin(intent, None) as staging:
        monkeypatch.setattr(space, "ensure", full)
        writer = staging.disk("disk", 20 * FRAME)
        with pytest.raises(NoSpace):
            for number in range(20):
                writer.write(number * FRAME, frame(2))
    assert files(repository) == before


# ---- gc, fsck, discard -------------------------------------------------------------------------


def test_gc_reports_and_forgets_what_is_gone(repository: Repository) -> None:
    first = back_up(repository, image_of(2, 4)).record
    second = back_up(repository, image_of(2, 6), first).record
    with open(image_path(repository, first), "r+b") as stream:
        stream.write(b"!")
    with closing(repository.open_disk(first, "disk")) as image:
        assert image.check(0, 2) == [0]
    report = repository.gc(dry_run=True)
    assert (report.files, report.removed_files, report.more) == (4, 0, False)
    assert report.stored_bytes >= 4 * FRAME
    repository.remove([first.id])
    assert len(repository.quarantine.bad()) == 1
    assert repository.gc().files == 2
    assert repository.quarantine.bad() == set()
    assert read_all(repository, second) == image_of(2, 6)


def test_fsck_names_what_is_wrong(repository: Repository) -> None:
    record = back_up(repository, image_of(2, 4)).record
    path = table_path(repository, record)
    whole = path.read_bytes()
    path.write_bytes(whole[:4100] + bytes([whole[4100] ^ 1]) + whole[4101:])
    assert repository.fsck() == [f"{record.id}/disk: the hashes of group 0 fail their checksum"]
    path.write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
    [problem] = repository.fsck()
    assert "head" in problem
    path.write_bytes(whole)
    assert repository.fsck() == []


def test_a_table_of_a_newer_version_is_unsupported_not_damaged(repository: Repository) -> None:
    record = back_up(repository, image_of(2, 4)).record
    path = table_path(repository, record)
    data = bytearray(path.read_bytes())
    header = Header.decode(bytes(data), SUM_MAGIC, "the table")
    data[:64] = header._replace(version=2).encode()
    path.write_bytes(data)
    with pytest.raises(Unsupported, match="version 2"):
        repository.open_disk(record, "disk")
    assert "version 2" in repository.damage()[record.id][0].reason


def test_compressed_images(btrfs_dir: Path) -> None:
    home = btrfs_dir / "compressed"
    home.mkdir()
    subprocess.run(["btrfs", "property", "set", home, "compression", "zstd"], check=True)
    repository = Repository.create(home / "vm", "cow")
    content = b"".join(bytes([n % 7 + 1]) * BLOCK for n in range(64 * 16))
    first = back_up(repository, content).record
    changed = replaced(content, 100, 500)
    second = back_up(repository, changed, first, content).record
    assert read_all(repository, second) == changed
    with (
        closing(repository.open_disk(first, "disk")) as old,
        closing(repository.open_disk(second, "disk")) as new,
    ):
        assert isinstance(old, CowImage)
        assert isinstance(new, CowImage)
        assert {100 // 16, 500 // 16} <= covered(new.unshared(old))
        assert covered(new.unshared(old)) < set(range(64))
        assert list(new.unshared(new)) == []
    assert repository.fsck() == []
