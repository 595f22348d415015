"""The waist of restoring: a place that takes the bytes of one image.

A target is used once: opened, written, then finished or abandoned. Until `finish` returned, it
must not look like a complete disk: a new file has another name, what is overwritten in place gets
its first bytes last.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Protocol

from backyfs.errors import NoSpace

ZEROS = memoryview(bytes(1 << 20))
"""Zeros to write from: 1 MiB."""

Data = bytes | memoryview


class Target(Protocol):
    """Takes every byte of an image of the size it was opened for."""

    @property
    def name(self) -> str:
        """What to call it in messages."""

    @property
    def in_order(self) -> bool:
        """Whether bytes must come in order, holes as zeros, from one thread.

        Otherwise `write` and `zero` may be called in any order from several threads.
        """

    @property
    def holes_are_zero(self) -> bool:
        """Whether what is never written reads as zeros anyway; else `zero` must be called."""

    @property
    def head_bytes(self) -> int:
        """Bytes at the start that must be written after all others; 0 = no matter."""

    def write(self, offset: int, data: Data) -> None:
        """Take all of `data` at byte `offset`. NoSpace, OSError."""

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros. NoSpace, OSError."""

    def settle(self) -> None:
        """Make durable what was written so far."""

    def finish(self) -> None:
        """Make everything durable and the target complete."""

    def abandon(self) -> None:
        """Give up: the target stays recognisably incomplete or goes. Harmless after `finish`."""


@contextlib.contextmanager
def space_for(name: str) -> Iterator[None]:
    """Turns a full target into NoSpace that names it."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NoSpace(
            f"no space left while restoring to {name}",
            hint="free space there, or restore elsewhere",
        ) from exc


def write_all(fd: int, data: Data) -> None:
    """Write all of `data` at the descriptor's position."""
    done = os.write(fd, data)
    if done < len(data):
        view = memoryview(data)
        while done < len(data):
            done += os.write(fd, view[done:])


def pwrite_all(fd: int, data: Data, offset: int) -> None:
    """Write all of `data` at byte `offset`."""
    done = os.pwrite(fd, data, offset)
    if done < len(data):
        view = memoryview(data)
        while done < len(data):
            done += os.pwrite(fd, view[done:], offset + done)


def pwrite_zeros(fd: int, offset: int, length: int) -> None:
    """Write `length` zeros at byte `offset`."""
    end = offset + length
    while offset < end:
        piece = ZEROS[: min(len(ZEROS), end - offset)]
        pwrite_all(fd, piece, offset)
        offset += len(piece)
