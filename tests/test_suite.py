"""The suite's own tools: file systems come and go, images are the same every time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from backyfs.model import FRAME
from tests import images
from tests.conftest import SmallFs
from tests.filesystems import MIB, MINIMUM, loops_below, mounted, mounts_below
from tests.parts import require


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


# Popen() returns in the middle of exec: for an instant the process shows no environment.
LEAVES_A_PROCESS = """
import subprocess
from pathlib import Path

def test_it():
    sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True)
    while not Path(f"/proc/{sleeper.pid}/environ").read_bytes():
        pass
"""

LEAVES_A_MOUNT = """
from tests.filesystems import MIB, mounted

def test_it(tmp_path):
    global kept
    kept = mounted("ext4", tmp_path, 8 * MIB)
    kept.__enter__()
"""

LEAVES_NOTHING = """
def test_it():
    pass
"""


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize(
    ("module", "complaint"),
    [
        (LEAVES_A_PROCESS, "process still running"),
        (LEAVES_A_MOUNT, "still mounted"),
        (LEAVES_NOTHING, None),
    ],
    ids=["process", "mount", "nothing"],
)
def test_what_a_run_leaves_behind_fails_it(
    tmp_path: Path, module: str, complaint: str | None, workers: str
) -> None:
    require("ext4", "is left mounted")
    (tmp_path / "test_it.py").write_text(module)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "tests.conftest", "-n", workers),
            *("--rootdir", tmp_path, "--basetemp", tmp_path / "base", tmp_path / "test_it.py"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
    )
    for line in re.findall(r"process still running: (\d+) sleep", done.stdout):
        os.kill(int(line), signal.SIGKILL)
    summary = done.stdout.splitlines()[-1]
    if complaint is None:
        assert done.returncode == 0, done.stdout
        assert "error" not in summary
    else:
        assert done.returncode == 1, done.stdout + done.stderr
        assert complaint in done.stdout
        assert "1 passed, 1 error" in summary
    assert not mounts_below(tmp_path)
    assert not loops_below(tmp_path)
