"""The real world: the system's clocks, repositories on disk, commands as processes.

Commands are the program's own, as an operator would type them: `backyfs -b DIR backup TAGS`. They
outlive a scheduler that is killed: the next one finds the VM busy and comes back.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from backyfs import interpreter
from backyfs.config.job import read_job, write_job
from backyfs.config.site import SiteJob
from backyfs.engine.scheduling import child
from backyfs.engine.scheduling.base import Base
from backyfs.engine.scheduling.history import Revision
from backyfs.engine.scheduling.world import Command, Contents, Kind, Outcome
from backyfs.errors import BackyfsError, ConfigError, NoSpace
from backyfs.model import Consistency, Trust
from backyfs.source import containers
from backyfs.source.quiescing import note
from backyfs.store.identity import lost_in
from backyfs.store.repository import Repository, is_repository, may_be_repository

log = logging.getLogger(__name__)

T = TypeVar("T")

CALLBACK_S = 300.0
"""How long the operator's callback may take."""

THREADS = 2
"""Threads that look at repositories."""


def program() -> list[str]:
    """How to start this program; BACKY_CMD says otherwise."""
    if given := os.environ.get("BACKY_CMD"):
        return shlex.split(given)
    return interpreter.running("backyfs")


class SystemClocks:
    """Time as the system has it."""

    def wall(self) -> float:
        return time.time()

    def steady(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)


class Processes(SystemClocks):
    """The world below `base`. `config` is the site's file, handed on to the commands."""

    def __init__(self, base: Base, config: Path, *, callback: str = "") -> None:
        self.callback = callback
        self._base, self._config = base, config
        self._threads = trio.CapacityLimiter(THREADS)

    async def prepare(self, job: SiteJob) -> None:
        await self._in_thread(_prepare, self._base, job)

    async def settle(self, job: SiteJob) -> None:
        left = note.place(self._directory(job))
        if await self._in_thread(_is_there, left):
            outcome = await self.run(Command(Kind.THAW, job))
            level = logging.ERROR if outcome.code else logging.WARNING
            values = {"job": job.name, "code": outcome.code, "reason": outcome.reason or "-"}
            log.log(level, "guest was left frozen, thawing", values)

    async def contents(self, job: SiteJob) -> Contents:
        return await self._in_thread(_contents, self._base, job)

    async def run(self, command: Command) -> Outcome:
        argv = ["-q", *self._at(command.job), str(command.kind), *command.arguments]
        try:
            return await child.finished([*program(), *argv])
        except OSError as exc:
            return Outcome(1, f"cannot run {program()[0]}: {exc.strerror or exc}")

    async def call_back(self, job: SiteJob) -> None:
        if not self.callback:
            return
        with trio.move_on_after(CALLBACK_S) as scope:
            outcome = await self._callback(job)
            if outcome.code:
                values = {"job": job.name, "code": outcome.code, "reason": outcome.reason}
                log.warning("callback failed", values)
        if scope.cancelled_caught:
            log.warning("callback took too long", {"job": job.name, "limit_s": CALLBACK_S})

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """Call what may wait for a disk that does not answer: it keeps nobody from ending."""
        call = partial(function, *arguments)
        return await trio.to_thread.run_sync(call, limiter=self._threads, abandon_on_cancel=True)

    def _directory(self, job: SiteJob) -> Path:
        return self._base.path / job.name

    def _at(self, job: SiteJob) -> list[str]:
        return ["-c", str(self._config), "-b", str(self._directory(job))]

    async def _callback(self, job: SiteJob) -> Outcome:
        try:
            listing = await child.output([*program(), *self._at(job), "status", "--yaml"])
            return await child.finished([*shlex.split(self.callback), job.name], listing)
        except (OSError, ValueError) as exc:
            return Outcome(1, str(exc))


def _is_there(path: Path) -> bool:
    """False, too, where it cannot be told: what the repository holds is asked next."""
    try:
        return path.exists()
    except OSError:
        return False


def _contents(base: Base, job: SiteJob) -> Contents:
    base.require()
    return contents_of(base.path / job.name)


def contents_of(directory: Path) -> Contents:
    """What the scheduler wants to know of a VM's directory. BackyfsError."""
    try:
        if not may_be_repository(directory):
            return Contents()
        repository = Repository.open(directory)
        bad = len(repository.quarantine.bad()) + len(repository.reports.revisions())
        return Contents(_revisions(repository), bad)
    except OSError as exc:
        raise BackyfsError(f"cannot read {directory}: {exc.strerror or exc}") from exc


def _revisions(repository: Repository) -> list[Revision]:
    """Oldest first. Only down to the newest good one is looked for damage: it costs some files."""
    found = []
    known_good = False
    for record in reversed(repository.revisions()):
        state = repository.state(record)
        relied = state.trust is not Trust.DISTRUSTED
        good = relied and record.consistency is not Consistency.TORN
        if good and not known_good:
            good = known_good = not repository.damage_of(record)
        time, seconds = record.time.timestamp(), record.stats.seconds
        made = Revision(record.id, time, state.tags, seconds, good, relied, state.lasting)
        found.append(made)
    return found[::-1]


def _prepare(base: Base, job: SiteJob) -> None:
    """A repository with an up-to-date job file. BackyfsError."""
    base.require()
    directory = base.path / job.name
    path = directory / "config"
    try:
        if not is_repository(directory):
            if lost_in(directory):  # it is an operator's to decide what becomes of them
                Repository.open(directory)
            Repository.create(directory, job.store)
            log.info("repository made", {"job": job.name, "directory": str(directory)})
            if job.job.source_type == "file":
                for warning in containers.warnings(job.job.settings):
                    log.warning(warning, {"job": job.name})
        elif directory.name not in os.listdir(directory.parent):
            raise ConfigError(
                f"{directory} is the directory of another VM: upper and lower case are one there",
                hint="give one of the two jobs another name",
            )
        wanted = job.job.without_secrets()
        with contextlib.suppress(ConfigError):
            if read_job(path) == wanted:
                return
        write_job(path, wanted)
    except OSError as exc:
        kind = NoSpace if exc.errno in (errno.ENOSPC, errno.EDQUOT) else BackyfsError
        raise kind(f"cannot prepare {directory}: {exc.strerror or exc}") from exc
