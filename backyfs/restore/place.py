"""Choosing and opening a target by what its name leads to, with every reason not to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from backyfs import signals
from backyfs.errors import TargetError, UsageError
from backyfs.restore import device
from backyfs.restore.device import Device, loops, openers
from backyfs.restore.regular import ExistingFile, KeptFile, NewFile
from backyfs.restore.stream import Stream
from backyfs.restore.target import Target, using
from backyfs.store.repository import is_repository

if TYPE_CHECKING:
    from backyfs.ceph.settings import Settings

_PROBE_BYTES = 1 << 20
_PROBES, _BLOCK = 64, 64 << 10
_RBD = "rbd:"


def overwrites(where: str, size: int, *, ceph: Settings | None = None) -> bool:
    """Whether a restore of `size` bytes to `where` takes something away.

    That is a file or device with data (see `holds_data`), or an RBD image that holds data or has
    another size. `ceph` as for `opened`. TargetError.
    """
    if not where.startswith(_RBD):
        return holds_data(where)
    from backyfs.ceph.settings import Settings
    from backyfs.restore import rbd

    return rbd.loses(rbd.rbd_spec(where), size, ceph or Settings())


def holds_data(where: str) -> bool:
    """Whether a restore to `where` would overwrite something: a file or device not all zero.

    Of a device the first and the last MiB are looked at, and 64 places between them.
    """
    mode = _mode(where)
    if mode is None or not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        return False
    with using(where, "read"), open(where, "rb", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        if stat.S_ISREG(mode):
            return size > 0
        ends = {0, max(0, size - _PROBE_BYTES)}
        between = range(0, size, max(1, size // _PROBES) // _BLOCK * _BLOCK or _BLOCK)
        places = [(at, _PROBE_BYTES) for at in ends] + [(at, _BLOCK) for at in between]
        return any(_probe(stream.fileno(), *place) for place in places)


def _probe(fd: int, offset: int, length: int) -> bool:
    return os.pread(fd, length, offset).strip(b"\0") != b""


@contextlib.contextmanager
def opened(
    where: str,
    size: int,
    *,
    store: Path,
    force: bool = False,
    keep: bool = False,
    ceph: Settings | None = None,
) -> Iterator[Target]:
    """The target at `where` for an image of `size` bytes; abandoned when left unfinished.

    "-" is stdout, `rbd:POOL[/NAMESPACE]/IMAGE` an image of the cluster that `ceph` says how to
    reach (None: as the environment says). Existing data is overwritten (see `overwrites`), but
    never while somebody writes to it: `force` overrides that for devices and RBD images. With
    `keep` it stays where it is not written, and an existing target is `Rewritable`. `store` is
    the repository, which is no place to restore to. TargetError, UsageError, OSError.
    """
    stream = _stream(where)
    with contextlib.ExitStack() as stack:
        with signals.held():  # none may come between making a file and knowing of it
            if where.startswith(_RBD):
                target = _open_rbd(where, size, ceph, force, keep)
            else:
                target = stream or _open(where, size, store, force, keep)
            stack.callback(target.abandon)
        yield target


def _stream(where: str) -> Stream | None:
    """Stdout, a pipe or a character device; None for anything else. May wait for a reader."""
    if where.startswith(_RBD):
        return None
    if where == "-":
        return Stream(_refuse_terminal(1), "stdout", owned=False)
    mode = _mode(where)
    if mode is None or not _is_stream(mode):
        return None
    return Stream(_refuse_terminal(os.open(where, os.O_WRONLY | os.O_CLOEXEC)), where)


def _open_rbd(where: str, size: int, ceph: Settings | None, force: bool, keep: bool) -> Target:
    from backyfs.ceph.settings import Settings
    from backyfs.restore import rbd

    return rbd.open_image(rbd.rbd_spec(where), size, ceph or Settings(), force=force, keep=keep)


def check(where: str, size: int, *, store: Path, force: bool = False) -> None:
    """Raise what `opened` would, of a file or a device, and change nothing: for a rehearsal."""
    if where == "-" or where.startswith(_RBD) or _is_stream(_mode(where) or 0):
        return
    path, mode = _usable(where, store, force)
    if mode is not None and stat.S_ISBLK(mode):
        device.check(path, size)


def _is_stream(mode: int) -> bool:
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _open(where: str, size: int, store: Path, force: bool, keep: bool) -> Target:
    path, mode = _usable(where, store, force)
    if mode is None:
        return NewFile(path, size)
    if stat.S_ISBLK(mode):
        return Device(path, size, keep=keep)
    return KeptFile(path, size) if keep else ExistingFile(path, size)


def _usable(where: str, store: Path, force: bool) -> tuple[Path, int | None]:
    """The target behind links, and its mode (None: it is new). TargetError with all that forbids
    it and can be seen without opening it.
    """
    path = Path(os.path.realpath(where))
    if (inside := _repository_around(path, store)) is not None:
        raise TargetError(
            f"{where} lies in the repository {inside}", hint="restore to another place"
        )
    mode = _mode(path)
    if (mode is None or stat.S_ISREG(mode)) and _among_devices(path):
        raise TargetError(f"{where} is no device", hint="see the devices there are with: lsblk")
    if mode is None:
        directory = path if where.endswith("/") else path.parent
        if not directory.is_dir():
            raise TargetError(f"no directory {directory}", hint="make it, or restore elsewhere")
    elif stat.S_ISREG(mode):
        _refuse_while_written(path)
    elif stat.S_ISBLK(mode):
        _refuse_while_attached(path)
        _refuse_while_open(path, force)
    else:
        kind = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
        raise TargetError(f"{where} is {kind}", hint="name a file, a block device, or - for stdout")
    return path, mode


def _repository_around(path: Path, store: Path) -> Path | None:
    """The repository that a target would lie in: `store`, or another VM's."""
    for directory in path.parents:
        with contextlib.suppress(OSError):
            if directory == store.resolve() or is_repository(directory):
                return directory
    return None


