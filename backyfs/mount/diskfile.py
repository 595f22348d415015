"""The file of a disk in a mounted tree, opened for a loop device.

The tree is one that is mounted already, or a private one. A private one is detached as soon as its
file is open: its process serves on until the file is closed, and ends.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backyfs.errors import NoRevision
from backyfs.mount import daemon
from backyfs.mount.mountpoint import FSTYPE, Mount, mounts, serving, source_of, unmount
from backyfs.reader.tree.revision import IMAGE_SUFFIX, SCRATCH_SUFFIX
from backyfs.store.record import Record
from backyfs.store.repository import Repository

SCRATCH = Path("/var/tmp")
_PREFIX = "backyfs-loop-"
_LOGGING = daemon.Logging()


@dataclass(frozen=True, slots=True)
class Private:
    """How a private tree is made: where it keeps what is written, how many bytes at most (None: no
    bound), and where it logs to.
    """

    scratch: Path = SCRATCH
    scratch_bytes: int | None = None
    logging: daemon.Logging = _LOGGING


@contextlib.contextmanager
def opened(
    repository: Repository, record: Record, disk: str, *, writable: bool, private: Private
) -> Iterator[int]:
    """A descriptor of a disk's file, or of its scratch view. NoRevision, TargetError."""
    name = f"{disk}{SCRATCH_SUFFIX if writable else IMAGE_SUFFIX}"
    path = Path(repository.name, record.id, name)
    fd = _open_in_shared(repository, path, writable)
    if fd is None:
        fd = _open_in_private(repository, path, writable, private)
    try:
        yield fd
    finally:
        os.close(fd)


def _open(path: Path, writable: bool) -> int:
    return os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)


def _open_in_shared(repository: Repository, path: Path, writable: bool) -> int | None:
    """The file in a tree that is mounted; None if no tree has it."""
    directory = repository.path.resolve()
    sources = {source_of(directory), source_of(directory.parent)}
    for mount in mounts():
        if mount.source in sources and _may_serve(mount, writable):
            with contextlib.suppress(OSError):
                return _open(mount.point / path, writable)
    return None


def _may_serve(mount: Mount, writable: bool) -> bool:
    """Whether a tree is alive, offers what is needed, and is ours: others might show anything."""
    if mount.fstype != FSTYPE or mount.owner != os.geteuid():
        return False
    with serving(mount.device) as process:
        return process is not None and (mount.writable or not writable)


def _open_in_private(repository: Repository, path: Path, writable: bool, private: Private) -> int:
    """The file in a tree of our own."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name:
        point = Path(name)
        daemon.mount(
            repository.path,
            point,
            scratch=private.scratch if writable else None,
            scratch_bytes=private.scratch_bytes,
            while_pid=os.getpid(),
            logging=private.logging,
        )
        try:
            return _open(point / path, writable)
        except FileNotFoundError as exc:
            raise NoRevision(f"{path.parent} was just removed") from exc
        finally:
            unmount(point, lazy=True)
