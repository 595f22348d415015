"""Real mounts for tests: made in the background, watched over, always taken away.

A read below a mountpoint blocks for good if the process that serves it hangs. A watchdog kills
that process after `patience_s`, which makes every such read fail instead.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backyfs.mount import daemon
from backyfs.mount.mountpoint import mounted_at, serving
from tests.parts import require

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Mounted:
    """A mount in use: where it is, and the process that serves it."""

    path: Path
    pid: int

    def status(self, field: str) -> int:
        """A number from /proc/PID/status, such as VmRSS (KiB)."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in text.splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1])

    def descriptors(self) -> list[str]:
        """What the process has open, as paths."""
        found = []
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(os.readlink(entry))
        return found

    def alive(self) -> bool:
        return is_alive(self.pid)


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def server_of(mountpoint: Path) -> int:
    """The pid of the process that serves a mountpoint; 0 without one."""
    mount = mounted_at(mountpoint)
    if mount is None:
        return 0
    with serving(mount.device) as process:
        return process.pid if process is not None else 0


@contextlib.contextmanager
def watched(mountpoint: Path, patience_s: float = PATIENCE_S) -> Iterator[int]:
    """Watch over the mount at `mountpoint` and take it away at the end, whatever it takes."""
    pid = server_of(mountpoint)
    assert pid
    watchdog = threading.Timer(patience_s, os.kill, (pid, signal.SIGKILL))
    watchdog.start()
    try:
        yield pid
    finally:
        if mounted_at(mountpoint) is not None:
            subprocess.run(["umount", "-l", mountpoint], capture_output=True, timeout=20)
        gone = eventually(lambda: not is_alive(pid), 15)
        watchdog.cancel()
        if not gone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert gone, "the process outlived its mount"


@contextlib.contextmanager
def mounted(base: Path, mountpoint: Path, **options: Any) -> Iterator[Mounted]:
    """The tree of `base` at `mountpoint` (made if need be) while entered."""
    require("fuse")
    mountpoint.mkdir(exist_ok=True)
    daemon.mount(base, mountpoint, **options)
    with watched(mountpoint) as pid:
        yield Mounted(mountpoint, pid)


def eventually(look: Callable[[], bool], patience_s: float = 60.0) -> bool:
    """Whether `look` becomes true in time."""
    deadline = time.monotonic() + patience_s
    while not look():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def helper_of(point: Path) -> int:
    """The pid of the fusermount3 that waits to tidy up after the process of a mount; 0 = none."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if words[0].endswith(b"fusermount3") and os.fsencode(point) in words:
                    return int(entry.name)
    return 0


def kill_with_helper(pid: int, point: Path) -> None:
    """Kill the process and, first, the fusermount3 that would tidy up after it."""
    helper = helper_of(point)
    assert helper
    os.kill(helper, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: not is_alive(pid))
