"""Every error an operator may meet, each with one sentence, a next step and an exit code.

    BackyfsError            1   something expected went wrong
    ├── UsageError          2   the command line, a name or a SPEC makes no sense
    ├── ConfigError         2   a configuration file is wrong
    ├── NoRepository       10   there is no repository here
    │   └── Unsupported    10   there is one, but of a version or with a feature we do not know
    ├── NoRevision         11   no revision (or disk) matches
    ├── Corrupt            12   stored bytes fail their checksum, or are missing
    ├── Mismatch           12   a new revision differs from its source where it was not read
    ├── SourceUnavailable  13   the source cannot be read
    ├── NoSpace            14   the store's file system is full
    ├── TargetError         1   a restore or mount target cannot be used
    ├── OutputError         1   the answer cannot be written to standard output
    └── Busy               75   another writer is at work

The command line prints these as one line (and the hint as a second); anything else is a bug and
prints a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class BackyfsError(Exception):
    """An expected error: `message` says what and where, `hint` what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(BackyfsError):
    """Wrong usage: a command line, a name or a revision SPEC that makes no sense."""

    exit_code = 2


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """Something wrong in a file, at a place in it; `line` and `column` count from 1."""

    file: str
    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.text}"


class ConfigError(BackyfsError):
    """A configuration file that cannot be used; `problems` are all its faults with a place."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "", problems: Sequence[Problem] = ()) -> None:
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)

    @classmethod
    def of(cls, problems: Sequence[Problem], name: str) -> ConfigError:
        """The error for one or more problems of the file `name` and those it includes."""
        if len(problems) == 1:
            return cls(str(problems[0]), problems=problems)
        listing = "".join(
            f"\n  {str(problem).removeprefix(f'{name}:')}" for problem in sorted(problems)
        )
        return cls(f"{name}: {len(problems)} problems{listing}", problems=problems)


class NoRepository(BackyfsError):
    """There is no repository in the directory that was named."""

    exit_code = 10


class Unsupported(NoRepository):
    """A repository or file of a newer version, or with a feature this program does not know."""


class NoRevision(BackyfsError):
    """No revision, or no disk of it, matches what was asked for."""

    exit_code = 11


class Corrupt(BackyfsError):
    """Stored bytes fail their checksum or are missing.

    `vm`, `revision` and `disk` are names ("" = not known at this place), `offset` is the byte
    offset in the image of the first bad byte range, `length` its length (0 = the whole file).
    `hint`: what to do, if that is not to verify the revision.
    """

    exit_code = 12

    def __init__(
        self,
        reason: str,
        *,
        vm: str = "",
        revision: str = "",
        disk: str = "",
        offset: int = 0,
        length: int = 0,
        hint: str = "",
    ) -> None:
        where = "/".join(part for part in (vm, revision, disk) if part)
        at = f" at byte {offset} (length {length})" if length else ""
        reason = reason.removeprefix("damaged: ")  # that of another such error, told at its place
        super().__init__(
            f"{where + ': ' if where else ''}damaged{at}: {reason}",
            hint=hint or (f"run: backyfs verify -r {revision}" if revision else ""),
        )
        self.reason = reason
        self.vm, self.revision, self.disk = vm, revision, disk
        self.offset, self.length = offset, length


class Mismatch(BackyfsError):
    """A revision was published as distrusted: its source has some of it otherwise."""

    exit_code = 12


class SourceUnavailable(BackyfsError):
    """The source of a backup cannot be opened or read."""

    exit_code = 13


class NoSpace(BackyfsError):
    """The file system of the store is full, or would be."""

    exit_code = 14


class TargetError(BackyfsError):
    """A restore target or mountpoint that cannot be used: too small, in use, not empty."""


class OutputError(BackyfsError):
    """Standard output cannot be written; what the command did before stands."""


class Busy(BackyfsError):
    """Another process holds the writer's lock of this repository."""

    exit_code = 75
