"""Processes that decode blocks of frames for this one.

A thread that decodes gives the interpreter's lock away and takes it back three times a frame, for
some ten microseconds each. A thread beside it that answers requests gets hold of the lock rarely
and late, and two cores do little more than one. In a process of its own decoding meets nobody.

Such a process knows nothing but pack files. Asked for a block, it reads, decodes and checks it into
memory that it shares with us, and we copy it out. Whatever it cannot do (a damaged frame, a missing
file) it leaves to us, and so does one that is gone: then we decode ourselves, and know what to say.

They are forked while there is one thread, and end with us, whatever ends us. Memory: what they
share with us aside, 1 MiB for a block, 4 MiB of tables and a run as it is stored, each.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from backyfs.model import FRAME
from backyfs.store.packs.library import Library, Part
from backyfs.store.packs.packfile import bound_tables

log = logging.getLogger(__name__)

PROCESSES = 2
FRAMES_MIN = 4
"""Fewer are decoded in less time than it takes to ask."""
BLOCK_BYTES_MAX = 1 << 20
ANSWER_S = 30.0
UNUSED_S = 1.0
"""So long they keep pack files open that nobody reads: what gc removed must be given back."""
_TABLE_BYTES_MAX = 4 << 20
_REQUEST_BYTES_MAX = 64 << 10
_GOOD, _BAD = b"y", b"n"


@contextlib.contextmanager
def decoders(count: int | None = None) -> Iterator[Decoders]:
    """Have processes decode for all libraries of this one; none where there is just one core.

    Enter it while the process has one thread, and leave it when nobody reads any more.
    """
    if count is None:
        count = PROCESSES if len(os.sched_getaffinity(0)) > 1 else 0
    found = Library.decoders = Decoders(count)
    try:
        yield found
    finally:
        Library.decoders = None
        found.close()


class Decoders:
    """Some processes for all threads; who finds none free, or wants little, gets no help."""

    def __init__(self, count: int = PROCESSES) -> None:
        self._all: list[_Process] = []
        try:
            for _ in range(count):
                self._all.append(_Process())
        except OSError as exc:
            log.warning("no process to decode with", {"why": exc})
        self._free = list(self._all)

    @property
    def pids(self) -> list[int]:
        """The processes."""
        return [process.pid for process in self._all]

    def read(self, directory: Path, parts: Sequence[Part], place: memoryview) -> bool:
        """Frames into `place`, and zeros where none belong; False when it must be done here."""
        if sum(part.span for part in parts) < FRAMES_MIN or len(place) > BLOCK_BYTES_MAX:
            return False
        try:
            process = self._free.pop()
        except IndexError:
            return False
        wanted = str(directory), len(place), parts
        try:
            done = process.read(json.dumps(wanted).encode(), place)
        except OSError as exc:
            log.warning("a process that decoded is gone", {"pid": process.pid, "why": exc})
            self._all.remove(process)
            process.end()
            return False
        self._free.append(process)
        return done

    def close(self) -> None:
        """End all of them."""
        self._free.clear()
        while self._all:
            self._all.pop().end()


class _Process:
    """One of them, from our side; for one thread at a time."""

    def __init__(self) -> None:
        self._memory = memoryview(mmap.mmap(-1, BLOCK_BYTES_MAX))
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.pid = os.fork()
            if not self.pid:
                try:
                    _decode(theirs, self._memory)
                finally:
                    os._exit(0)
        self._socket.settimeout(ANSWER_S)

    def read(self, request: bytes, place: memoryview) -> bool:
        """Have a block decoded into `place`; whether that could be done. OSError: it is gone."""
        self._socket.send(request)
        answer = self._socket.recv(1)
        if not answer:
            raise ConnectionResetError("it ended")
        if answer != _GOOD:
            return False
        place[:] = self._memory[: len(place)]
        return True

    def end(self) -> None:
        """End it at once: it only reads."""
        self._socket.close()
        # Whoever started us may have had the kernel reap children by itself.
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


# In the process


def _decode(sock: socket.socket, memory: memoryview) -> None:
    """Answer until the other end is gone."""
    os.setpgid(0, 0)  # Ctrl-C is meant for the other one
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    _close_all_but(sock.fileno())
    bound_tables(_TABLE_BYTES_MAX)
    sock.settimeout(UNUSED_S)
    libraries = _Libraries()
    with contextlib.suppress(OSError):
        while True:
            with contextlib.suppress(TimeoutError):
                request = sock.recv(_REQUEST_BYTES_MAX)
                if not request:
                    return
                sock.send(_GOOD if _decoded(libraries, request, memory) else _BAD)
            libraries.close_unused()


def _close_all_but(kept: int) -> None:
    """What was open stays so for the other process alone."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number < 3:
            os.dup2(nowhere, number)
        elif number != kept:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(number)


def _decoded(libraries: _Libraries, request: bytes, memory: memoryview) -> bool:
    directory, length, parts = json.loads(request)
    library = libraries.of(directory)
    try:
        if length > sum(span for *_, span, _ in parts) * FRAME:
            memory[:length] = bytes(length)
        for name, root, number, span, at in parts:
            place = memory[at * FRAME : (at + span) * FRAME]
            library.read(name, bytes.fromhex(root), number, span, place=place)
    except Exception:  # whoever asked will meet it, and say what and where
        return False
    return True


class _Libraries:
    """The libraries of the directories that are being read."""

    def __init__(self) -> None:
        self._used: dict[str, tuple[Library, float]] = {}

    def of(self, directory: str) -> Library:
        """The library of a directory, open."""
        if directory in self._used:
            library = self._used[directory][0]
        else:
            library = Library(Path(directory))
            library.acquire()
        self._used[directory] = library, time.monotonic()
        return library

    def close_unused(self) -> None:
        """Close the pack files that nobody reads any more."""
        since = time.monotonic() - UNUSED_S
        for directory in [name for name, (_, at) in self._used.items() if at < since]:
            self._used.pop(directory)[0].release()
