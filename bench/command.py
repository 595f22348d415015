"""Running a program and what it cost: wall time, processor time, memory.

A step starts when its process is started and ends when the process is gone, so process start is
part of every figure. Costs are of whole process trees: `wait4` adds what waited-for children used,
and gives the peak memory of the largest process. That peak cannot be below the bench's own size
(about 20 MiB), which a child has for the moment between fork and exec.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

DEADLINE_S = 1800.0
_WORDS_MAX = 300


class CommandFailed(Exception):
    """A program was absent, ended with another exit code than 0, or took too long."""


@dataclass(frozen=True, slots=True)
class Command:
    """A program to run. Output goes to `stdout`, a file that is replaced (None: /dev/null)."""

    argv: tuple[str, ...]
    stdout: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None

    def __str__(self) -> str:
        return " ".join(self.argv)


def command(*argv: str | Path) -> Command:
    """A command with no particular environment whose output is thrown away."""
    return Command(tuple(map(str, argv)))


@dataclass(frozen=True, slots=True)
class Cost:
    """What steps took: seconds of wall and processor time, peak bytes of the largest process."""

    wall_s: float
    cpu_s: float
    rss_bytes: int


class Process:
    """A started program. `finish` waits for it, once."""

    def __init__(self, what: Command) -> None:
        self._what = what
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by finish()
        self._cost: Cost | None = None
        self._started = time.perf_counter()
        try:
            self._child = _start(what, self._errors)
        except OSError as exc:
            self._errors.close()
            raise CommandFailed(f"{what.argv[0]}: {exc.strerror}") from exc

    @property
    def pid(self) -> int:
        """Process number."""
        return self._child.pid

    @property
    def cpu_s(self) -> float:
        """User and system time of it and what it started, so far; the program must run."""
        return sum(map(_cpu_ticks, _tree(self.pid))) / os.sysconf("SC_CLK_TCK")

    @property
    def peak_bytes(self) -> int:
        """Its peak memory so far; 0 when it has ended."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return 0
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        return int(found[1]) * 1024 if found else 0

    def wait(self, deadline_s: float) -> bool:
        """Whether the program ended within `deadline_s` seconds."""
        if self._child.returncode is not None:
            return True
        pidfd = os.pidfd_open(self._child.pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            return bool(poll.poll(deadline_s * 1000))
        finally:
            os.close(pidfd)

    def kill(self) -> None:
        """End it at once; before `finish`."""
        os.kill(self._child.pid, signal.SIGKILL)

    def terminate(self) -> None:
        """Ask it to end; before `finish`."""
        # Not Popen.terminate(), which may take the child's exit status away from wait4().
        os.kill(self._child.pid, signal.SIGTERM)

    def finish(self, deadline_s: float = DEADLINE_S, *, check: bool = True) -> Cost:
        """Wait for the end and return the cost; again, if asked again.

        With `check` an exit code other than 0 raises CommandFailed with the program's last words.
        """
        if self._cost:
            return self._cost
        in_time = self.wait(deadline_s)
        if not in_time:
            self._child.kill()
        _, status, usage = os.wait4(self._child.pid, 0)
        wall_s = time.perf_counter() - self._started
        self._child.returncode = os.waitstatus_to_exitcode(status)
        cpu_s = usage.ru_utime + usage.ru_stime
        self._cost = Cost(wall_s, cpu_s, usage.ru_maxrss * 1024)
        with self._errors:
            if not in_time:
                raise CommandFailed(f"{self._what}: not done after {deadline_s:.0f} s")
            if check and self._child.returncode:
                code, words = self._child.returncode, _last_words(self._errors)
                raise CommandFailed(f"{self._what}: exit code {code}: {words}")
        return self._cost


def _tree(pid: int) -> Iterator[int]:
    """A process, its children, theirs …"""
    yield pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    for child in children.read_text().split() if children.exists() else ():
        yield from _tree(int(child))


def _cpu_ticks(pid: int) -> int:
    # Behind the name, which is in brackets: fields 14 and 15 of proc(5).
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _start(what: Command, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    with _output(what.stdout) as stdout:
        return subprocess.Popen(
            what.argv,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=errors,
            env={**os.environ, **what.env},
            cwd=what.cwd,
        )


@contextmanager
def _output(target: Path | None) -> Iterator[int | IO[bytes]]:
    if target is None:
        yield subprocess.DEVNULL
        return
    with target.open("wb") as stream:
        yield stream


def _last_words(errors: IO[bytes]) -> str:
    """The last lines a program wrote to its standard error, as one."""
    errors.seek(0)
    lines = errors.read()[-1000:].decode(errors="replace").split("\n")
    return " / ".join(line.strip() for line in lines if line.strip())[-_WORDS_MAX:]


def run(steps: Sequence[Command]) -> Cost:
    """Run commands one after the other; wall time is from the first start to the last end."""
    started = time.perf_counter()
    costs = [Process(step).finish() for step in steps]
    return Cost(
        time.perf_counter() - started,
        sum(cost.cpu_s for cost in costs),
        max((cost.rss_bytes for cost in costs), default=0),
    )


def durable(place: Path) -> Command:
    """The step that ends every measurement that writes files: all of them are on the disk."""
    return command("sync", "-f", place)
