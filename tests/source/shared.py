"""A file system like NFS, whose files another host writes: the kernel here does not hear of that.

    python -m tests.source.shared DIRECTORY MOUNTPOINT

Shows the files of a directory; nothing but reading them tells that they were changed in there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyfuse3
import trio

from tests.filesystems import unmount

PATIENCE_S = 30.0
READY = b"ready\n"


@contextlib.contextmanager
def seen_from_here(directory: Path, mountpoint: Path) -> Iterator[Path]:
    """The directory as a host sees it that does not write it."""
    mountpoint.mkdir()
    command = [sys.executable, "-m", "tests.source.shared", str(directory), str(mountpoint)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == READY
        try:
            yield mountpoint
        finally:
            unmount(mountpoint)
            process.wait(PATIENCE_S)
    mountpoint.rmdir()


class _Shared(pyfuse3.Operations):
    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._names = dict(enumerate(os.listdir(directory), 2))
        self._files = {
            number: os.open(directory / name, os.O_RDONLY) for number, name in self._names.items()
        }

    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755
        if inode != pyfuse3.ROOT_INODE:
            entry.st_mode = stat.S_IFREG | 0o644
            entry.st_size = os.fstat(self._files[inode]).st_size
        return entry

    async def lookup(self, parent: int, name: bytes, ctx: object = None) -> pyfuse3.EntryAttributes:
        for number, known in self._names.items():
            if os.fsencode(known) == name:
                return await self.getattr(number)
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def open(self, inode: int, flags: int, ctx: object = None) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode)

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        return os.pread(self._files[fh], size, offset)


def main(directory: str, mountpoint: str) -> None:
    """Serve until it is unmounted."""
    options = {*pyfuse3.default_options, "fsname=shared"}
    pyfuse3.init(_Shared(Path(directory)), mountpoint, options)
    os.write(1, READY)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
