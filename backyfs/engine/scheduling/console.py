"""The console: a few commands over telnet, for people. No authentication: keep it local.

Clients, their input and the time they may take are bounded; nothing they send or do not read
holds up the scheduler.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

import trio

from backyfs import __version__
from backyfs.engine.scheduling import state, table
from backyfs.engine.scheduling.scheduler import Scheduler
from backyfs.engine.scheduling.telnet import Lines
from backyfs.engine.scheduling.world import Contents
from backyfs.errors import BackyfsError

log = logging.getLogger(__name__)

CLIENTS_MAX = 16
IDLE_S = 3600.0
"""A client that sends nothing for so long is disconnected."""

SEND_S = 30.0
"""... and one that does not take what it is sent."""

PROMPT = "backyfs> "

HELP = """\
jobs [FILTER]   the jobs; FILTER is a part of the name, or a pattern with * and ?
status          how many jobs do what
run JOB         back the job up now
runall          back all jobs up now
reload          read the configuration again
pools           worker slots: taken, waited for
revisions JOB   the revisions of the job's VM
help            this list
quit            end the connection"""


@dataclass(frozen=True)
class Actions:
    """What the console does that is not the scheduler's: re-reading the file, reading a VM."""

    reload: Callable[[], Awaitable[str]]
    contents: Callable[[str], Awaitable[Contents]]


class Console:
    """Answers commands about one scheduler."""

    def __init__(self, scheduler: Scheduler, actions: Actions) -> None:
        self._scheduler, self._actions = scheduler, actions
        self._clients = 0

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Talk to one client until it leaves."""
        self._clients += 1
        try:
            if self._clients > CLIENTS_MAX:
                await _send(stream, "too many clients, try again later\n")
            else:
                await self._talk(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass  # the client went away, or sleeps
        finally:
            self._clients -= 1

    async def _talk(self, stream: trio.abc.Stream) -> None:
        lines = Lines()
        await _send(stream, f"backyfs {__version__}\nReady.\n\n{PROMPT}")
        while not lines.ended:
            with trio.fail_after(IDLE_S):
                data = await stream.receive_some(4096)
            if not data:
                return
            found, answer = lines.feed(bytes(data))
            if answer:
                await _send_bytes(stream, answer)
            for line in found:
                reply = await self.answer(line)
                if reply is None:
                    return
                await _send(stream, f"{reply}\n{PROMPT}" if reply else PROMPT)

    async def answer(self, line: str) -> str | None:
        """What to say to a line; None: the client wants to leave."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if not name:
            return ""
        if name in ("quit", "exit"):
            return None
        try:
            return await self._command(name, argument)
        except BackyfsError as exc:
            return exc.message

    async def _command(self, name: str, argument: str) -> str:
        match name:
            case "jobs":
                return self._jobs(argument)
            case "status":
                return self._status()
            case "pools":
                return self._pools()
            case "run":
                return self._run(argument)
            case "runall":
                return self._run_all()
            case "reload":
                return await self._actions.reload()
            case "revisions":
                return await self._revisions(argument)
            case "help":
                return HELP
        return "no such command. (help lists them)"

    def _jobs(self, pattern: str) -> str:
        jobs = self._scheduler.jobs
        rows = [
            state.row(jobs[name])
            for name in sorted(jobs)
            if not pattern or table.selected(name, pattern)
        ]
        return f"{table.jobs_table(rows, _zone())}\n{table.counted(len(jobs), len(rows))}"

    def _status(self) -> str:
        counts: dict[str, int] = {}
        for job in self._scheduler.jobs.values():
            counts[str(job.status)] = counts.get(str(job.status), 0) + 1
        late = sum(1 for job in self._scheduler.jobs.values() if job.overdue_s())
        rows = [[status, str(count)] for status, count in sorted(counts.items())]
        return table.piped(("Status", "#"), [*rows, ["SLA: TOO OLD", str(late)]])

    def _pools(self) -> str:
        pools = [*self._scheduler.pools.values(), *(lane.pool for lane in self._scheduler.lanes)]
        rows = [[p.name, str(p.limit), str(p.running), str(p.waiting)] for p in pools]
        return table.piped(("Pool", "Slots", "Taken", "Waiting"), rows)

    def _run(self, name: str) -> str:
        if not name:
            return "run what? run JOB"
        if self._scheduler.trigger(name):
            return f"Triggered immediate run for {name}"
        return f"{name} runs, or waits for a slot, already"

    def _run_all(self) -> str:
        names = sorted(self._scheduler.jobs)
        triggered = sum(self._scheduler.trigger(name) for name in names)
        return f"Triggered immediate run for {triggered} of {len(names)} jobs"

    async def _revisions(self, name: str) -> str:
        if name not in self._scheduler.jobs:
            return f"Unknown job {name}" if name else "of what? revisions JOB"
        contents = await self._actions.contents(name)
        rows = [
            [
                table.local(state.iso(revision.time)),
                revision.id,
                table.span(revision.seconds),
                ", ".join(revision.tags) or "-",
            ]
            for revision in contents.revisions
        ]
        count = f"{len(rows)} revision{'' if len(rows) == 1 else 's'}"
        header = (f"Date ({_zone()})", "ID", "Duration", "Tags")
        return f"{table.piped(header, rows)}\n{count}" if rows else count


def _zone() -> str:
    return datetime.now().astimezone().tzname() or "local time"


async def _send(stream: trio.abc.Stream, text: str) -> None:
    await _send_bytes(stream, text.replace("\n", "\r\n").encode("utf-8", "replace"))


async def _send_bytes(stream: trio.abc.Stream, data: bytes) -> None:
    with trio.fail_after(SEND_S):
        await stream.send_all(data)
