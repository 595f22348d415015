"""Standard streams that are closed, full or broken.

Whoever started us may have closed some (`2>&-`, some service managers). Their descriptors must not
stay free: the next file opened would get the number 1 or 2, and what is meant for the operator
would be written into a repository. Closed stdin is empty, what goes to a closed stderr is lost, and
writing to a closed stdout is an error, as it is for other programs. Nor does a stderr that is full,
or a terminal that is gone, make a failure of what was done: what cannot be said is lost.

Names of files are bytes, and a locale may lack letters: on stdout a name goes out as it is where
that is UTF-8, and what cannot be written otherwise is spelt out. Nothing fails for a letter.

A full stdout must not read as a full store: what fails there is an OutputError, whoever writes.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

from backyfs.errors import OutputError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_STAND_INS = (os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)  # stdout: every write is EBADF


def prepare() -> None:
    """Open the standard descriptors that are closed, and their `sys` streams; name stdout's errors.

    A `sys.stdout` that somebody has put in place of the process's own stays.
    """
    for number, flags in enumerate(_STAND_INS):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)  # the lowest free one: this one
            assert opened == number
            os.set_inheritable(number, True)
    # Python made None of those that were closed when it started.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _naming(sys.stdout or os.fdopen(1, "w", closefd=False))
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _losing(sys.stderr or os.fdopen(2, "w", closefd=False))


class _Stdout(io.FileIO):
    """Standard output; BrokenPipeError when its reader went away, OutputError for all else."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return self._write(data)
        except BrokenPipeError:
            raise
        except OSError as exc:
            raise OutputError(f"cannot write to standard output: {exc.strerror}") from exc

    def _write(self, data: ReadableBuffer) -> int:
        count: int | None = super().write(data)
        if count is None:  # somebody made it non-blocking
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return count


class _Stderr(io.FileIO):
    """Standard error; what it does not take is lost."""

    def write(self, data: ReadableBuffer, /) -> int:
        count: int | None = None  # also: somebody made it non-blocking
        with contextlib.suppress(OSError):
            count = super().write(data)
        return memoryview(data).nbytes if count is None else count


def _losing(stream: TextIO) -> TextIO:
    """Standard error as `stream` has it, without errors."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Stderr(2, "w", closefd=False)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


def _naming(stream: TextIO) -> TextIO:
    """Standard output as `stream` has it, with errors that name it."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Stdout(1, "w", closefd=False)),
        encoding=stream.encoding,
        errors=_errors(stream.encoding),
        line_buffering=bool(stream.line_buffering),
    )


def _errors(encoding: str) -> str:
    """How to write what `encoding` has no letter for; odd bytes of names are surrogates."""
    utf_8 = encoding.lower().replace("_", "-") == "utf-8"
    return "surrogateescape" if utf_8 else "backslashreplace"
