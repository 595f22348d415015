"""The waist of restoring: a place that takes the bytes of one image.

A target is used once: opened, written, then finished or abandoned. Until `finish` returned, it
must not look like a complete disk: a new file has another name, what is overwritten in place gets
its first bytes last.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

from backyfs.errors import NoSpace, TargetError
from backyfs.model import Extent

WRITERS = 6
"""Threads that write to a disk: they wait for it most of the time."""
BATCH_BYTES = 2 << 20
ZEROS = memoryview(bytes(1 << 20))
"""Zeros to write from: 1 MiB."""


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

    @property
    def writers(self) -> int:
        """How many threads to write from; 1 if `in_order`."""

    @property
    def batch_bytes(self) -> int:
        """What to write at once where there is that much: a power of 2, at most 4 MiB."""

    def reserve(self, extents: Iterable[Extent]) -> None:
        """Make sure that there is room for these, before the first byte. NoSpace, OSError.

        Only of targets that take bytes in any order.
        """

    def write(self, offset: int, data: memoryview) -> None:
        """Take all of `data`, from byte `offset` on. NoSpace, OSError.

        It lies in memory at the same distance from a page's start as `offset` does on the disk,
        so that it can be written past the page cache; it is the caller's again afterwards.
        """

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros. NoSpace, OSError."""

    def settle(self) -> None:
        """Make durable what was written so far."""

    def finish(self) -> None:
        """Make everything durable and the target complete."""

    def abandon(self) -> None:
        """Give up: the target stays recognisably incomplete or goes. Harmless after `finish`."""


@runtime_checkable
class Rewritable(Target, Protocol):
    """A target that was opened to be changed only where it differs."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of what the target holds now. TargetError, OSError."""

    def data(self) -> Iterator[Extent]:
        """Sorted, disjoint extents that may hold something else than zeros."""


_HINTS = {
    errno.EIO: "see why: dmesg",
    errno.EFBIG: "its file system, or ulimit -f, allows no file of that size: restore elsewhere",
}


@contextlib.contextmanager
def using(name: str, doing: str = "write to") -> Iterator[None]:
    """Turns an error of the system into NoSpace or TargetError that names the target.

    A reader that went away (BrokenPipeError) stays what it is.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except EOFError as exc:
        raise TargetError(f"cannot {doing} {name}: somebody cut it short") from exc
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(
                f"no space left while restoring to {name}",
                hint="free space there, or restore elsewhere",
            ) from exc
        raise TargetError(
            f"cannot {doing} {name}: {exc.strerror}", hint=_HINTS.get(exc.errno or 0, "")
        ) from exc


def write_all(fd: int, data: memoryview) -> None:
    """Write all of `data` at the descriptor's position."""
    while data:
        data = data[os.write(fd, data) :]


def pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data`, from byte `offset` on."""
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def pwrite_zeros(fd: int, offset: int, length: int) -> None:
    """Write `length` zeros at byte `offset`."""
    end = offset + length
    while offset < end:
        piece = ZEROS[: min(len(ZEROS), end - offset)]
        pwrite_all(fd, piece, offset)
        offset += len(piece)
