"""Power cuts: what a disk may hold when the machine stops between two file operations.

The model is the weakest a file system may be: bytes are certain only after fsync of their file,
names only after fsync of their directory; of everything else any part may have happened.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

from backyfs.store.fs import Fs

Names = dict[str, int]
"""Of one directory: the inode behind each name."""


class PowerCuts(Fs):
    """Works as usual, and before each operation keeps what might be on the disk just then."""

    def __init__(self, path: Path, cuts: Path, seed: int = 0) -> None:
        self.cuts: list[Path] = []
        self._path, self._where = path, cuts
        self._rng = random.Random(seed)
        self._directories = [path, *(p for p in path.iterdir() if p.is_dir())]
        self._names = {directory: _names(directory) for directory in self._directories}
        self._bytes: dict[int, bytes] = {}
        self._held: list[int] = []  # open files keep their inode numbers to themselves
        for directory, names in self._names.items():
            for name, inode in names.items():
                self._bytes[inode] = (directory / name).read_bytes()
                self._held.append(os.open(directory / name, os.O_RDONLY))

    def close(self) -> None:
        """Give back descriptors."""
        for fd in self._held:
            os.close(fd)
        self._held.clear()

    def call(self, name: str) -> None:
        """Before each operation."""
        self.cut()

    # What makes bytes and names durable

    def create(self, path: Path, mode: int = 0o640) -> int:
        fd = super().create(path, mode)
        self._held.append(os.dup(fd))
        return fd

    def fsync(self, fd: int, path: object = "the store") -> None:
        super().fsync(fd, path)
        self._keep(fd)

    def fdatasync(self, fd: int, path: object = "the store") -> None:
        super().fdatasync(fd, path)
        self._keep(fd)

    def _keep(self, fd: int) -> None:
        status = os.fstat(fd)
        self._bytes[status.st_ino] = os.pread(fd, status.st_size, 0)

    def sync_dir(self, path: Path) -> None:
        super().sync_dir(path)
        self._names[path] = _names(path)

    # The cuts

    def cut(self) -> None:
        """Keep three states of the disk: least, most names without their bytes, and a mixture."""
        for share in (0.0, 1.0, 0.5):
            where = self._where / f"cut-{len(self.cuts)}"
            self.cuts.append(where)
            for directory in self._directories:
                self._keep_directory(directory, where / directory.relative_to(self._path), share)

    def _keep_directory(self, directory: Path, where: Path, share: float) -> None:
        where.mkdir()
        certain, now = self._names[directory], _names(directory)
        for name in sorted(certain.keys() | now.keys()):
            inode = now.get(name) if self._rng.random() < share else certain.get(name)
            if inode is not None:
                (where / name).write_bytes(self._content(directory / name, inode, share))

    def _content(self, path: Path, inode: int, share: float) -> bytes:
        certain = self._bytes.get(inode, b"")
        if share in (0.0, 1.0) or not path.exists() or path.stat().st_ino != inode:
            return certain
        now = path.read_bytes()
        if inode in self._bytes:
            return self._rng.choice((certain, now))
        return now[: self._rng.randint(0, len(now))]


def _names(directory: Path) -> Names:
    with os.scandir(directory) as entries:
        return {entry.name: entry.inode() for entry in entries if entry.is_file()}
