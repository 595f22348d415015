"""Processes that decode blocks of frames for this one.

A thread that decodes gives the interpreter's lock away and takes it back three times a frame, for
some ten microseconds each. A thread beside it that answers requests gets hold of the lock rarely
and late, and two cores do little more than one. In a process of its own decoding meets nobody.

Such a process knows nothing but pack files. Asked for a block, it reads, decodes and checks it into
memory that it shares with us (rooms.py); what shall be elsewhere we copy. Whatever it cannot do (a
damaged frame, a missing file) it leaves to us, and so does one that is gone: then we decode
ourselves, and know what to say.

They are forked while there is one thread, and end with us, whatever ends us. Memory: what they
share with us aside, 4 MiB of tables and a run as it is stored, each.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from backyfs.model import FRAME
from backyfs.store.packs.library import Library, Part
from backyfs.store.packs.packfile import bound_tables
from backyfs.store.packs.rooms import Rooms

log = logging.getLogger(__name__)

PROCESSES = min(4, len(os.sched_getaffinity(0)) + 1)
"""One waits while its last block is put away; more than four decode faster than blocks go out."""
FRAMES_MIN = 4
"""Fewer are decoded in less time than it takes to ask."""
BLOCK_BYTES = 1 << 20
_SPARE_ROOMS = 8
"""For blocks that are being read, or sent, and are not in the cache."""
_ROOMS_MAX = 1024
"""Of a cache above 1 GiB the rest lies in memory of this process."""
ANSWER_S = 30.0
END_S = 1.0
"""One that the kernel does not let die, in a read that hangs, is left behind."""
UNUSED_S = 1.0
"""So long they keep pack files open that nobody reads: what gc removed must be given back."""
_TABLE_BYTES_MAX = 4 << 20
_REQUEST_BYTES_MAX = 64 << 10
_GOOD, _BAD = b"y", b"n"


@contextlib.contextmanager
def decoders(kept_bytes: int = 0, count: int | None = None) -> Iterator[Decoders]:
    """Have processes decode for all libraries of this one; none where there is just one core.

    `kept_bytes`: how much of what they decode is kept, in memory that is shared with them.
    Enter it while the process has one thread, and leave it when nobody reads any more.
    """
    if count is None:
        count = PROCESSES if len(os.sched_getaffinity(0)) > 1 else 0
    found = Library.decoders = Decoders(count, kept_bytes)
    try:
        yield found
    finally:
        Library.decoders = None
        found.close()


class Decoders:
    """Some processes for all threads; who finds none free, or wants little, gets no help."""

    def __init__(self, count: int = PROCESSES, kept_bytes: int = 0) -> None:
        self._all: list[_Process] = []
        self._rooms = _rooms(kept_bytes)
        try:
            for _ in range(count):
                self._all.append(_Process(self._rooms))
        except OSError as exc:
            log.warning("no process to decode with", {"why": exc})
        self._free = list(self._all)

    @property
    def pids(self) -> list[int]:
        """The processes."""
        return [process.pid for process in self._all]

    def room(self, length: int) -> memoryview:
        """`length` bytes of whatever content, where `read` puts frames without a copy if possible.

        They are the caller's as long as anything refers to them.
        """
        # A short block would keep the rest of a room from all others.
        much = length > BLOCK_BYTES // 2
        taken = self._rooms.take(length) if much and self._all else None
        return memoryview(bytearray(length)) if taken is None else taken

    def read(self, directory: Path, parts: Sequence[Part], place: memoryview) -> bool:
        """Frames into `place`, and zeros where none belong; False when it must be done here."""
        if sum(part.span for part in parts) < FRAMES_MIN:
            return False
        position = self._rooms.position(place)
        if position is not None:
            return self._ask(str(directory), position, len(place), parts)
        room = self._rooms.take(len(place))
        if room is None:
            return False
        position = self._rooms.position(room)
        assert position is not None
        done = self._ask(str(directory), position, len(room), parts)
        if done:
            place[:] = room
        return done

    def _ask(self, directory: str, position: int, length: int, parts: Sequence[Part]) -> bool:
        try:
            process = self._free.pop()
        except IndexError:
            return False
        try:
            done = process.ask(json.dumps((directory, position, length, parts)).encode())
        except (OSError, MemoryError) as exc:
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


def _rooms(kept_bytes: int) -> Rooms:
    count = min(kept_bytes // BLOCK_BYTES + _SPARE_ROOMS, _ROOMS_MAX)
    try:
        return Rooms(count, BLOCK_BYTES)
    except OSError as exc:  # a limit of this process, or a kernel that promises no more than it has
        log.warning("little memory to share with the processes that decode", {"why": exc})
        return Rooms(1, BLOCK_BYTES)


class _Process:
    """One of them, from our side; for one thread at a time."""

    def __init__(self, rooms: Rooms) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.pid = os.fork()
            if not self.pid:
                try:
                    _decode(theirs, memoryview(rooms.memory))
                finally:
                    os._exit(0)
        self._socket.settimeout(ANSWER_S)

    def ask(self, request: bytes) -> bool:
        """Have a block decoded; whether that could be done. OSError: it is gone."""
        self._socket.send(request)
        answer = self._socket.recv(1)
        if not answer:
            raise ConnectionResetError("it ended")
        return answer == _GOOD

    def end(self) -> None:
        """End it at once: it only reads."""
        self._socket.close()
        # Whoever started us may have had the kernel reap children by itself.
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            deadline = time.monotonic() + END_S
            while os.waitpid(self.pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
                time.sleep(0.001)


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
    directory, position, length, parts = json.loads(request)
    library = libraries.of(directory)
    block = memory[position : position + length]
    try:
        if length > sum(span for *_, span, _ in parts) * FRAME:
            block[:] = bytes(length)
        for name, root, number, span, at in parts:
            place = block[at * FRAME : (at + span) * FRAME]
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
