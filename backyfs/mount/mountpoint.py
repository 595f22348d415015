"""Mountpoints: what is mounted where, whether a directory may become one, and its repair.

Looks at /proc/self/mountinfo, never through a mounted tree: a dead or busy mount must not stop us.
A living mount is known by its beacon: a listening socket in the abstract namespace, named after
the device number the kernel gave the mount. It vanishes with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backyfs.errors import TargetError

FSTYPE = "fuse.backyfs"
_SOURCE = "backyfs:"
_COMMAND_S = 30.0
_ACCEPTED_S = 1


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo: a file system and where it is mounted.

    `device` is "major:minor", `source` what was mounted: a block device, or what `source_of` makes;
    `owner` the user who made a FUSE mount, as the kernel says (-1: it does not say).
    """

    point: Path
    fstype: str
    device: str
    source: str
    writable: bool
    owner: int


def source_of(base: Path) -> str:
    """What the list of mounts shows as the source of a mount of `base`."""
    return f"{_SOURCE}{base}"


def mounts() -> list[Mount]:
    """All mounts of this mount namespace, oldest first."""
    with open("/proc/self/mountinfo", "rb") as lines:
        return [_parsed(line) for line in lines]


def _parsed(line: bytes) -> Mount:
    fields = line.split()
    fstype, source, options = fields[fields.index(b"-") + 1 :][:3]
    owner = re.search(rb"(?:^|,)user_id=(\d+)", options)
    return Mount(
        Path(_unescaped(fields[4])),
        fstype.decode(),
        fields[2].decode(),
        _unescaped(source),
        writable=b"rw" in fields[5].split(b","),
        owner=int(owner[1]) if owner else -1,
    )


def _unescaped(field: bytes) -> str:
    r"""Mountinfo writes blanks, tabs, line ends and backslashes as \ooo."""
    parts = field.split(b"\\")
    rest = (bytes([int(part[:3], 8)]) + part[3:] for part in parts[1:])
    return os.fsdecode(parts[0] + b"".join(rest))


def mounted_at(point: Path) -> Mount | None:
    """What is mounted at `point` (the topmost, if several are)."""
    return next((mount for mount in reversed(mounts()) if mount.point == point), None)


def absolute(path: Path) -> Path:
    """`path` with all symbolic links resolved but without touching what may be mounted on it."""
    full = Path(os.path.abspath(path))
    if mounted_at(full) is not None:
        return full
    parent = Path(os.path.realpath(full.parent)) / full.name
    if mounted_at(parent) is not None or not parent.is_symlink():
        return parent
    return absolute(parent.parent / os.readlink(parent))


# Beacons


def _beacon_name(device: str) -> str:
    return f"\0backyfs/mount/{device}"


def beacon(device: str) -> socket.socket:
    """A listening socket that says: the process of the mount with this device number lives.

    Whoever connects knows all it wants by then; connections are to be accepted and closed.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(OSError):  # taken in another mount namespace: then do without
        listener.bind(_beacon_name(device))
        listener.listen(64)
    return listener


@dataclass(frozen=True, slots=True)
class Process:
    """The process of a living mount; `fd` is a pidfd."""

    pid: int
    fd: int

    def wait(self, timeout_s: float) -> bool:
        """Whether the process ended within `timeout_s`."""
        ready, _, _ = select.select([self.fd], [], [], timeout_s)
        return bool(ready)


@contextlib.contextmanager
def serving(device: str) -> Iterator[Process | None]:
    """The process of the mount with this device number, None when it is gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        # Not settimeout(): then connect() fails at once while others wait to be accepted.
        connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _ACCEPTED_S, 0)
        )
        try:
            connection.connect(_beacon_name(device))
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid = struct.unpack("3i", credentials)[0]
            fd = os.pidfd_open(pid)
        except OSError:
            yield None
            return
    try:
        yield Process(pid, fd)
    finally:
        os.close(fd)


# Before a mount


def prepare(mountpoint: Path, base: Path) -> Path:
    """The absolute mountpoint, fit for use; a dead mount left on it is removed. TargetError."""
    point = absolute(mountpoint)
    repair(point)
    _refuse_mounted(point)  # first: one that hangs must not be looked into
    _refuse_unless_directory(point)
    base = base.resolve()
    if point == base or base in point.parents:
        raise TargetError(
            f"{point} lies inside the store {base}",
            hint="choose a mountpoint outside of it, such as /mnt/backyfs",
        )
    if os.listdir(point):
        raise TargetError(f"{point} is not empty", hint="mount on an empty directory")
    return point


def _refuse_mounted(point: Path) -> None:
    if (found := mounted_at(point)) is not None:
        command = "backyfs umount" if found.fstype == FSTYPE else "umount"
        raise TargetError(
            f"{point} has a file system mounted already", hint=f"run: {command} {point}"
        )


def _refuse_unless_directory(point: Path) -> None:
    try:
        names = os.listdir(point)
    except FileNotFoundError:
        raise TargetError(f"{point} does not exist", hint=f"run: mkdir {point}") from None
    except NotADirectoryError:
        raise TargetError(f"{point} is no directory", hint="mount on an empty directory") from None
    except OSError as exc:
        raise TargetError(f"{point} cannot be used: {exc.strerror}") from exc
    del names


def repair(point: Path) -> bool:
    """Remove the mount of a process that died; whether there was one. TargetError."""
    repaired = False
    while (mount := mounted_at(point)) is not None and is_dead(mount):
        unmount(point, lazy=True)
        repaired = True
    return repaired


def is_dead(mount: Mount) -> bool:
    """Whether a mount is ours and nobody serves it any more."""
    if mount.fstype != FSTYPE:
        return False
    with serving(mount.device) as found:
        if found is not None:
            return False
    try:
        # Not stat: the kernel may still know the attributes.
        os.close(os.open(mount.point, os.O_RDONLY | os.O_DIRECTORY))
    except OSError as exc:
        return exc.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def unmount(point: Path, *, lazy: bool, again: str = "") -> None:
    """Take a mount away with the system's tool. TargetError, also when it is busy.

    `again` is the command that detaches it all the same, for the message.
    """
    again = again or f"backyfs umount --lazy {point}"
    if os.geteuid() == 0:
        command = ["umount", *(["-l"] if lazy else []), "--", str(point)]
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(point)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_COMMAND_S
        )
    except FileNotFoundError as exc:
        raise TargetError(f"{command[0]} is missing", hint="install the package fuse3") from exc
    except subprocess.TimeoutExpired as exc:
        if mounted_at(point) is None:  # only dropping gigabytes from the page cache took so long
            return
        raise TargetError(
            f"unmounting {point} takes too long: its process hangs",
            hint="" if lazy else f"detach it now: {again}",
        ) from exc
    if done.returncode == 0:
        return
    if "busy" in done.stderr:
        raise TargetError(
            f"{point} is busy: files or directories in it are in use",
            hint=f"see who: fuser -vm {point}; or detach it now: {again}",
        )
    reason = (done.stderr.strip() or f"{command[0]} ended with {done.returncode}").splitlines()[-1]
    raise TargetError(f"cannot unmount {point}: {reason}")
