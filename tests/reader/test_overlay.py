"""Overlays against a bytearray; their quota, full file systems, many threads, a killed process."""

from __future__ import annotations

import errno
import itertools
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from backyfs.errors import TargetError
from backyfs.model import Extent
from backyfs.reader.blocks import GROUP_BLOCKS, BlockSet
from backyfs.reader.images import Text
from backyfs.reader.overlay import BLOCK, Origin, Overlay, Scratch
from backyfs.store.fs import Fs
from tests.conftest import SmallFs
from tests.reader.stores import make_vm

MIB = 1 << 20
SIZE = 40 * BLOCK + 777
IMAGE = random.Random(1).randbytes(SIZE)


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    return Scratch(tmp_path)


def over(scratch: Scratch, data: bytes = IMAGE) -> Overlay:
    return scratch.overlay(Text(data))


def whole(view: Overlay) -> bytes:
    return bytes(view.read(0, view.size))


# ---- sets of blocks ------------------------------------------------------------------------------

_EDGE = st.one_of(
    st.integers(0, 100),
    st.integers(GROUP_BLOCKS - 50, GROUP_BLOCKS + 50),
    st.just(3 * GROUP_BLOCKS),
)


@given(st.lists(st.tuples(st.booleans(), _EDGE, _EDGE), max_size=6), _EDGE, _EDGE)
@settings(max_examples=150, deadline=None)
def test_a_block_set_is_a_set(changes: list[tuple[bool, int, int]], low: int, high: int) -> None:
    blocks, model = BlockSet(), set[int]()
    for add, first, stop in changes:
        if add:
            blocks.add(first, stop)
            model |= set(range(first, stop))
        else:
            blocks.remove(first, stop)
            model -= set(range(first, stop))
    runs = list(blocks.runs(low, high))
    assert [first for first, _, _ in runs[1:]] == [stop for _, stop, _ in runs[:-1]]
    assert all(one[2] != two[2] for one, two in itertools.pairwise(runs))
    assert sum(stop - first for first, stop, _ in runs) == max(0, high - low)
    inside = {block for first, stop, member in runs if member for block in range(first, stop)}
    assert inside == {block for block in model if low <= block < high}
    assert blocks.count(low, high) == len(inside)


# ---- an overlay is a disk ------------------------------------------------------------------------

_OFFSET = st.one_of(st.integers(0, SIZE), st.integers(0, 41).map(lambda n: min(n * BLOCK, SIZE)))


