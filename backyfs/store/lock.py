"""Locks of one repository: one writer, short changes of state, many readers.

All are flock(2) locks, which the kernel drops with the process: nothing to break by hand. The
writer's lock file also holds its intent: which revision's files are unfinished if it dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from backyfs.errors import Busy, Corrupt
from backyfs.store.fs import SYSTEM, Fs, is_medium_error, open_file, open_unlinked, read_file
from backyfs.store.record import parse_time, sealed, timestamp, unsealed

_POLL_S = 0.01
_META_WAIT_S = 30.0
_SHARE_WAIT_S = 2.0


WAIT = "wait for it, or give --wait SECONDS"
"""A hint, for what has that option."""
_AGAIN = "try again when it has ended"


@contextlib.contextmanager
def exclusive(path: Path, wait_s: float, busy: str, *, hint: str = _AGAIN) -> Iterator[int]:
    """Hold the exclusive lock of `path`; yields its descriptor. Busy after `wait_s` seconds."""
    fd = open_unlinked(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            _take(fd, fcntl.LOCK_EX, wait_s, busy, hint)
        except OSError as exc:
            what = f"cannot be locked, which its file system must allow: {exc.strerror}"
            raise OSError(exc.errno, what, str(path)) from exc
        yield fd
    finally:
        os.close(fd)


def _take(fd: int, mode: int, wait_s: float, busy: str, hint: str = _AGAIN) -> None:
    if _try(fd, mode):
        return
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        if _try(fd, mode):
            return
    raise Busy(busy, hint=hint)


def _try(fd: int, mode: int) -> bool:
    try:
        fcntl.flock(fd, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def meta(path: Path) -> contextlib.AbstractContextManager[int]:
    """The lock around a change of state; held for milliseconds."""
    return exclusive(path, _META_WAIT_S, f"{path}: the state is being changed by another process")


def share(fd: int, what: str) -> bool:
    """Take a reader's lock on an open file; False where the file system cannot lock it. Busy.

    Somebody who removes revisions holds the exclusive lock for an instant, to see whether there
    are readers: waiting 2 s outlasts that.
    """
    try:
        _take(fd, fcntl.LOCK_SH, _SHARE_WAIT_S, f"{what} is kept locked by another process")
    except OSError:
        return False
    return True


@contextlib.contextmanager
def no_readers(paths: Iterable[Path]) -> Iterator[bool]:
    """Keep new readers away from all these files while entered, if there are none already.

    Yields whether there are none. Readers wait meanwhile: stay for an instant only.
    """
    with contextlib.ExitStack() as stack:
        yield all(_kept(path, stack) for path in paths)


def _kept(path: Path, stack: contextlib.ExitStack) -> bool:
    try:
        fd = open_file(path)
    except OSError as exc:
        if not isinstance(exc, FileNotFoundError) and not is_medium_error(exc):
            raise
        return True  # nobody can open it
    stack.callback(os.close, fd)
    try:
        return _try(fd, fcntl.LOCK_EX)
    except OSError as exc:
        if exc.errno != errno.EBADF:
            return True  # a file system without locks: readers have none either
    # NFS gives the exclusive lock only to those who may write.
    fd = open_file(path, os.O_RDWR)
    stack.callback(os.close, fd)
    return _try(fd, fcntl.LOCK_EX)


class Intent:
    """What the lock file says of unfinished work; written and read by the lock's holder only."""

    def __init__(self, fd: int, path: Path, fs: Fs = SYSTEM) -> None:
        self._fd, self._path, self._fs = fd, path, fs

    def read(self) -> str:
        """The revision a former writer left unfinished, or ""."""
        try:
            data = os.pread(self._fd, 65536, 0)
        except OSError as exc:  # rclone without --vfs-cache-mode: either read or write
            raise OSError(exc.errno, exc.strerror, str(self._path)) from exc
        if not data:
            return ""
        try:
            return str(unsealed(data, str(self._path)).get("revision", ""))
        except Corrupt:
            return ""  # torn while being written: its writer had not begun to work

    def write(self, revision: str) -> None:
        """Say durably that `revision` is being made."""
        now = timestamp(datetime.now(UTC))
        value = {
            "revision": revision,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "start": now,
        }
        self._fs.truncate(self._fd, 0, self._path)
        self._fs.pwrite(self._fd, sealed(value), 0, self._path)
        self._fs.fdatasync(self._fd, self._path)

    def clear(self) -> None:
        """Say that nothing is unfinished; needs no durability."""
        self._fs.truncate(self._fd, 0, self._path)


def holder(path: Path) -> str:
    """Who holds the writer's lock, in words, as far as the intent says."""
    try:
        value = unsealed(read_file(path), str(path))
    except (OSError, Corrupt):
        return "another process"
    return f"process {value.get('pid')} on {value.get('host')} since {value.get('start')}"


class Held:
    """Which files are locked at this moment, as the kernel tells: looking takes no lock itself.

    Locks of this host only; nothing where there is no /proc/locks.
    """

    def __init__(self, table: str) -> None:
        self._modes: dict[tuple[int, int], set[str]] = {}
        self._anywhere: dict[int, set[str]] = {}
        for line in table.splitlines():
            fields = line.split()
            if "->" not in fields and len(fields) >= 6 and fields[1] == "FLOCK":
                major, minor, inode = fields[5].split(":")
                device = os.makedev(int(major, 16), int(minor, 16))
                self._modes.setdefault((device, int(inode)), set()).add(fields[3])
                self._anywhere.setdefault(int(inode), set()).add(fields[3])

    @classmethod
    def now(cls) -> Held:
        """As it is now."""
        try:
            return cls(Path("/proc/locks").read_text())
        except OSError:
            return cls("")

    def _of(self, path: Path) -> set[str]:
        try:
            status = os.stat(path)
        except OSError:
            return set()
        # Where many trees share a file system (btrfs), the table has another device number.
        if os.major(status.st_dev) == 0:
            return self._anywhere.get(status.st_ino, set())
        return self._modes.get((status.st_dev, status.st_ino), set())

    def exclusively(self, path: Path) -> bool:
        """Whether somebody writes under this lock."""
        return "WRITE" in self._of(path)

    def shared(self, path: Path) -> bool:
        """Whether somebody reads under this lock."""
        return "READ" in self._of(path)


def begun(path: Path) -> tuple[str, datetime] | None:
    """The revision that the writer's lock file says is being made, and since when."""
    try:
        value = unsealed(read_file(path), str(path))
        return str(value["revision"]), parse_time(str(value["start"]))
    except (OSError, Corrupt, KeyError, ValueError):
        return None