def _refuse_terminal(fd: int) -> int:
    if os.isatty(fd):
        raise UsageError(
            "a disk image is not for a terminal", hint="redirect stdout, or name a file"
        )
    return fd


def _mode(where: str | Path) -> int | None:
    try:
        return os.stat(where).st_mode
    except FileNotFoundError:
        return None


def _among_devices(path: Path) -> bool:
    """Whether a file there would lie among the devices, in memory: somebody mistyped a name."""
    with contextlib.suppress(OSError):
        return os.path.ismount("/dev") and path.parent.stat().st_dev == os.stat("/dev").st_dev
    return False


def _refuse_while_written(path: Path) -> None:
    """TargetError while anybody has the file open for writing: a running VM, a loop device.

    The kernel grants a read lease only when there is no writer.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as exc:
        if exc.errno == errno.EAGAIN:
            raise TargetError(
                f"{path} is open for writing elsewhere (a running VM, a loop device?)",
                hint=f"see who has it with: fuser -v {path}; losetup -j {path}",
            ) from exc
        # The file system knows no leases, or the file is another user's: we cannot tell.
    finally:
        os.close(fd)


def _refuse_while_attached(path: Path) -> None:
    """TargetError while a loop device, whose partitions may be mounted, is on the device."""
    if found := sorted(loops(path)):
        raise TargetError(
            f"{path} is attached as {', '.join(found)}",
            hint=f"unmount what is mounted from there, then: losetup -d {found[0]}",
        )


def _refuse_while_open(path: Path, force: bool) -> None:
    pids = [] if force else sorted(openers(path))
    if pids:
        raise TargetError(
            f"{path} is open in process {', '.join(map(str, pids))}",
            hint="end it (a running VM?), or give --force",
        )
