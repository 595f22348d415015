"""A guest without a virtual machine: the real qemu-ga, and one ext4 that it can freeze.

The agent must never see a file system of this machine: it would freeze that. So it lives in a
chroot on a tmpfs which holds nothing but the agent, its libraries, /proc and the ext4; of what is
mounted it knows only what lies in there. That is checked before it gets to hear a word.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.filesystems import MIB, mounted, run, unmount
from tests.parts import require

SIZE = 64 * MIB
MOUNTPOINT = "/data"
"""Where the guest has its file system."""


@dataclass
class Guest:
    """A running agent and its guest's disk."""

    agent: Path
    """The socket, as a hypervisor would have it."""
    image: Path
    """The disk."""
    data: Path
    """The mounted file system of the guest."""
    root: Path
    process: subprocess.Popen[bytes]

    writers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """Those that wait for the file system to be thawed."""

    def is_frozen(self) -> bool:
        """Whether a write has to wait."""
        writer = subprocess.Popen(["touch", self.data / "probe"])
        try:
            writer.wait(0.5)
        except subprocess.TimeoutExpired:
            self.writers.append(writer)
            return True
        return False

    @property
    def hook_log(self) -> list[str]:
        """What the hook was called with so far."""
        return (self.root / "hook.log").read_text().split()


@contextlib.contextmanager
def running(directory: Path, *options: str) -> Iterator[Guest]:
    """A guest below `directory`; `options` are further ones of qemu-ga."""
    agent = require("qemu-ga")
    require("root")
    root = directory / "guest"
    root.mkdir()
    with contextlib.ExitStack() as stack:
        data = stack.enter_context(mounted("ext4", directory, SIZE))
        _mount(stack, root, "-t", "tmpfs", "-o", "size=64M", "tmpfs", root)
        _furnish(root, agent)
        _mount(stack, root / "proc", "-t", "proc", "proc", root / "proc")
        _mount(stack, root / "data", "--bind", data, root / "data")
        command = ["chroot", str(root), "/qemu-ga", "-m", "unix-listen", "-p", "/agent.sock"]
        process = subprocess.Popen(
            [*command, "-t", "/", "-f", "/qga.pid", "-F/hook", *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        found = Guest(root / "agent.sock", directory / "ext4.img", data, root, process)
        stack.callback(_end, found)
        _wait_for(found.agent, process)
        _nothing_else_mounted(process.pid)
        yield found


def _mount(stack: contextlib.ExitStack, where: Path, *arguments: str | Path) -> None:
    run("mount", *arguments)
    stack.callback(unmount, where)


def _furnish(root: Path, agent: str) -> None:
    """Put the agent, a static shell and the hook into the guest's root."""
    for name in ("proc", "data", "bin"):
        (root / name).mkdir()
    shutil.copy(agent, root / "qemu-ga")
    shutil.copy(require("busybox"), root / "bin" / "sh")
    listed = subprocess.run(["ldd", agent], capture_output=True, text=True, check=True).stdout
    for library in re.findall(r"(/\S+) \(0x", listed):
        target = root / library.removeprefix("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    (root / "hook.log").touch()
    hook = root / "hook"
    hook.write_text('#!/bin/sh\necho "$1" >> /hook.log\n')
    hook.chmod(0o755)


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert process.poll() is None, "qemu-ga ended"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _nothing_else_mounted(pid: int) -> None:
    """Nothing with a disk behind it but the guest's own is mounted where the agent looks."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    places = {line.split()[4]: line.split()[2] for line in lines}
    assert set(places) == {"/", "/proc", MOUNTPOINT}, lines
    with_disk = {place for place, device in places.items() if not device.startswith("0:")}
    assert with_disk == {MOUNTPOINT}, lines
    machine = os.stat("/").st_dev
    assert places[MOUNTPOINT] != f"{os.major(machine)}:{os.minor(machine)}"


def _end(guest: Guest) -> None:
    guest.process.send_signal(signal.SIGKILL)
    guest.process.wait()
    # Whatever a test did wrong: without this nobody could unmount it. Not frozen: an error.
    subprocess.run(["fsfreeze", "-u", guest.data], capture_output=True, check=False)
    for writer in guest.writers:
        writer.wait()
