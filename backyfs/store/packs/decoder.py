"""What the processes that decode (decoders.py) do, and the fork server that they come from.

They know nothing but pack files and the memory they share, and end with whoever asks.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from backyfs.model import FRAME
from backyfs.store.packs.library import PIECE_FRAMES, Library
from backyfs.store.packs.packfile import bound_tables

GOOD, BAD = b"y", b"n"
UNUSED_S = 1.0
"""So long they keep pack files open that nobody reads: what gc removed must be given back."""
_TABLE_BYTES_MAX = 4 << 20
_REQUEST_BYTES_MAX = 64 << 10

_Part = tuple[str, str, int, int, int]
"""As it comes out of JSON: see library.Part."""


def serve(sock: socket.socket, memory: memoryview) -> None:
    """The fork server: fork a process that decodes for every socket that comes, until none comes.

    The answer is the number of the process, 0 where there could be none.
    """
    _be_alone(sock)
    signal.signal(signal.SIGCHLD, lambda *_: _reap())
    gc.freeze()  # who looks through what is inherited has it copied, page by page
    with contextlib.suppress(OSError):
        while True:
            _, descriptors, *_ = socket.recv_fds(sock, 1, 1)
            if not descriptors:
                _reap()
                return
            with socket.socket(fileno=descriptors[0]) as theirs:
                pid = _forked(theirs, memory)
            sock.send(str(pid).encode())


def _reap() -> None:
    """Take leave of those that have ended: their processor time counts as ours from then on, and
    at our own end as that of the command.
    """
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _forked(sock: socket.socket, memory: memoryview) -> int:
    try:
        pid = os.fork()
    except OSError:
        return 0
    if not pid:
        try:
            decode(sock, memory)
        finally:
            os._exit(0)
    return pid


def decode(sock: socket.socket, memory: memoryview) -> None:
    """Answer until the other end is gone.

    A question is JSON: the directory of the packs, the place in `memory`, its length, the parts.
    Without a place, what is stored is to be checked, as the medium has it.
    """
    _be_alone(sock)
    bound_tables(_TABLE_BYTES_MAX)
    sock.settimeout(UNUSED_S)
    libraries = _Libraries()
    room = memoryview(bytearray(PIECE_FRAMES * FRAME))
    with contextlib.suppress(OSError):
        while True:
            with contextlib.suppress(TimeoutError):
                request = sock.recv(_REQUEST_BYTES_MAX)
                if not request:
                    return
                sock.send(GOOD if _done(libraries, request, memory, room) else BAD)
            libraries.close_unused()


def _be_alone(sock: socket.socket) -> None:
    """Have nothing to do with the process that we were forked from."""
    os.setpgid(0, 0)  # Ctrl-C is meant for the other one
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    _close_all_but(sock.fileno())


def _close_all_but(kept: int) -> None:
    """What was open stays so for the other process alone."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number < 3:
            os.dup2(nowhere, number)
        elif number != kept:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(number)


def _done(libraries: _Libraries, request: bytes, memory: memoryview, room: memoryview) -> bool:
    directory, position, length, parts = json.loads(request)
    library = libraries.of(directory)
    try:
        if position is None:
            _check(library, parts, room)
        else:
            _decode(library, parts, memory[position : position + length])
    except Exception:  # whoever asked will meet it, and say what and where
        return False
    return True


def _decode(library: Library, parts: Sequence[_Part], block: memoryview) -> None:
    if len(block) > sum(span for *_, span, _ in parts) * FRAME:
        block[:] = bytes(len(block))
    for name, root, number, span, at in parts:
        place = block[at * FRAME : (at + span) * FRAME]
        library.read(name, bytes.fromhex(root), number, span, place=place)


def _check(library: Library, parts: Sequence[_Part], room: memoryview) -> None:
    for name, root, number, span, _ in parts:
        place = room[: span * FRAME]
        library.read(name, bytes.fromhex(root), number, span, place=place, fresh=True)


class _Libraries:
    """The libraries of the directories that are being read."""

    def __init__(self) -> None:
        self._used: dict[str, tuple[Library, float]] = {}
        self._looked = 0.0

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
        """Close the pack files that nobody reads any more, and those that gc removed."""
        since = time.monotonic() - UNUSED_S
        if self._looked >= since:
            return
        self._looked = time.monotonic()
        for directory, (library, at) in list(self._used.items()):
            if at < since or library.outlived():
                self._used.pop(directory)[0].release()
