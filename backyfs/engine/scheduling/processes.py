"""The real world: the system's clocks, repositories on disk, commands as processes.

Commands are the program's own, as an operator would type them: `backyfs -b DIR backup TAGS`. They
run in a session of their own, so that a Ctrl-C meant for the scheduler does not reach them, and
outlive a scheduler that is killed: the next one finds the VM busy and comes back.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from backyfs import interpreter
from backyfs.config.job import read_job, write_job
from backyfs.config.site import SiteJob
from backyfs.engine.scheduling.history import Revision
from backyfs.engine.scheduling.world import Command, Contents, Kind, Outcome
from backyfs.errors import ConfigError, NoSpace
from backyfs.model import Consistency, Trust
from backyfs.source import containers
from backyfs.source.quiescing import note
from backyfs.store.repository import Repository, is_repository

log = logging.getLogger(__name__)

TAIL_BYTES = 8192
"""How much of what a command says on stderr is kept: its end."""

GRACE_S = 30.0
"""How long a command may take to end after SIGTERM, before SIGKILL."""

LAST_WORDS_S = 1.0
"""How long stderr is read after a command has ended."""

CALLBACK_S = 300.0
"""How long the operator's callback may take."""

THREADS = 2
"""Threads that look at repositories."""


def program() -> list[str]:
    """How to start this program; BACKY_CMD says otherwise."""
    if given := os.environ.get("BACKY_CMD"):
        return shlex.split(given)
    return interpreter.running("backyfs")


class Processes:
    """The world below `base_dir`. `config` is the site's file, handed on to the commands."""

    def __init__(self, base_dir: Path, config: Path, *, callback: str = "") -> None:
        self.callback = callback
        self._base_dir, self._config = base_dir, config
        self._threads = trio.CapacityLimiter(THREADS)

    def wall(self) -> float:
        return time.time()

    def steady(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def prepare(self, job: SiteJob) -> None:
        directory = self._directory(job)
        await trio.to_thread.run_sync(_prepare, directory, job, limiter=self._threads)

    async def settle(self, job: SiteJob) -> None:
        left = note.place(self._directory(job))
        if await trio.to_thread.run_sync(_is_there, left, limiter=self._threads):
            outcome = await self.run(Command(Kind.THAW, job))
            level = logging.ERROR if outcome.code else logging.WARNING
            values = {"job": job.name, "code": outcome.code, "reason": outcome.reason or "-"}
            log.log(level, "guest was left frozen, thawing", values)

    async def contents(self, job: SiteJob) -> Contents:
        directory = self._directory(job)
        return await trio.to_thread.run_sync(contents_of, directory, limiter=self._threads)

    async def run(self, command: Command) -> Outcome:
        argv = ["-q", *self._at(command.job), str(command.kind), *command.arguments]
        try:
            return await _finished([*program(), *argv])
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

    def _directory(self, job: SiteJob) -> Path:
        return self._base_dir / job.name

    def _at(self, job: SiteJob) -> list[str]:
        return ["-c", str(self._config), "-b", str(self._directory(job))]

    async def _callback(self, job: SiteJob) -> Outcome:
        try:
            listing = await trio.run_process(
                [*program(), *self._at(job), "status", "--yaml"],
                capture_stdout=True,
                stderr=subprocess.DEVNULL,
                check=False,
                start_new_session=True,
            )
            argv = [*shlex.split(self.callback), job.name]
            return await _finished(argv, listing.stdout)
        except (OSError, ValueError) as exc:
            return Outcome(1, str(exc))


async def _finished(argv: Sequence[str], given: bytes = b"") -> Outcome:
    """Run a program to its end; the last line it says on stderr is the reason. OSError."""
    tail = bytearray()
    start = partial(
        trio.run_process,
        list(argv),
        stdin=given or subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
        start_new_session=True,
        deliver_cancel=_end,
    )
    try:
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(start)
            nursery.start_soon(_keep_tail, process, tail)
            await process.wait()
            # Something it left behind may hold its stderr open for ever.
            nursery.cancel_scope.deadline = trio.current_time() + LAST_WORDS_S
    except BaseExceptionGroup as group:
        raise _first(group) from None
    code = process.returncode or 0
    return Outcome(code, _reason(bytes(tail)) if code >= 0 else _death(-code, bytes(tail)))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error in what a nursery raises, else one Cancelled: callers know both without a group."""
    found: BaseException = group.split(trio.Cancelled)[1] or group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


async def _keep_tail(process: trio.Process, tail: bytearray) -> None:
    """Read what the process says on stderr, and keep the end of it."""
    assert process.stderr is not None
    async for data in process.stderr:
        tail += data
        del tail[:-TAIL_BYTES]


async def _end(process: trio.Process) -> None:
    """Ask a process to stop; after a while, kill it with what it started."""
    with contextlib.suppress(OSError):
        process.terminate()
        await trio.sleep(GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)


def _is_there(path: Path) -> bool:
    """False, too, where it cannot be told: what the repository holds is asked next."""
    try:
        return path.exists()
    except OSError:
        return False


def _reason(tail: bytes) -> str:
    """What a command said of its failure: its last line that is an error, without the program."""
    lines = [line for line in tail.decode("utf-8", "replace").splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("backyfs: ") and ": warning:" not in line]
    return (ours or lines or [""])[-1].removeprefix("backyfs: ").strip()[:500]


def _death(number: int, tail: bytes) -> str:
    """Which signal ended a command, and the last it said."""
    with contextlib.suppress(ValueError):
        said = _reason(tail)
        return f"killed by {signal.Signals(number).name}" + (f": {said}" if said else "")
    return f"killed by signal {number}"


def contents_of(directory: Path) -> Contents:
    """What the scheduler wants to know of a VM's directory. BackyfsError."""
    try:
        if not is_repository(directory):
            return Contents()
        repository = Repository.open(directory)
        bad = len(repository.quarantine.bad()) + len(repository.reports.revisions())
        return Contents(_revisions(repository), bad)
    except OSError as exc:
        raise ConfigError(f"cannot read {directory}: {exc.strerror or exc}") from exc


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


def _prepare(directory: Path, job: SiteJob) -> None:
    """A repository with an up-to-date job file. BackyfsError."""
    path = directory / "config"
    try:
        if not is_repository(directory):
            if not directory.parent.is_dir():
                raise ConfigError(f"the base directory {directory.parent} does not exist")
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
        kind = NoSpace if exc.errno in (errno.ENOSPC, errno.EDQUOT) else ConfigError
        raise kind(f"cannot prepare {directory}: {exc.strerror or exc}") from exc
