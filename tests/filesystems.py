"""Real file systems for tests: sparse image files on loop devices, mounted and always cleaned up.

A mount is made by `mounted`, a context manager; the fixtures in conftest.py are built on it. All
image files and mountpoints lie under the directory that the caller gives (pytest's own temporary
directory), which is how the leak check at the end of a run finds what was left.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from backyfs.store import space
from tests.parts import require

MIB = 1024 * 1024
GIB = 1024 * MIB

MINIMUM = {"ext4": 4 * MIB, "xfs": 300 * MIB, "btrfs": 110 * MIB}
"""Bytes of the smallest file system of each kind that its mkfs makes."""

_MKFS = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-m", "0", "-E", "nodiscard,lazy_itable_init=1"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-K", "-m", "reflink=1"],
    "btrfs": ["mkfs.btrfs", "-q", "-f", "-K"],
}


def run(*command: str | Path | int) -> None:
    """Run a program; a failure is an error that shows what it said."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stdout}{done.stderr}".strip())


@contextlib.contextmanager
def mounted(kind: str, directory: Path, size: int) -> Iterator[Path]:
    """A fresh file system of `kind` with `size` bytes, mounted below `directory` while entered."""
    require(kind)
    image, mountpoint = directory / f"{kind}.img", directory / kind
    mountpoint.mkdir()
    with open(image, "xb") as stream:
        stream.truncate(max(size, MINIMUM[kind]))
    try:
        run(*_MKFS[kind], image)
        # Discarding gives back to the image file's own file system what tests have removed.
        run("mount", "-o", "loop,noatime,discard", image, mountpoint)
        try:
            yield mountpoint
        finally:
            unmount(mountpoint)
    finally:
        image.unlink()
        mountpoint.rmdir()


@contextlib.contextmanager
def filled(directory: Path, leave: int) -> Iterator[None]:
    """A file takes all space but about `leave` bytes, while entered."""
    filler = directory / "filler"
    fd = os.open(filler, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    step = 8 * MIB
    try:
        while (much := space.free_bytes(directory) - leave) > 0 and step >= 4096:
            try:
                os.posix_fallocate(fd, os.fstat(fd).st_size, max(4096, min(much, step)))
                os.fsync(fd)
            except OSError:
                step //= 2
        yield
    finally:
        os.close(fd)
        filler.unlink()
        os.sync()


@contextlib.contextmanager
def read_only(mountpoint: Path) -> Iterator[None]:
    """The file system takes no writes, while entered."""
    run("mount", "-o", "remount,ro", mountpoint)
    try:
        yield
    finally:
        run("mount", "-o", "remount,rw", mountpoint)


def spoil_medium(medium: Path, block: bytes) -> int:
    """Flip a bit wherever the medium holds these bytes; how often it does."""
    found = 0
    with open(medium, "r+b") as stream, mmap.mmap(stream.fileno(), 0) as view:
        at = view.find(block)
        while at >= 0:
            view[at + 7] ^= 1
            found += 1
            at = view.find(block, at + 1)
    return found


def unmount(mountpoint: Path, patience_s: float = 5.0) -> None:
    """Unmount, waiting for a process that is about to end; then lazily, with an error."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return run("umount", mountpoint)
        except RuntimeError as exc:
            if time.monotonic() > deadline:
                run("umount", "-l", mountpoint)
                raise RuntimeError(f"{mountpoint} was still in use: {exc}") from exc
        time.sleep(0.1)


def mounts_below(directory: Path) -> list[Path]:
    """Mountpoints below `directory` (of any kind of file system), innermost first."""
    inside = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        path = Path(line.split(" ")[1].encode().decode("unicode_escape"))
        if path.is_relative_to(directory):
            inside.append(path)
    return sorted(inside, key=lambda path: len(path.parts), reverse=True)


def loops_below(directory: Path) -> list[str]:
    """Loop devices whose backing file is below `directory`, as "/dev/loop3 (file)"."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            backing = Path(entry.read_text().strip().removesuffix(" (deleted)"))
            if backing.is_relative_to(directory):
                found.append(f"/dev/{entry.parts[3]} ({backing})")
    return sorted(found)