class OverlayIsADisk(RuleBasedStateMachine):
    """Any sequence of operations leaves what it would leave in a bytearray."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.scratch = Scratch(Path(self.directory.name))
        self.view = over(self.scratch)
        self.model = bytearray(IMAGE)

    @rule(offset=_OFFSET, end=_OFFSET, seed=st.integers(0, 1 << 16))
    def write(self, offset: int, end: int, seed: int) -> None:
        data = random.Random(seed).randbytes(max(0, end - offset))
        self.view.write(offset, data)
        self.model[offset : offset + len(data)] = data

    @rule(offset=_OFFSET, end=_OFFSET)
    def zero(self, offset: int, end: int) -> None:
        length = max(0, end - offset)
        self.view.zero(offset, length)
        self.model[offset : offset + length] = bytes(length)

    @rule(offset=_OFFSET, end=_OFFSET)
    def trim(self, offset: int, end: int) -> None:
        length = max(0, end - offset)
        self.view.trim(offset, length)
        stop = end if end == SIZE else end // BLOCK * BLOCK
        first = -(-offset // BLOCK) * BLOCK
        if first < stop:
            self.model[first:stop] = bytes(stop - first)

    @rule(offset=_OFFSET, end=_OFFSET)
    def read(self, offset: int, end: int) -> None:
        length = max(0, end - offset)
        expected = self.model[offset : offset + length]
        assert self.view.read(offset, length) == expected
        assert self.view.read_unless_reserved(offset, length) == expected
        assert self.view.try_read(offset, length) in (None, expected)

    @invariant()
    def everything_is_accounted_for(self) -> None:
        pieces = list(self.view.pieces(0, SIZE))
        kept = sum(
            -(-extent.length // BLOCK) for extent, origin in pieces if origin is Origin.OVERLAY
        )
        assert self.view.used_bytes == self.scratch.used_bytes == kept * BLOCK
        for extent, origin in pieces:
            data = self.model[extent.offset : extent.end]
            if origin is Origin.IMAGE:
                assert data == IMAGE[extent.offset : extent.end]
            if origin is Origin.ZERO:
                assert not any(data)

    def teardown(self) -> None:
        assert whole(self.view) == self.model
        self.view.close()
        assert self.scratch.used_bytes == 0
        self.scratch.close()
        assert os.listdir(self.directory.name) == []
        self.directory.cleanup()


TestOverlayIsADisk = OverlayIsADisk.TestCase
TestOverlayIsADisk.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_the_image_and_other_overlays_do_not_change(scratch: Scratch) -> None:
    image = Text(IMAGE)
    one, two = scratch.overlay(image), scratch.overlay(image)
    one.write(0, b"one" * 5000)
    two.zero(100, 20000)
    assert image.read(0, SIZE) == IMAGE
    assert whole(one) == (b"one" * 5000) + IMAGE[15000:]
    assert whole(two) == IMAGE[:100] + bytes(20000) + IMAGE[20100:]


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, SIZE + 1), (SIZE, 1), (5, -1)])
def test_outside(scratch: Scratch, offset: int, length: int) -> None:
    view = over(scratch)
    for operation in (view.read, view.try_read, view.zero, view.trim):
        with pytest.raises(ValueError, match="outside"):
            operation(offset, length)
    with pytest.raises(ValueError, match="outside"):
        view.write(SIZE - 1, b"xy")


def test_where_bytes_come_from(scratch: Scratch) -> None:
    view = over(scratch)
    view.write(BLOCK + 10, b"x")
    view.zero(3 * BLOCK, BLOCK)
    assert list(view.pieces(100, 5 * BLOCK - 100)) == [
        (Extent(100, BLOCK - 100), Origin.IMAGE),
        (Extent(BLOCK, BLOCK), Origin.OVERLAY),
        (Extent(2 * BLOCK, BLOCK), Origin.IMAGE),
        (Extent(3 * BLOCK, BLOCK), Origin.ZERO),
        (Extent(4 * BLOCK, BLOCK), Origin.IMAGE),
    ]


def test_a_huge_disk_costs_nothing_until_it_is_written(scratch: Scratch) -> None:
    class Huge(Text):
        size = 1 << 43

        def read(self, offset: int, length: int) -> bytes:
            return bytes(length)

    view = scratch.overlay(Huge(b""))
    view.write((1 << 42) + 1, b"far")
    assert view.read((1 << 42), 5) == b"\0far\0"
    assert view.used_bytes == BLOCK


def test_errors_of_the_image_pass_and_spoil_nothing(scratch: Scratch) -> None:
    class Bad(Text):
        def read(self, offset: int, length: int) -> bytes:
            if offset < 100 and length:
                raise OSError(errno.EIO, "bad")
            return super().read(offset, length)

    view = scratch.overlay(Bad(IMAGE))
    for operation in (lambda: view.read(0, 10), lambda: view.write(5, b"x")):
        with pytest.raises(OSError, match="bad"):
            operation()
    view.write(0, b"y" * BLOCK)
    assert view.read(0, BLOCK) == b"y" * BLOCK
    assert view.used_bytes == scratch.used_bytes == BLOCK


# ---- space ---------------------------------------------------------------------------------------


def test_the_quota_is_of_all_overlays_together(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, 4 * BLOCK)
    one, two = over(scratch), over(scratch)
    one.write(0, bytes(3 * BLOCK))
    with pytest.raises(OSError, match="may take") as caught:
        two.write(10, b"x" * BLOCK)  # touches two blocks
    assert caught.value.errno == errno.ENOSPC
    assert whole(two) == IMAGE, "nothing was written"
    two.write(10, b"x")
    one.write(0, b"again" * 100)  # its blocks are kept already
    two.zero(10 * BLOCK, 20 * BLOCK)  # costs nothing
    with pytest.raises(OSError, match="may take"):
        one.write(4 * BLOCK, b"x")
    one.zero(0, 2 * BLOCK)
    one.write(4 * BLOCK, b"x")
    one.close()
    one.close()
    assert scratch.used_bytes == BLOCK
    two.write(0, bytes(4 * BLOCK))


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_full_file_system(small_fs: SmallFs, kind: str) -> None:
    where = small_fs(kind, 16 * MIB)
    with open(where / "ballast", "wb") as ballast:
        free = os.statvfs(where).f_bavail * os.statvfs(where).f_bsize
        os.posix_fallocate(ballast.fileno(), 0, max(MIB, free - 8 * MIB))
    image = bytes(64 * MIB)
    scratch = Scratch(where)
    view = over(scratch, image)
    model = bytearray(image)
    with pytest.raises(OSError, match="No space") as caught:
        for offset in range(0, len(image), MIB):
            data = random.Random(offset).randbytes(MIB)
            view.write(offset, data)
            model[offset : offset + MIB] = data
    assert caught.value.errno == errno.ENOSPC
    assert any(model)
    assert whole(view) == model, "the write that failed changed nothing"
    assert view.used_bytes == scratch.used_bytes == offset
    view.zero(0, offset)
    view.write(0, b"x" * MIB)  # its blocks were given back
    view.flush()
    view.close()
    scratch.close()
    assert os.listdir(where) in (["ballast"], ["lost+found", "ballast"], ["ballast", "lost+found"])


def test_zeroing_gives_space_back(ext4_dir: Path) -> None:
    scratch = Scratch(ext4_dir)
    view = over(scratch, bytes(8 * MIB))
    view.write(0, b"x" * (8 * MIB))
    file = f"/proc/self/fd/{view._fd}"
    assert os.stat(file).st_blocks * 512 >= 8 * MIB
    view.zero(0, 8 * MIB)
    assert os.stat(file).st_blocks * 512 < MIB
    view.close()
    scratch.close()


def test_where_holes_cannot_be_punched(scratch: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no holes here")

    monkeypatch.setattr(Fs, "punch", refuse)
    view = over(scratch)
    view.write(0, b"x" * (3 * BLOCK))
    view.zero(0, SIZE)
    assert whole(view) == bytes(SIZE)
    assert view.used_bytes == 3 * BLOCK


# ---- many threads --------------------------------------------------------------------------------


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(number)` in threads; raise what any raised."""
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_writers_of_the_same_blocks_lose_nothing(scratch: Scratch) -> None:
    view = over(scratch)

    def write_every_eighth_byte(number: int) -> None:
        order = list(range(number, 6 * BLOCK, 8))
        random.Random(number).shuffle(order)
        for offset in order[:1500]:
            view.write(offset, bytes([number]))

    in_threads(8, write_every_eighth_byte)
    model = bytearray(IMAGE)
    for number in range(8):
        order = list(range(number, 6 * BLOCK, 8))
        random.Random(number).shuffle(order)
        for offset in order[:1500]:
            model[offset] = number
    assert whole(view) == model


