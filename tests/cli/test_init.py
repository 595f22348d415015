"""`init` makes a repository, or leaves everything as it was."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import images
from tests.cli.conftest import Vm
from tests.cli.program import PROGRAM, backyfs, environment, refused


def test_a_path_that_is_no_text_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    image = images.make_image(tmp_path / "disk.img", 4096)
    odd = os.fsencode(tmp_path) + b"/\xff.img"
    os.rename(image, odd)
    done = subprocess.run(
        [PROGRAM, "-b", tmp_path / "srv" / "vm", "init", "file", odd],
        capture_output=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 2
    assert b"it is not UTF-8" in done.stderr
    assert b"symbolic link" in done.stderr
    assert not (tmp_path / "srv").exists()


def test_nobodys_config_is_replaced(vm: Vm, tmp_path: Path) -> None:
    directory = tmp_path / "git"
    directory.mkdir()
    config = directory / "config"
    config.write_text("[core]\n")
    assert str(config) in refused("-b", directory, "init", "file", vm.image, code=2)
    assert (config.read_text(), os.listdir(directory)) == ("[core]\n", ["config"])


def lose_identity(directory: Path) -> None:
    for name in ("repository.json", "config"):
        (directory / name).unlink()


def test_revisions_whose_repository_file_was_lost(vm: Vm) -> None:
    ids = vm.ids
    lose_identity(vm.directory)
    line = refused("-b", vm.directory, "init", "--store", "cow", "file", vm.image, code=2)
    assert "holds revisions of a store packs" in line
    backyfs("-b", vm.directory, "init", "file", vm.image)
    backyfs("-b", vm.directory, "backup", "daily")
    assert vm.ids[:-1] == ids
    backyfs("-b", vm.directory, "verify")


@pytest.mark.parametrize("store", ["auto", "cow"])
def test_such_revisions_of_a_cow_store(vm: Vm, xfs_dir: Path, store: str) -> None:
    directory = xfs_dir / f"web-{store}"
    backyfs("-b", directory, "init", "--store", "cow", "file", vm.image)
    backyfs("-b", directory, "backup", "daily")
    lose_identity(directory)
    assert "store cow" in backyfs("-b", directory, "init", "--store", store, "file", vm.image).out
    backyfs("-b", directory, "backup", "daily")
    backyfs("-b", directory, "verify")


def test_a_link_to_itself_is_no_place_for_a_repository(vm: Vm, tmp_path: Path) -> None:
    link = tmp_path / "web01"
    link.symlink_to("web01")
    assert "Too many levels" in refused("-b", link, "init", "file", vm.image, code=1)
    assert "Too many levels" in refused("-b", vm.directory, "copy", vm.directory, link, code=1)
    assert link.is_symlink()
