"""The waist of restoring: a place that takes the bytes of one image.

A target is used once: opened, written, then finished or abandoned. Until `finish` returned, it
must not look like a complete disk: a new file has another name, what is overwritten in place gets
its first bytes last.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from typing import Protocol

from backyfs.errors import NoSpace

ZEROS = memoryview(bytes(1 << 20))
"""Zeros to write from: 1 MiB."""

Pieces = Sequence[bytes | memoryview]
"""Bytes that follow each other, in at most IOV_MAX pieces."""


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

    def write(self, offset: int, pieces: Pieces) -> None:
        """Take all of `pieces`, from byte `offset` on. NoSpace, OSError."""

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


def length_of(pieces: Pieces) -> int:
    """Bytes of all pieces together."""
    return sum(map(len, pieces))


def write_all(fd: int, pieces: Pieces) -> None:
    """Write all of `pieces` at the descriptor's position."""
    done = os.writev(fd, pieces)
    while done < length_of(pieces):
        pieces = _without(pieces, done)
        done = os.writev(fd, pieces)


def pwrite_all(fd: int, pieces: Pieces, offset: int) -> None:
    """Write all of `pieces`, from byte `offset` on."""
    done = os.pwritev(fd, pieces, offset)
    while done < length_of(pieces):
        pieces, offset = _without(pieces, done), offset + done
        done = os.pwritev(fd, pieces, offset)


def _without(pieces: Pieces, count: int) -> Pieces:
    """What is left when `count` bytes were written."""
    for index, piece in enumerate(pieces):
        if count < len(piece):
            return [memoryview(piece)[count:], *pieces[index + 1 :]]
        count -= len(piece)
    return []


def pwrite_zeros(fd: int, offset: int, length: int) -> None:
    """Write `length` zeros at byte `offset`."""
    end = offset + length
    while offset < end:
        piece = ZEROS[: min(len(ZEROS), end - offset)]
        pwrite_all(fd, [piece], offset)
        offset += len(piece)