def test_readers_see_only_what_was_there_at_some_time(scratch: Scratch) -> None:
    """While blocks change between image, written and zero, a read never gives anything else."""
    view = over(scratch, b"i" * SIZE)
    stop = threading.Event()

    def work(number: int) -> None:
        rng = random.Random(number)
        if number == 0:
            for _ in range(800):
                first = rng.randrange(38)
                length = rng.randrange(1, 3) * BLOCK
                if rng.random() < 0.5:
                    view.write(first * BLOCK, b"w" * length)
                else:
                    view.zero(first * BLOCK, length)
            stop.set()
            return
        while not stop.is_set():
            block = rng.randrange(40)
            data = bytes(view.read(block * BLOCK, BLOCK))
            assert not set(data) - set(b"iw\0")
            quick = view.try_read(block * BLOCK, BLOCK)
            assert quick is None or not set(quick) - set(b"iw\0")

    in_threads(4, work)


# ---- the directory -------------------------------------------------------------------------------


def test_directories_that_will_not_do(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    repository = make_vm(base, "vm", b"x")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(base / "vm" / "revisions")
    inside = base / "empty"
    inside.mkdir()
    for directory, why in [
        (tmp_path / "none", "No such file"),
        (tmp_path / "file", "Not a directory"),
        (repository.path, "inside the store"),
        (tmp_path / "link", "inside the store"),
        (inside, "inside the store"),
        (base, "inside the store"),
    ]:
        with pytest.raises(TargetError, match=why):
            Scratch(directory, base=base)
    Scratch(tmp_path, base=base).close()


def test_a_killed_process_leaves_nothing(tmp_path: Path, ext4_dir: Path) -> None:
    program = """if True:
        import os, signal, sys
        from pathlib import Path
        from backyfs.reader.images import Text
        from backyfs.reader.overlay import Scratch
        view = Scratch(Path(sys.argv[1])).overlay(Text(bytes(1 << 20)))
        view.write(0, b"x" * (1 << 20))
        print(os.listdir(sys.argv[1]), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    before = os.statvfs(ext4_dir).f_bfree
    done = subprocess.run(
        [sys.executable, "-c", program, ext4_dir], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (-9, "[]\n", "")
    assert os.listdir(ext4_dir) == []
    assert os.statvfs(ext4_dir).f_bfree * 4096 > before * 4096 - MIB


def test_what_is_mounted_over_the_directory_does_not_matter(tmp_path: Path) -> None:
    where = tmp_path / "scratch"
    where.mkdir()
    scratch = Scratch(where)
    where.rename(tmp_path / "moved")
    view = over(scratch)
    view.write(0, b"x")
    assert view.read(0, 1) == b"x"
    view.close()
    scratch.close()
