"""The backup's side of a freeze: starts the guard, asks it to thaw, and thaws itself if it must.

The guard says of each step how long it may take. One that is silent for longer, or dead, is killed
with all it started, and thawing is done here. So a guest is thawed whichever of the two processes
fails; if both do, the note tells the next one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from backyfs import interpreter
from backyfs.source.cancelling import checkpoint
from backyfs.source.quiescing import leftover
from backyfs.source.quiescing.contract import NotFrozen
from backyfs.source.quiescing.lines import Lines
from backyfs.source.quiescing.note import Note
from backyfs.source.quiescing.plan import Plan
from backyfs.source.quiescing.waiting import Waiting

log = logging.getLogger(__name__)

START_S = 30.0
"""How long a guard may take to say its first word, on a busy host."""

PROMPT_S = 10.0
"""How long it may take to react, beyond what it says that a step takes."""


class Freeze:
    """One guest, frozen for one snapshot. Use as a context manager: leaving it thaws.

    Entering never raises because a guest cannot be frozen (see `failure`), only because the backup
    is cancelled meanwhile; then the guest is thawed before.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._guard: _Guard | None = None
        self.what = ""
        """What was frozen, in words; "" = nothing."""
        self.failure = ""
        """Why the guest was not frozen, or why that is not known; "" = it was, all the time."""
        self.stuck = ""
        """Why the guest may still be frozen; "" = it is not."""
        self.seconds = 0.0
        """From the beginning of freezing until the guest was thawed."""

    def __enter__(self) -> Freeze:
        try:
            self._guard = _Guard(self._plan)
        except OSError as exc:
            self.failure = f"cannot start the guard of a frozen guest: {exc.strerror or exc}"
            return self
        try:
            self.what = self._guard.frozen()
        except NotFrozen as exc:
            self.failure = str(exc)
            self._finish()
        except BaseException:
            self._finish()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._guard is not None:
            self._finish()

    def _finish(self) -> None:
        """See to it that the guest is thawed."""
        assert self._guard is not None
        guard, self._guard = self._guard, None
        try:
            told = guard.thawed()
            self.seconds = float(told.get("seconds") or 0.0)
            self.failure = self.failure or str(told.get("doubt") or "")
            self.stuck = "" if told.get("thawed") else self.failure or "not known"
        except (_Hanging, EOFError) as exc:
            self.failure = self.failure or f"the guard of the frozen guest {exc}"
            log.warning("taking over from the guard", {"reason": str(exc)})
            guard.kill()
            self._take_over()
        finally:
            guard.close()

    def _take_over(self) -> None:
        """Thaw in place of the guard."""
        try:
            note = Note.left(self._plan.directory, PROMPT_S)
            if note is not None:  # else the guard had not begun, or was done
                leftover.thaw_noted(note, self._plan)
        except BlockingIOError:
            self.stuck = "its guard cannot be killed"
        except (NotFrozen, OSError) as exc:
            self.stuck = str(exc)


class _Hanging(Exception):
    """The guard does not do what it said it would."""


def _no_check() -> None:
    """Thawing is waited for whatever happens."""


class _Guard:
    """The guard's process, as we see it."""

    def __init__(self, plan: Plan) -> None:
        self._process = subprocess.Popen(
            interpreter.running("backyfs.source.quiescing.guard"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=interpreter.environment(),
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._lines = Lines(self._process.stdout.fileno())
        self._due_s = START_S
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(plan.encode())
            self._process.stdin.flush()

    def frozen(self) -> str:
        """Wait until the guest is frozen; returns what was. NotFrozen."""
        try:
            told = self._told("frozen", "failed", check=checkpoint)
        except (_Hanging, EOFError) as exc:
            raise NotFrozen(f"the guard of the frozen guest {exc}") from exc
        if "failed" in told:
            raise NotFrozen(str(told["failed"]))
        return str(told["frozen"])

    def thawed(self) -> dict[str, Any]:
        """Ask for the guest to be thawed, and wait for it. _Hanging, EOFError."""
        assert self._process.stdin is not None
        self._due_s = 0.0
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"thaw\n")
            self._process.stdin.flush()
        return self._told("thawed")

    def _told(self, *words: str, check: Callable[[], None] = _no_check) -> dict[str, Any]:
        """What the guard says with one of these words; its log becomes ours."""
        while True:
            value = self._next(check)
            if "due_s" in value:
                self._due_s = float(value["due_s"])
            elif "log" in value:
                level, text, values = value["log"]
                log.log(level, text, values)
            elif any(word in value for word in words):
                return value

    def _next(self, check: Callable[[], None]) -> dict[str, Any]:
        """The next thing it says; meanwhile `check`, about once a second, may end the waiting."""
        end = time.monotonic() + self._due_s + PROMPT_S
        while time.monotonic() < end:
            try:
                value: dict[str, Any] = json.loads(self._lines.line(Waiting(1.0)))
                return value
            except TimeoutError:
                check()
            except EOFError as exc:
                raise EOFError("died") from exc
            except (ValueError, OSError) as exc:
                raise _Hanging(f"cannot be understood: {exc}") from exc
        raise _Hanging(f"is silent for {self._due_s + PROMPT_S:g} s")

    def kill(self) -> None:
        """Kill it with everything in its session, such as commands."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        # Not reaped yet: until then nobody else can have its number, as process or as session.
        for process in _session(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PROMPT_S)

    def close(self) -> None:
        """Let it go; what it has still to do (its note, its log) it does without us."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        try:
            self._process.wait(PROMPT_S)
        except subprocess.TimeoutExpired:
            _let_go.append(self._process)


_let_go: list[subprocess.Popen[bytes]] = []
"""Guards that still had something to do when their backup went on; nobody waits for them."""


def _session(number: int) -> Iterator[int]:
    """The processes of a session."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                stat = (entry / "stat").read_text()
                if int(stat.rpartition(")")[2].split()[3]) == number:
                    yield int(entry.name)
