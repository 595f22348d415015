"""Writing only what differs: afterwards the target equals the image, and a second run is idle."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backyfs.errors import Corrupt, TargetError
from backyfs.extents import merged
from backyfs.model import FRAME, Extent
from backyfs.restore import regular
from backyfs.restore.delta import DeltaReport, candidates, update
from backyfs.restore.place import opened
from backyfs.restore.target import Rewritable
from tests.restore.memory import MemoryImage, images, made
from tests.restore.test_device import looped

MIB = 1 << 20
with_one_directory = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def brought(
    image: MemoryImage,
    where: str | Path,
    *,
    salvage: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> DeltaReport:
    """What a delta to `where` did."""
    with opened(str(where), image.size, store=Path("/nowhere"), keep=True) as target:
        assert isinstance(target, Rewritable)
        extents = candidates(image, target)
        return update(image, target, extents, salvage=salvage, advance=advance)


@st.composite
def mixed(draw: st.DrawFn) -> tuple[MemoryImage, bytes]:
    """An image and what a target holds: frames of the image, others, holes; of another size."""
    image = draw(images())
    size = draw(st.just(image.size) | st.integers(0, 6 * MIB))
    content = bytearray(image.content[:size].ljust(size, b"\0"))
    count = -(-size // FRAME)
    for number in draw(st.lists(st.integers(0, max(0, count - 1)), max_size=6)):
        at, length = number * FRAME, draw(st.sampled_from([1, 4096, FRAME, 5 * FRAME]))
        piece = random.Random(number).randbytes(length) if draw(st.booleans()) else bytes(length)
        content[at : at + length] = piece[: max(0, size - at)]
    return image, bytes(content[:size])


@with_one_directory
@given(case=mixed())
def test_a_file_becomes_the_image(case: tuple[MemoryImage, bytes], tmp_path: Path) -> None:
    image, before = case
    path = tmp_path / "disk.img"
    path.write_bytes(before)
    inode = path.stat().st_ino
    counts: list[int] = []
    report = brought(image, path, advance=counts.append)
    assert path.read_bytes() == image.content
    assert path.stat().st_ino == inode
    assert sum(counts) == report.compared
    again = brought(image, path)
    assert (again.written, again.zeroed) == (0, 0)


def test_only_what_differs_is_written(tmp_path: Path) -> None:
    image = made(200 * FRAME, range(20, 180))
    path = tmp_path / "disk.img"
    content = bytearray(image.content)
    content[100 * FRAME + 5] ^= 1  # behind the head
    content[10 * FRAME] = 1  # in the head, where zeros belong
    path.write_bytes(content)
    report = brought(image, path)
    head = 12 * FRAME  # its data comes back
    assert (report.written, report.zeroed) == (FRAME + head, 0)
    assert path.read_bytes() == image.content


def test_holes_stay_holes_and_cost_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 1 << 40)
    image = made(64 * MIB, [900])
    report = brought(image, path)
    assert report.compared == FRAME
    assert path.stat().st_blocks * 512 <= 2 * FRAME


def test_a_device_becomes_the_image(tmp_path: Path) -> None:
    file = tmp_path / "loop.img"
    image = made(5 * MIB + 512, [*range(3, 50), 80])
    garbage = random.Random(1).randbytes(8 * MIB)
    file.write_bytes(image.content[: 3 * MIB] + garbage[3 * MIB :])
    with looped(file) as name:
        report = brought(image, name)
        assert report.compared == image.size
        assert brought(image, name).written == 0
        with open(name, "rb", buffering=0) as stream:
            assert stream.read() == image.content + garbage[image.size :]


def test_an_interruption_leaves_no_head_and_a_second_run_does_the_rest(tmp_path: Path) -> None:
    image = made(64 * MIB, range(1024))
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB) + image.content[MIB : 50 * MIB] + bytes(14 * MIB))
    done = 0

    def interrupt(count: int) -> None:
        nonlocal done
        done += count
        if done >= 56 * MIB:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        brought(image, path, advance=interrupt)
    left = path.read_bytes()
    assert left[: regular.HEAD_BYTES] == bytes(regular.HEAD_BYTES)
    assert left[40 * MIB : 56 * MIB] == image.content[40 * MIB : 56 * MIB]
    report = brought(image, path)
    assert path.read_bytes() == image.content
    assert report.written <= regular.HEAD_BYTES + 8 * MIB


def test_the_head_is_taken_away_before_the_first_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = made(8 * MIB, range(128))
    path = tmp_path / "disk.img"
    path.write_bytes(image.content[: 6 * MIB] + bytes(2 * MIB))
    heads: list[bytes] = []
    write = regular.KeptFile.write

    def noting(self: regular.KeptFile, offset: int, data: memoryview) -> None:
        if offset >= regular.HEAD_BYTES:
            heads.append(path.read_bytes()[: regular.HEAD_BYTES])
        write(self, offset, data)

    monkeypatch.setattr(regular.KeptFile, "write", noting)
    brought(image, path)
    assert heads
    assert set(heads) == {bytes(regular.HEAD_BYTES)}
    assert path.read_bytes() == image.content


def test_a_target_that_is_cut_short_meanwhile_is_named(tmp_path: Path) -> None:
    image = made(8 * MIB, range(128))
    path = tmp_path / "disk.img"
    path.write_bytes(image.content)
    with opened(str(path), image.size, store=Path("/nowhere"), keep=True) as target:
        assert isinstance(target, Rewritable)
        extents = candidates(image, target)
        os.truncate(path, 5 * MIB)
        with pytest.raises(TargetError, match=f"cannot read {path}: somebody cut it short"):
            update(image, target, extents, salvage=False, advance=lambda count: None)


def test_damaged_frames_that_the_target_has_right_are_no_matter(tmp_path: Path) -> None:
    image = made(100 * FRAME, range(100), bad=[50, 60])
    path = tmp_path / "disk.img"
    path.write_bytes(image.content)
    assert brought(image, path).written == 0
    content = bytearray(image.content)
    content[60 * FRAME] ^= 1
    path.write_bytes(content)
    with pytest.raises(Corrupt):
        brought(image, path)
    report = brought(image, path, salvage=True)
    assert list(merged(report.bad)) == [Extent(60 * FRAME, FRAME)]
    content[60 * FRAME : 61 * FRAME] = bytes(FRAME)
    assert path.read_bytes() == bytes(content)


def test_the_head_comes_back_when_all_else_is_durable(tmp_path: Path) -> None:
    log: list[int | str] = []

    class Logged(regular.KeptFile):
        def write(self, offset: int, data: memoryview) -> None:
            log.append(offset)
            super().write(offset, data)

        def settle(self) -> None:
            super().settle()
            log.append("settled")

    image = made(6 * MIB, range(96))
    path = tmp_path / "disk.img"
    path.write_bytes(image.content[: 3 * MIB] + bytes(3 * MIB))
    target = Logged(path, image.size)
    update(image, target, candidates(image, target))
    away, back = (at for at, item in enumerate(log) if item == "settled")
    assert not log[:away]
    assert min(item for item in log[away:back] if isinstance(item, int)) >= 2 * MIB
    assert max(item for item in log[back:] if isinstance(item, int)) < 2 * MIB
    assert path.read_bytes() == image.content
