"""A plug-in as its author sees it: installed, held to the contract from outside, backed up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import images
from tests.cli.program import backyfs, refused

PLUGIN = Path(__file__).parent.parent / "plugin"
MIB = 1 << 20


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built and installed as any distribution, into a directory of its own."""
    source = tmp_path_factory.mktemp("plugin") / "source"
    shutil.copytree(PLUGIN, source)
    target = source.with_name("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([*command, str(source)], check=True, stdin=subprocess.DEVNULL)
    return target


def test_the_suite_from_outside(installed: Path, tmp_path: Path) -> None:
    shutil.copy(PLUGIN / "test_split_image.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "test_split_image.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " passed, 1 skipped" in done.stdout


def test_the_suite_finds_faults(installed: Path, tmp_path: Path) -> None:
    """A source that guesses instead of knowing, and one that reads too little."""
    shutil.copy(PLUGIN / "test_split_image.py", tmp_path)
    plugin = (PLUGIN / "backyfs_split_image.py").read_text()
    guessing = plugin.replace("        return None\n", "        return Changes([])\n")
    for text in (guessing, plugin.replace("length, offset)", "length - 1, offset)")):
        assert text != plugin
        (tmp_path / "backyfs_split_image.py").write_text(text)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "test_split_image.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1, done.stdout


def test_backup_and_restore(installed: Path, tmp_path: Path) -> None:
    path = str(installed)
    whole = images.make_image(tmp_path / "whole", 3 * MIB + 5)
    data = whole.read_bytes()
    for number in range(4):
        (tmp_path / f"web01.img.{number:03}").write_bytes(data[number * MIB : (number + 1) * MIB])
    vm = tmp_path / "srv" / "web01"
    backyfs("-b", vm, "init", "split-image", tmp_path / "web01.img", PYTHONPATH=path)
    backyfs("-b", vm, "backup", "daily", PYTHONPATH=path)
    backyfs("-b", vm, "restore", tmp_path / "restored")  # needs no plug-in
    assert (tmp_path / "restored").read_bytes() == data
    (tmp_path / "web01.img.001").unlink()
    refused("-b", vm, "backup", code=13, PYTHONPATH=path)
    assert "unknown source type" in refused("-b", vm, "backup", code=2)
