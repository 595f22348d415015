"""A file system of the store that does not answer: what lies elsewhere is shown, and all ends.

It is the mount of another store here, whose process is stopped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backyfs.reader.catalog import REFRESH_S
from tests.mount.mounts import PATIENCE_S, Mounted, eventually, mounted
from tests.reader.stores import content, make_vm

DATA = content(20, seed=1)


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Mounted]:
    """A mount whose process can be stopped."""
    other = tmp_path / "other"
    other.mkdir()
    make_vm(other, "vm", DATA)
    with mounted(other, tmp_path / "far") as tree:
        try:
            yield tree
        finally:
            os.kill(tree.pid, signal.SIGCONT)


def succeeds(*command: str | Path) -> bool:
    """Whether a program gets at what it wants; it is killed if not."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, timeout=5).returncode == 0
    return False


def test_the_others_are_shown_and_the_mount_ends(tmp_path: Path, far: Mounted) -> None:
    base = tmp_path / "base"
    base.mkdir()
    make_vm(base, "near", DATA)
    away = [f"away{n}" for n in range(6)]
    for name in away:
        (base / name).symlink_to(far.path / "vm")
    with mounted(base, tmp_path / "mnt") as tree:
        assert os.listdir(tree.path) == ["near"]
        os.kill(far.pid, signal.SIGSTOP)
        time.sleep(2 * REFRESH_S)  # what was listed is no longer believed
        paths = [str(tree.path), *(str(tree.path / name) for name in away)]
        waiting = [
            subprocess.Popen(["ls", path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for path in paths
        ]
        try:
            image = tree.path / "near" / "latest" / "disk.img"
            assert eventually(
                lambda: succeeds("cmp", "-n", "1000000", image, image), PATIENCE_S / 2
            )
            assert eventually(lambda: succeeds("ls", "-l", tree.path / "near"))
            os.kill(tree.pid, signal.SIGTERM)
            assert eventually(lambda: not tree.alive(), PATIENCE_S / 2)
        finally:
            os.kill(far.pid, signal.SIGCONT)
            for each in waiting:
                each.kill()
                each.wait(PATIENCE_S)
