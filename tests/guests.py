"""Disks with a life of ten states for tests: real guest file systems, and a generated image.

A disk lies in one image file. Each of its `STATES` is reached by entering `state(number)`, in
order; while that is entered, nothing changes the file. Sizes grow, shrink, and are odd: no
multiple of a frame or of a sector. Every second state of a file system is taken while it is
mounted (and frozen, so that it stands still).
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from bench.mkimage import Change, Plan, change, create
from tests import images
from tests.filesystems import MIB, run, unmount
from tests.parts import require

STATES = 10


class Disk(ABC):
    """One image file of `size` bytes at first, and how it comes to each of its states."""

    def __init__(self, directory: Path, size: int) -> None:
        self.directory, self.size = directory, size
        self.image = directory / "guest.img"

    @abstractmethod
    def state(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Change the disk to its next state; while entered, it stands still."""


class Generated(Disk):
    """The image of the bench's generator: data of every kind, spread, with holes."""

    @contextlib.contextmanager
    def state(self, number: int) -> Iterator[None]:
        size = self.size
        match number:
            case 0:
                create(self.image, Plan(size, seed=11))
            case 1:
                change(self.image, Change(0.01, "random4k", seed=number))
            case 2:
                change(self.image, Change(0.01, "clustered", seed=number))
            case 3:
                images.resize(self.image, size + size // 8 + 12345)
                images.change_range(self.image, size + size // 16 - 5, 300_000, seed=number)
            case 4:
                images.change_range(self.image, size + size // 8 + 11000, 1345, seed=number)
                change(self.image, Change(0.02, "append", seed=number))
            case 5:
                images.resize(self.image, size - size // 16 - 777)
            case 6:  # what was cut off comes back as zeros
                images.resize(self.image, size + 1)
            case 7:
                images.zero_range(self.image, size // 4, size // 32 + 1)
                run("fallocate", "-p", "-o", size // 2, "-l", size // 32, self.image)
            case 8:
                change(self.image, Change(0.05, "random4k", seed=number))
            case 9:
                images.resize(self.image, size // 2 + 511)
        yield


class Guest(Disk):
    """A real file system, on a loop device; `slack` bytes of the image lie behind it."""

    kind: str
    mkfs: tuple[str, ...]

    def __init__(self, directory: Path, size: int) -> None:
        super().__init__(directory, size)
        require(self.kind)
        self.mountpoint = directory / "guest"
        self.mountpoint.mkdir()
        self.rng = random.Random(self.kind)

    @contextlib.contextmanager
    def state(self, number: int) -> Iterator[None]:
        if number == 0:
            images.sparse_image(self.image, self.size)
            run(*self.mkfs, self.image)
        self.before(number)
        with self.mounted():
            self.inside(number)
            if number % 2:
                with self.frozen():
                    yield
        if number % 2 == 0:
            yield

    @abstractmethod
    def before(self, number: int) -> None:
        """Change the image's size while it is not mounted."""

    def inside(self, number: int) -> None:
        """Write, change and remove files; about half of the disk is full at first."""
        if number == 0:
            for index in range(8):
                self.write(f"first-{index}", self.size // 16)
        elif number == 5:
            for index in range(4):
                (self.mountpoint / f"first-{index}").unlink()
        elif number != 7:  # that one has changes of metadata alone
            self.write(f"new-{number}", self.size // 64 + number)
            images.change_range(self.mountpoint / "first-7", 4096 * number, 8192, number)
        (self.mountpoint / f"directory-{number}").mkdir()

    def write(self, name: str, length: int) -> None:
        with open(self.mountpoint / name, "wb") as stream:
            while length > 0:
                data = images.text_like(self.rng, MIB // 2) + self.rng.randbytes(MIB // 2)
                stream.write(data[:length])
                length -= len(data)

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        run("mount", "-o", "loop,noatime", self.image, self.mountpoint)
        try:
            yield
        finally:
            unmount(self.mountpoint)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        run("fsfreeze", "--freeze", self.mountpoint)
        try:
            yield
        finally:
            run("fsfreeze", "--unfreeze", self.mountpoint)


class Ext4(Guest):
    kind = "ext4"
    mkfs = ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0")

    def before(self, number: int) -> None:
        match number:
            case 3:
                self.resize(self.size + self.size // 8, slack=513)
            case 6:
                self.resize(self.size * 3 // 4, slack=1)
            case 8:
                self.resize(self.size, slack=65537)

    def resize(self, size: int, slack: int) -> None:
        """Give the file system `size` bytes, and the image `slack` more."""
        run("e2fsck", "-f", "-y", self.image)
        if size > os.path.getsize(self.image):
            images.resize(self.image, size)
        run("resize2fs", self.image, f"{size // 1024}K")
        images.resize(self.image, size + slack)


class Xfs(Guest):
    """XFS only grows; what shrinks is the end of the image that it does not use."""

    kind = "xfs"
    mkfs = ("mkfs.xfs", "-q", "-f", "--unsupported")  # below 300 MiB

    def before(self, number: int) -> None:
        match number:
            case 2:
                images.resize(self.image, self.size + self.size // 4 + 513)
            case 4:
                images.change_range(self.image, self.size + self.size // 5, 100_000, number)
            case 6:
                images.resize(self.image, self.size + 1)
            case 8:
                images.resize(self.image, self.size + self.size // 8 + 511)

    def inside(self, number: int) -> None:
        if number == 9:
            run("xfs_growfs", self.mountpoint)
        super().inside(number)


DISKS: dict[str, type[Disk]] = {"generated": Generated, "ext4": Ext4, "xfs": Xfs}


@contextlib.contextmanager
def attached(file: Path) -> Iterator[Path]:
    """A loop device of `file` (whose size is a multiple of 512) while entered."""
    require("loop")
    done = subprocess.run(
        ["losetup", "--find", "--show", file], capture_output=True, text=True, check=True
    )
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        run("losetup", "--detach", device)
