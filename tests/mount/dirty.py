"""Disks of guests whose journal holds changes: their writer was killed, and nobody unmounted.

`Guest` is a disk with one file system, whole or in a partition. Its image lies on an XFS, so that
`state` can take a clone of it at one instant, while it is mounted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import trio

from backyfs.engine.backup import back_up
from backyfs.mount.loopdevice import attached
from backyfs.source.file import FileSource
from backyfs.store.record import Record
from backyfs.store.repository import Repository
from tests.filesystems import MIB, run, unmount
from tests.parts import require

SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB, "btrfs": 160 * MIB}
_MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-K"],
    "btrfs": ["mkfs.btrfs", "-q", "-f", "-K"],
}
_FIRST = 8  # files that are there before
_WRITER = """if True:
    import hashlib, os, random, sys
    directory, rng = sys.argv[1], random.Random(7)
    for number in range(1000000):
        data = rng.randbytes(rng.randrange(1, 60000))
        name = f"{directory}/new-{number % 40}-{number}"
        with open(name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        print(os.path.basename(name), hashlib.sha256(data).hexdigest(), flush=True)
"""

Files = Mapping[str, str]
"""SHA-256 of files, by name."""


def files_in(directory: Path) -> Files:
    """What is there, read from one end to the other."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.is_file()
    }


class Guest:
    """A file system of `kind` on a disk; with `parts`, in the second of three partitions."""

    def __init__(self, directory: Path, kind: str, *, parts: bool) -> None:
        require("xfs")
        require(kind)
        self.image, self.clone = directory / "guest.img", directory / "clone.img"
        self.point = directory / "guest"
        self.point.mkdir()
        self.size = SIZES[kind]
        self.start = 9 * MIB if parts else 0
        with open(self.image, "xb") as stream:
            stream.truncate(self.start + self.size + (9 * MIB if parts else 0))
        if parts:
            require("sfdisk")
            table = f"size=8MiB,name=boot\nsize={self.size // MIB}MiB,name=root\nsize=4MiB\n"
            command = ["sfdisk", "-q", "--label", "gpt", str(self.image)]
            subprocess.run(command, input=table, text=True, check=True)
        with self._device() as device:
            run(*_MKFS[kind], device)

    @contextlib.contextmanager
    def _device(self) -> Iterator[Path]:
        fd = os.open(self.image, os.O_RDWR)
        try:
            with attached(
                fd, name="guest", writable=True, offset=self.start, length=self.size
            ) as device:
                yield device
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def mounted(self) -> Iterator[Path]:
        """The guest, running."""
        with self._device() as device:
            run("mount", device, self.point)
        try:
            yield self.point
        finally:
            unmount(self.point)

    def fill(self) -> None:
        """Write the first files, and unmount."""
        with self.mounted():
            for number in range(_FIRST):
                (self.point / f"old-{number}").write_bytes(os.urandom(30000 + number))

    def crash(self) -> Files:
        """Kill a writer while it writes, and clone the disk; what must be on it."""
        with self.mounted():
            expected = dict(files_in(self.point))
            os.unlink(self.point / "old-0")
            _sync(self.point)
            del expected["old-0"]
            command = [sys.executable, "-c", _WRITER, str(self.point)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
                assert writer.stdout is not None
                for _ in range(25):
                    name, digest = writer.stdout.readline().split()
                    expected[name] = digest
                writer.send_signal(signal.SIGKILL)
                whole = (line.split() for line in writer.stdout if line.endswith("\n"))
                expected |= dict(whole)
            run("cp", "--reflink=always", self.image, self.clone)
        return expected


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


def back_up_image(repository: Repository, image: Path) -> Record:
    """One more revision: what is in an image file."""
    work = partial(back_up, repository, FileSource({"disk": str(image)}), verify=False)
    return trio.run(work)
