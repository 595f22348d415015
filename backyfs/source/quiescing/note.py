"""The file freeze.json in a VM's directory: the guest may be frozen.

It is there, durably, before freezing begins, and goes when the guest is thawed for certain. Whoever
sees to that holds its flock; so a note that nobody holds was left by a crash. It has all that
thawing needs, whatever the configuration says by then.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from backyfs.source.quiescing.plan import Plan

NAME = "freeze.json"

_POLL_S = 0.05
_BYTES_MAX = 1 << 20


def place(directory: Path) -> Path:
    """Where the note of a VM's directory is."""
    return directory / NAME


class Note:
    """A note that this process holds."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path, self._fd = path, fd

    @classmethod
    def write(cls, plan: Plan) -> Note:
        """Note durably that a guest is about to be frozen. BlockingIOError: somebody holds a note;
        OSError.
        """
        path = place(plan.directory)
        note = cls._locked(path, os.O_CREAT)
        try:
            os.ftruncate(note._fd, 0)
            os.pwrite(note._fd, plan.encode(), 0)
            os.fsync(note._fd)
            _sync(path.parent)
        except BaseException:
            note.remove()
            raise
        return note

    @classmethod
    def left(cls, directory: Path, wait_s: float) -> Note | None:
        """The note that is there, if any; BlockingIOError when it is held for longer than `wait_s`
        seconds; OSError.
        """
        end = time.monotonic() + wait_s
        while True:
            try:
                return cls._locked(place(directory), 0)
            except FileNotFoundError:
                return None
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
                time.sleep(_POLL_S)

    @classmethod
    def _locked(cls, path: Path, flags: int) -> Note:
        """The file of that name, locked. BlockingIOError: somebody holds it; OSError."""
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o640)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.stat(path), os.fstat(fd)):
                        return cls(path, fd)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # removed by its holder meanwhile

    def plan(self) -> Plan:
        """What it says. ValueError: it is not `whole`, or damaged, or a later version's."""
        return Plan.decode(self._content())

    @property
    def whole(self) -> bool:
        """Whether all of it was written, be it damaged since; if not, freezing had not begun."""
        return self._content().endswith(b"\n")

    def _content(self) -> bytes:
        return os.pread(self._fd, _BYTES_MAX, 0)

    @property
    def owner(self) -> os.stat_result:
        """Whose file it is."""
        return os.fstat(self._fd)

    def remove(self) -> None:
        """The guest is thawed. OSError."""
        os.unlink(self._path)
        self.close()

    def close(self) -> None:
        """Let go of it; what is not removed stays, for somebody else to see to."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
