"""Restoring gives every target exactly the image's bytes, or says why not."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backyfs.errors import Corrupt
from backyfs.model import FRAME, Extent
from backyfs.restore.place import opened
from backyfs.restore.reading import BATCH, batches, in_order
from backyfs.restore.regular import ExistingFile
from backyfs.restore.stream import Stream
from backyfs.restore.transfer import Report, damaged, restore
from tests.restore.memory import MemoryImage, images, made

MIB = 1 << 20
with_one_directory = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@contextmanager
def collecting() -> Iterator[tuple[Stream, Callable[[], bytes]]]:
    """A stream into a pipe, and a function that closes it and returns what came through."""
    read_end, write_end = os.pipe()
    collected: list[bytes] = []

    def drain() -> None:
        with open(read_end, "rb") as stream:
            collected.append(stream.read())

    thread = threading.Thread(target=drain)
    thread.start()
    stream = Stream(write_end, "pipe")

    def result() -> bytes:
        stream.abandon()
        thread.join()
        return collected[0]

    try:
        yield stream, result
    finally:
        stream.abandon()
        thread.join()


def to_stream(image: MemoryImage, *, salvage: bool = False) -> tuple[Report, bytes]:
    with collecting() as (stream, result):
        return restore(image, stream, salvage=salvage), result()


def to_file(image: MemoryImage, path: Path, *, salvage: bool = False) -> tuple[Report, bytes]:
    with opened(str(path), image.size, store=Path("/nowhere")) as target:
        report = restore(image, target, salvage=salvage)
    return report, path.read_bytes()


@with_one_directory
@given(image=images())
def test_a_stream_gets_every_byte(image: MemoryImage) -> None:
    report, found = to_stream(image)
    assert found == image.content
    assert report == Report(image.size, sum(e.length for e in image.filled), ())


@with_one_directory
@given(image=images())
def test_a_new_file_gets_every_byte_and_nothing_stays_beside_it(
    image: MemoryImage, tmp_path: Path
) -> None:
    path = tmp_path / "disk.img"
    path.unlink(missing_ok=True)
    assert to_file(image, path)[1] == image.content
    assert list(tmp_path.iterdir()) == [path]


@with_one_directory
@given(image=images(), old=st.integers(0, 6 * MIB))
def test_an_existing_file_is_overwritten_and_cut(
    image: MemoryImage, old: int, tmp_path: Path
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(old))
    path.chmod(0o640)
    inode = path.stat().st_ino
    assert to_file(image, path)[1] == image.content
    assert path.stat().st_ino == inode
    assert path.stat().st_mode & 0o777 == 0o640


@with_one_directory
@given(image=images(damaged=True))
def test_salvage_zero_fills_what_is_damaged_and_lists_it(
    image: MemoryImage, tmp_path: Path
) -> None:
    path = tmp_path / "disk.img"
    path.unlink(missing_ok=True)
    frames = sorted(image.bad)
    for report, found in (to_stream(image, salvage=True), to_file(image, path, salvage=True)):
        assert found == image.salvaged()
        listed = {n for e in report.bad for n in range(e.offset // FRAME, -(-e.end // FRAME))}
        assert sorted(listed) == frames
    assert sum(e.length for e in damaged(image)) == sum(
        min(FRAME, image.size - number * FRAME) for number in frames
    )


@pytest.mark.parametrize("bad", [0, 31, 32, 79])
def test_damage_without_salvage_ends_the_restore(bad: int, tmp_path: Path) -> None:
    image = made(5 * MIB, range(80), [bad])
    path = tmp_path / "disk.img"
    with pytest.raises(Corrupt):
        to_file(image, path)
    assert list(tmp_path.iterdir()) == []
    with collecting() as (stream, result):
        with pytest.raises(Corrupt):
            restore(image, stream)
        assert result() == image.content[: bad * FRAME // BATCH * BATCH]


def test_a_failed_restore_leaves_an_existing_file_empty(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"old" * 1000)
    with pytest.raises(Corrupt):
        to_file(made(5 * MIB, range(80), [70]), path)
    assert path.read_bytes() == b""


def test_what_is_overwritten_gets_its_head_last(tmp_path: Path) -> None:
    image = made(10 * MIB, range(160))
    path = tmp_path / "disk.img"
    path.write_bytes(b"old")
    seen = []

    class Watching(MemoryImage):
        def read(self, offset: int, length: int) -> bytes:
            seen.append(offset)
            if offset == 0:
                assert path.read_bytes()[: 2 * MIB] == bytes(2 * MIB)
                assert path.read_bytes()[2 * MIB :] == self.content[2 * MIB :]
            return super().read(offset, length)

    assert to_file(Watching(image.content, image.filled), path)[1] == image.content
    assert seen[-1] == 0


def test_holes_stay_holes(ext4_dir: Path) -> None:
    image = made(64 * MIB, [0, 1, 900])
    for path in (ext4_dir / "new", ext4_dir / "existing"):
        if path.name == "existing":
            path.write_bytes(random.Random(2).randbytes(3 * MIB))
        to_file(image, path)
        assert path.stat().st_size == 64 * MIB
        assert path.stat().st_blocks * 512 <= 4 * FRAME


def test_a_new_file_is_not_readable_by_others(tmp_path: Path) -> None:
    to_file(made(FRAME, [0]), tmp_path / "disk.img")
    assert (tmp_path / "disk.img").stat().st_mode & 0o777 == 0o600


def test_progress_counts_data(tmp_path: Path) -> None:
    image = made(9 * MIB, range(10, 110))
    counts: list[int] = []
    with opened(str(tmp_path / "x"), image.size, store=Path("/nowhere")) as target:
        restore(image, target, advance=counts.append)
    assert sum(counts) == 100 * FRAME


def test_an_interrupted_restore_joins_its_threads(tmp_path: Path) -> None:
    image = made(20 * MIB, range(320))
    before = threading.active_count()

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        opened(str(tmp_path / "x"), image.size, store=Path("/nowhere")) as target,
    ):
        restore(image, target, advance=interrupt)
    assert threading.active_count() == before
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 99)), max_size=20))
def test_batches_cover_the_extents_within_windows(spans: list[tuple[int, int]]) -> None:
    extents, position = [], 0
    for gap, length in spans:
        extents.append(Extent(position + gap * FRAME, length * FRAME + 1))
        position = extents[-1].end
    made_batches = list(batches(extents))
    covered = {n for batch in made_batches for e in batch for n in (e.offset, e.end - 1)}
    assert {n for e in extents for n in (e.offset, e.end - 1)} <= covered
    assert sum(e.length for b in made_batches for e in b) == sum(e.length for e in extents)
    for batch in made_batches:
        assert len({e.offset // BATCH for e in batch} | {(e.end - 1) // BATCH for e in batch}) == 1


class Stop(BaseException):
    """What a signal raises."""


def stop(*_: object) -> None:
    raise Stop


def test_a_signal_while_a_thread_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the work, and the thread is waited for."""
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        started.append(thread)
        start(thread)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", interrupted)
            with pytest.raises(Stop), closing(in_order(time.sleep, [0.3] * 5)) as results:
                list(results)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert started
    assert not any(thread.is_alive() for thread in started)


def test_the_head_goes_in_when_all_else_is_durable(tmp_path: Path) -> None:
    """What was restored in part shows no partitions, whatever a power cut leaves of it."""
    log: list[int | str] = []

    class Logged(ExistingFile):
        def write(self, offset: int, data: memoryview) -> None:
            log.append(offset)
            super().write(offset, data)

        def settle(self) -> None:
            super().settle()
            log.append("settled")

    image = made(6 * MIB, range(96))
    path = tmp_path / "disk.img"
    path.write_bytes(b"old")
    restore(image, Logged(path, image.size))
    middle = log.index("settled")
    assert {at for at in log[:middle] if isinstance(at, int)} == {2 * MIB, 4 * MIB}
    assert log[middle + 1 :] == [0]
    assert path.read_bytes() == image.content
