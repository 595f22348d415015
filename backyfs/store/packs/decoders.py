"""Processes that decode blocks of frames for this one, and check what is stored.

A thread that decodes gives the interpreter's lock away and takes it back three times a frame, for
some ten microseconds each. A thread beside it that answers requests gets hold of the lock rarely
and late, and two cores do little more than one. In a process of its own decoding meets nobody.

Such a process knows nothing but pack files. Asked for a block, it reads, decodes and checks it into
memory that it shares with us (rooms.py); what shall be elsewhere we copy. Whatever it cannot do (a
damaged frame, a missing file) it leaves to us, and so does one that is gone: then we decode
ourselves, and know what to say.

They are forked, by a process that was forked itself while there was one thread here (forking is not
for a process with threads), and end with us, whatever ends us. One that was killed, or did not
answer for long, is replaced after a while, but for the one that forks. Memory: what they share with
us aside, 4 MiB of tables, a run as it is stored and, where they check, a piece as it is decoded.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from backyfs.store.packs import decoder
from backyfs.store.packs.library import Library, Part
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
REPLACED_S = 60.0
"""So long after one was lost another takes its place, and then one after the other: what took it
(a lack of memory, a disk that hangs) may go on."""


@contextlib.contextmanager
def decoders(
    kept_bytes: int = 0,
    count: int | None = None,
    block_bytes: int = BLOCK_BYTES,
    *,
    at_once: bool = True,
) -> Iterator[Decoders]:
    """Have processes decode for all libraries of this one; none where there is just one core.

    `kept_bytes`: how much of what they decode is kept, in memory that is shared with them.
    `block_bytes`: the most that is asked for at once (whole pages). `at_once`: start them now, not
    each when there is work for it.
    Enter it while the process has one thread, and leave it when nobody reads any more.
    """
    if count is None:
        count = PROCESSES if len(os.sched_getaffinity(0)) > 1 else 0
    found = Library.decoders = Decoders(count, kept_bytes, block_bytes, at_once=at_once)
    try:
        yield found
    finally:
        Library.decoders = None
        found.close()


class Decoders:
    """Some processes for all threads; who finds none free, or wants little, gets no help."""

    def __init__(
        self,
        count: int = PROCESSES,
        kept_bytes: int = 0,
        block_bytes: int = BLOCK_BYTES,
        *,
        at_once: bool = True,
    ) -> None:
        self._all: list[_Process] = []
        self._lost: list[_Process] = []
        self._starting, self._replacing = threading.Lock(), threading.Lock()
        self._unstarted = count
        self._due = 0.0
        self._closed = False
        self._rooms = _rooms(kept_bytes, block_bytes)
        self._server: _ForkServer | None = None
        try:
            if count:
                self._server = _ForkServer(memoryview(self._rooms.memory))
        except OSError as exc:
            log.warning("no process to decode with", {"why": exc})
        self._free: list[_Process] = []
        while at_once and (process := self._another()):
            self._free.append(process)

    @property
    def pids(self) -> list[int]:
        """The processes."""
        return [process.pid for process in self._all]

    def room(self, length: int) -> memoryview:
        """`length` bytes of whatever content, where `read` puts frames without a copy if possible.

        They are the caller's as long as anything refers to them.
        """
        # A short block would keep the rest of a room from all others.
        much = length > self._rooms.room_bytes // 2
        taken = self._rooms.take(length) if much and (self._all or self._server) else None
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

    def check(self, directory: Path, parts: Sequence[Part]) -> bool:
        """Whether frames read well from the medium; False when it must be done here."""
        if sum(part.span for part in parts) < FRAMES_MIN:
            return False
        return self._ask(str(directory), None, 0, parts)

    def _ask(
        self, directory: str, position: int | None, length: int, parts: Sequence[Part]
    ) -> bool:
        if self._lost:
            self._replace()
        process = self._taken()
        if process is None:
            return False
        try:
            done = process.ask(json.dumps((directory, position, length, parts)).encode())
        except (OSError, MemoryError) as exc:
            if self._closed:
                return False
            log.warning("a process that decoded is gone", {"pid": process.pid, "why": exc})
            self._lose(process)
            return False
        self._free.append(process)
        return done

    def _taken(self) -> _Process | None:
        """One that is free, or is started now; None: all have something to do."""
        with contextlib.suppress(IndexError):
            return self._free.pop()
        return self._another()

    def _another(self) -> _Process | None:
        """A new one, as long as there shall be more."""
        with self._starting:
            if not self._server or not self._unstarted:
                return None
            self._unstarted -= 1
            try:
                process = _Process(self._server)
            except OSError as exc:
                log.warning("no process to decode with", {"why": exc})
                self._unstarted = 0
                return None
            self._all.append(process)
            return process

    def _lose(self, process: _Process) -> None:
        process.end()
        with self._replacing:
            self._all.remove(process)
            self._lost.append(process)
            self._due = time.monotonic() + REPLACED_S

    def _replace(self) -> None:
        """Start one for one that is lost, if it is time and the kernel has let go of that."""
        if time.monotonic() < self._due or not self._replacing.acquire(blocking=False):
            return
        try:
            self._due = time.monotonic() + REPLACED_S
            if self._server and self._lost and self._lost[-1].gone():
                process = _Process(self._server)
                self._lost.pop()
                self._all.append(process)
                self._free.append(process)
        except OSError as exc:
            log.warning("no process to decode with", {"why": exc})
            if self._server and self._server.ended:  # nobody can fork any more: told once
                self._server = None
        finally:
            self._replacing.release()

    def close(self) -> None:
        """End all of them."""
        self._closed = True
        self._free.clear()
        for processes in (self._all, self._lost):
            while processes:
                processes.pop().end()
        if self._server:
            self._server.end()


def _rooms(kept_bytes: int, block_bytes: int) -> Rooms:
    count = min(kept_bytes // block_bytes + _SPARE_ROOMS, _ROOMS_MAX)
    try:
        return Rooms(count, block_bytes)
    except OSError as exc:  # a limit of this process, or a kernel that promises no more than it has
        log.warning("little memory to share with the processes that decode", {"why": exc})
        return Rooms(1, block_bytes)


class _Process:
    """One of them, from our side; for one thread at a time."""

    def __init__(self, server: _ForkServer) -> None:
        self._socket, theirs = _pair()
        with theirs:
            try:
                self.pid = server.fork(theirs)
                self._life = _Life(self.pid)
            except OSError:
                self._socket.close()
                raise

    def ask(self, request: bytes) -> bool:
        """Have a block decoded; whether that could be done. OSError: it is gone."""
        self._socket.send(request)
        return _answer(self._socket) == decoder.GOOD

    def end(self) -> None:
        """End it at once: it only reads."""
        self._socket.close()
        self._life.end()

    def gone(self) -> bool:
        """Whether the kernel has let go of it, after `end`."""
        return self._life.over(0.0)


class _ForkServer:
    """The process that forks the others."""

    def __init__(self, memory: memoryview) -> None:
        self._asking = threading.Lock()
        self._socket, theirs = _pair()
        with theirs:
            self._pid = os.fork()
            if not self._pid:
                try:
                    decoder.serve(theirs, memory)
                finally:
                    os._exit(0)
        self._life = _Life(self._pid)

    def fork(self, sock: socket.socket) -> int:
        """The number of a process that decodes for the other end of `sock`."""
        with self._asking:
            try:
                socket.send_fds(self._socket, [b"+"], [sock.fileno()])
                pid = int(_answer(self._socket))
            except OSError:
                self.end()  # what it may still answer belongs to nobody
                raise
        if not pid:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return pid

    @property
    def ended(self) -> bool:
        """Whether it is gone; then nothing can be forked any more."""
        return self._life.over(0.0)

    def end(self) -> None:
        """End it; by itself if it can, as it has to take leave of those it forked."""
        self._socket.close()
        if not self._life.over(END_S):
            self._life.end()
        # Whoever started us may have had the kernel reap children by itself.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, os.WNOHANG)


class _Life:
    """That of a process."""

    def __init__(self, pid: int) -> None:
        self._pidfd = os.pidfd_open(pid)

    def end(self) -> None:
        """End it; when the kernel does not let it die in END_S seconds, later."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self.over(END_S)

    def over(self, wait_s: float) -> bool:
        """Whether it has ended, or does within `wait_s` seconds."""
        if self._pidfd >= 0:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if poll.poll(wait_s * 1000):
                os.close(self._pidfd)
                self._pidfd = -1
        return self._pidfd < 0


def _pair() -> tuple[socket.socket, socket.socket]:
    """Our end, which waits for an answer ANSWER_S seconds at most, and theirs."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(ANSWER_S)
    return ours, theirs


def _answer(sock: socket.socket) -> bytes:
    answer = sock.recv(32)
    if not answer:
        raise ConnectionResetError("it ended")
    return answer
