"""The suite's own tools: file systems come and go, images are the same every time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backyfs.model import FRAME
from tests import images
from tests.conftest import SmallFs
from tests.filesystems import MIB, MINIMUM, loops_below, mounted, mounts_below


def test_a_file_system_is_gone_after_its_test(tmp_path: Path) -> None:
    with mounted("ext4", tmp_path, 8 * MIB) as directory:
        assert mounts_below(tmp_path) == [directory]
        assert len(loops_below(tmp_path)) == 1
    assert not mounts_below(tmp_path)
    assert not loops_below(tmp_path)
    assert not list(tmp_path.iterdir())


def test_each_kind_of_file_system(any_fs_dir: Path) -> None:
    (any_fs_dir / "file").write_bytes(b"x")
    assert os.listdir(any_fs_dir) == ["file"]


@pytest.mark.parametrize("kind", sorted(MINIMUM))
def test_a_small_file_system_can_be_filled(small_fs: SmallFs, kind: str) -> None:
    directory = small_fs(kind, MINIMUM[kind])
    with open(directory / "fill", "wb") as stream, pytest.raises(OSError, match="No space left"):
        for _ in range(MINIMUM[kind] // MIB + 1):
            os.write(stream.fileno(), os.urandom(MIB))


def test_images_depend_on_nothing_but_their_seed(tmp_path: Path) -> None:
    size = 5 * FRAME * 7 + 513
    one = images.make_image(tmp_path / "one", size, seed=3)
    two = images.make_image(tmp_path / "two", size, seed=3)
    other = images.make_image(tmp_path / "other", size, seed=4)
    assert one.stat().st_size == size
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()
    assert images.change_blocks(one, 9, seed=1) == images.change_blocks(two, 9, seed=1)
    assert images.checksum(one) == images.checksum(two)
