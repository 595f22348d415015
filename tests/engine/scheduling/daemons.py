"""Real schedulers as processes, with real VMs of small images, and a console to talk to."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from backyfs.store.repository import Repository
from tests.cli.program import PROGRAM, environment

FULL = os.environ.get("BACKYFS_REAL_RUN") == "full"
"""Whether the real run takes ten minutes instead of half a one."""

PATIENCE_S = 300.0 if FULL else 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(what: Callable[[], Any], explain: Callable[[], Any] = str) -> Any:
    """What is true at last."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = what()
        if found:
            return found
        assert time.monotonic() < deadline, explain()
        time.sleep(0.05)


class Site:
    """A base directory, images and a configuration below `directory`."""

    def __init__(self, directory: Path, base: Path | None = None) -> None:
        self.directory = directory
        self.base = base or directory / "srv"
        self.base.mkdir(exist_ok=True)
        self.config = directory / "backy.conf"
        self.log = directory / "backy.log"
        self.port = free_port()
        self.vms: dict[str, Path] = {}

    def add(self, name: str, size: int = 300_000) -> Path:
        """A VM with an image of random bytes."""
        image = self.directory / f"{name}.img"
        image.write_bytes(os.urandom(size))
        self.vms[name] = image
        return image

    def write(self, interval: str = "2s", more: str = "", **settings: object) -> None:
        """The configuration, with one schedule for all."""
        jobs = "".join(
            f"  {name}: {{source: {{type: file, filename: {image}}}, schedule: s}}\n"
            for name, image in self.vms.items()
        )
        keys = {
            "base-dir": self.base,
            "worker-limit": 3,
            "telnet-addrs": "127.0.0.1",
            "telnet-port": self.port,
            "status-interval": 1,
            "retry-first": "1s",
            "retry-longest": "2s",
            "stop-timeout": "20s",
        }
        keys |= {key.replace("_", "-"): value for key, value in settings.items()}
        lines = "".join(f"  {key}: {value}\n" for key, value in keys.items())
        rule = f"{{interval: {interval}, keep: 3}}"
        self.config.write_text(
            f"global:\n{lines}schedules: {{s: {{tick: {rule}}}}}\njobs:\n{jobs}{more}"
        )

    @contextlib.contextmanager
    def scheduler(self, **env: str) -> Iterator[subprocess.Popen[str]]:
        """A running scheduler; whatever way it ends, nothing of it is left."""
        process = subprocess.Popen(
            [PROGRAM, "-l", self.log, "scheduler", "-c", self.config],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**env),
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                raise
            self.wait_for_workers()

    def workers(self) -> list[int]:
        """Processes that are commands for VMs of this site."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    directory = os.fsencode(self.base) + b"/"
                    if b"-b" in words and any(word.startswith(directory) for word in words):
                        found.append(int(entry.name))
        return found

    def wait_for_workers(self) -> None:
        eventually(lambda: not self.workers())

    def kill_worker(self) -> bool:
        """End one of the running commands by SIGKILL; whether there was one."""
        for pid in self.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    def status(self) -> dict[str, Any]:
        """The daemon's status by job."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return {row["job"]: row for row in json.loads((self.base / "status").read_text())}
        return {}

    def count(self, name: str) -> int:
        """Revisions ever made of a VM: the highest number."""
        with contextlib.suppress(Exception):
            return max(record.seq for record in Repository.open(self.base / name).revisions())
        return 0

    def has_made(self, name: str, count: int) -> bool:
        return self.count(name) >= count

    def counts(self) -> dict[str, int]:
        return {name: self.count(name) for name in self.vms}

    def have_grown(self, before: dict[str, int], by: int = 2) -> bool:
        return all(self.count(name) >= before[name] + by for name in self.vms)
