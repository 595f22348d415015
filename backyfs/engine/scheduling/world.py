"""What the scheduler needs of the world. `processes` is the real one; a simulation has its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from backyfs.config.site import SiteJob
from backyfs.engine.scheduling.history import Revision


class Kind(StrEnum):
    """What a command does; also its name on the command line."""

    BACKUP = "backup"
    PURGE = "purge"
    VERIFY = "verify"
    SCRUB = "scrub"
    THAW = "thaw"


@dataclass(frozen=True, slots=True)
class Command:
    """A command of the program for one VM."""

    kind: Kind
    job: SiteJob
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended: exit code (negative: by that signal) and what it said, one line."""

    code: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a VM's directory holds: revisions, oldest first; how much evidence of what is wrong
    (quarantined frames, reports of mismatches).
    """

    revisions: Sequence[Revision] = ()
    quarantined: int = 0


class Clocks(Protocol):
    """Time."""

    def wall(self) -> float:
        """UTC in seconds since 1970; jumps when the clock is set."""

    def steady(self) -> float:
        """Seconds since some moment, also while the machine sleeps; never jumps."""


class World(Clocks, Protocol):
    """Time, repositories and processes. BackyfsError is the only error that may come out."""

    async def prepare(self, job: SiteJob) -> None:
        """Make the VM's directory a repository, if it is none, and write its job file."""

    async def settle(self, job: SiteJob) -> None:
        """Thaw the VM's guest, should a killed backup have left it frozen; only logged."""

    async def contents(self, job: SiteJob) -> Contents:
        """What is there; nothing, when there is no repository yet."""

    async def run(self, command: Command) -> Outcome:
        """Run a command to its end. Cancelled: end it, wait for it, then raise."""

    async def call_back(self, job: SiteJob) -> None:
        """Run the operator's command after a backup; whatever it does is only logged."""
