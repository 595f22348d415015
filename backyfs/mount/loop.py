"""A guest's file system, mounted from a revision: a loop device over a file of the tree.

The device goes away by itself when the file system is unmounted, and a tree of our own when the
device lets go of its file. So nothing is written down anywhere; what `unloop` needs to know, the
kernel knows.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from backyfs.errors import TargetError
from backyfs.model import is_revision_id
from backyfs.mount.diskfile import Private, opened
from backyfs.mount.guest import (
    SAFE_OPTIONS,
    Place,
    Plan,
    Wishes,
    btrfs_uuid,
    journal_at,
    locate,
    plan,
)
from backyfs.mount.loopdevice import Backing, attached, backing
from backyfs.mount.mountpoint import (
    absolute,
    mounted_at,
    mounts,
    prepare,
    serving,
    unmount,
)
from backyfs.partition.disk import Read
from backyfs.reader.tree.revision import IMAGE_SUFFIX
from backyfs.store.record import Record
from backyfs.store.repository import Repository

_MARK = "backyfs:"
_COMMAND_S = 120.0
_END_S = 10.0
_NAMED = ("ext2", "ext3", "ext4", "xfs", "btrfs")
"""Kinds whose name is that of the kernel's file system; for others mount(8) finds it."""


@dataclass(frozen=True, slots=True)
class Loop:
    """What was mounted: `device` at `mountpoint`, a file system at `place` mounted as `plan` says.

    `options` are those given to mount(8).
    """

    device: Path
    mountpoint: Path
    place: Place
    plan: Plan
    options: str


# What mount(8) is told of a device that takes no writes is "can't read superblock".
_FULL = "; or there is no space for what the kernel writes (--scratch, here or of the mounted tree)"
_NO_WISHES = Wishes()
_PRIVATE = Private()


def loop(
    repository: Repository,
    record: Record,
    disk: str,
    mountpoint: Path,
    *,
    partition: int | None = None,
    wishes: Wishes = _NO_WISHES,
    options: str = SAFE_OPTIONS,
    private: Private = _PRIVATE,
) -> Loop:
    """Mount the file system on a disk of a revision (or in a partition of it) at `mountpoint`.

    `options` are given to mount(8), besides those that the plan needs; `private` is for a tree of
    our own. TargetError, NoRevision, Corrupt; nothing is left of what failed.
    """
    if os.geteuid() != 0:
        raise TargetError("mounting a guest's file system needs root", hint="run it with sudo")
    point = prepare(mountpoint, repository.path)
    place, chosen = _planned(repository, record, disk, partition, wishes)
    words = ",".join(filter(None, (*chosen.options, options)))
    mark = f"{_MARK}{repository.name}/{record.id}/{disk}"
    with (
        opened(repository, record, disk, writable=chosen.scratch, private=private) as fd,
        attached(
            fd, name=mark, writable=chosen.scratch, offset=place.start, length=place.length
        ) as device,
    ):
        hint = chosen.hint + _FULL if chosen.scratch else chosen.hint
        _mount(device, point, place.kind, words, hint)
        _verify_mounted(device, point)
        return Loop(device, point, place, chosen, words)


def unloop(mountpoint: Path, *, lazy: bool = False, wait_s: float = _END_S) -> None:
    """Unmount what `loop` mounted at `mountpoint`; returns when all of it is gone. TargetError.

    `lazy`: detach it even while it is in use; the rest goes when the last user ends.
    """
    point = absolute(mountpoint)
    found = mounted_at(point)
    if found is None:
        raise TargetError(f"nothing is mounted at {point}", hint="see: findmnt")
    device = Path(found.source)
    file = backing(device) if found.source.startswith("/dev/loop") else None
    if file is None or not _is_ours(file):
        raise TargetError(f"{point} was not mounted by backyfs loop", hint=f"see: findmnt {point}")
    with serving(file.device) as process:
        unmount(point, lazy=lazy, again=f"backyfs unloop --lazy {point}")
        if lazy:
            return
        deadline = time.monotonic() + wait_s
        _wait_until_free(device, file.name, deadline)
        private = all(mount.device != file.device for mount in mounts())
        if process is not None and private and not process.wait(deadline - time.monotonic()):
            raise TargetError(
                f"{point} is unmounted, but the process {process.pid} that served it still runs"
            )


def _is_ours(file: Backing) -> bool:
    """Whether `loop` attached a device's file; that of a dead tree is known by its path."""
    if file.device:
        return file.name.startswith(_MARK)
    path = Path(file.name)
    return path.suffix == IMAGE_SUFFIX and is_revision_id(path.parent.name)


def _wait_until_free(device: Path, name: str, deadline: float) -> None:
    """Wait until the kernel has let go of the device's file."""
    while (now := backing(device)) is not None and now.name == name:
        if time.monotonic() > deadline:
            raise TargetError(
                f"{device} is unmounted, but still in use", hint=f"see who: fuser -v {device}"
            )
        time.sleep(0.05)


# What to mount, and how


def _planned(
    repository: Repository, record: Record, disk: str, partition: int | None, wishes: Wishes
) -> tuple[Place, Plan]:
    """Where the file system lies and how to mount it, from what is stored of it."""
    entry = record.disks[disk]
    with contextlib.closing(repository.open_disk(record, disk)) as image:
        place = locate(image.read, image.size, entry.partitions, partition, f"{record.id}/{disk}")
        if place.kind == "btrfs":
            _refuse_second_btrfs(image.read, place)
        return place, plan(place, journal_at(image.read, place), wishes)


def _refuse_second_btrfs(read: Read, place: Place) -> None:
    """Older kernels show, for a second btrfs of the same id, the first one's files."""
    known = Path("/sys/fs/btrfs")
    uuid = btrfs_uuid(read, place)
    if (known / str(uuid)).exists() and not (known / "features/temp_fsid").exists():
        raise TargetError(
            f"a btrfs with the id {uuid} is mounted already, and this kernel mounts only one",
            hint="unmount the other revision first, or use Linux 6.7 or newer",
        )


# The mount


def _mount(device: Path, point: Path, kind: str, options: str, hint: str) -> None:
    named = ["-t", kind] if kind in _NAMED else []
    command = ["mount", *named, "-o", options, "--", str(device), str(point)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            timeout=_COMMAND_S,
        )
    except FileNotFoundError as exc:
        raise TargetError("mount is missing", hint="install the package mount") from exc
    except subprocess.TimeoutExpired as exc:
        raise TargetError(f"mounting {device} takes too long") from exc
    if done.returncode:
        said = (done.stderr.strip() or f"mount ended with {done.returncode}").splitlines()
        raise TargetError(
            f"the {kind} cannot be mounted: {said[0].removeprefix('mount: ')}",
            hint=hint,
        )


def _verify_mounted(device: Path, point: Path) -> None:
    """What is mounted must be what we attached."""
    found = mounted_at(point)
    if found is None or found.source != str(device):
        with contextlib.suppress(TargetError):
            unmount(point, lazy=True)
        raise TargetError(f"{device} was mounted, but {point} shows something else")
