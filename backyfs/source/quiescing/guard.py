"""The guard: a process that freezes a guest for a backup, and thaws it whatever becomes of that.

    python -m backyfs.source.quiescing.guard        the plan as a line on standard input

Then it waits for a line ("thaw") or the end of its input, which comes also when the backup is
killed; for a signal; and for its own clock. On each it thaws and ends. It runs in a session of its
own, and what kills the backup's process group does not reach it.

On standard output, JSON lines for the backup: {"due_s"} before each step (the next line comes
within so many seconds, or the guard hangs), {"log"}, then {"frozen"} or {"failed"}, in the end
{"thawed"}. When nobody reads them any more, what it logs goes to the VM's own log and to syslog:
afterwards, for between freezing and thawing it touches no file that could keep it waiting.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from typing import Any

from backyfs.source.quiescing.contract import NotFrozen
from backyfs.source.quiescing.note import Note
from backyfs.source.quiescing.plan import Plan
from backyfs.source.quiescing.steps import Steps
from backyfs.source.quiescing.waiting import Stopped, Waiting

log = logging.getLogger("backyfs.source.quiescing.guard")

INPUT, OUTPUT = 0, 1
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def main() -> int:
    """Freeze, wait, thaw; 0 if the guest is not frozen in the end."""
    signalled = _noting_signals()
    with open(INPUT, "rb", buffering=0, closefd=False) as stream:  # not a byte more than the line
        plan = Plan.decode(stream.readline())
    backup = _Backup()
    logging.getLogger("backyfs").setLevel(logging.INFO)
    logging.getLogger("backyfs").addHandler(backup)
    try:
        note = Note.write(plan)
    except OSError as exc:
        why = exc.strerror or exc
        backup.tell(failed=f"cannot note in {plan.directory} that the guest gets frozen: {why}")
        backup.tell(thawed=True)
        return 0
    guard = _Guard(plan, backup, signalled)
    try:
        guard.run()
    finally:
        if guard.thawed:
            with contextlib.suppress(OSError):
                note.remove()
        note.close()
        backup.catch_up(plan)
    return 0 if guard.thawed else 1


def _noting_signals() -> int:
    """A descriptor that becomes readable when a signal asks us to end."""
    readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for number in STOPPING:
        signal.signal(number, lambda *_: None)
    return readable


class _Backup(logging.Handler):
    """The process that wants the guest frozen, as long as it is there."""

    def __init__(self) -> None:
        super().__init__()
        self._missed: list[logging.LogRecord] = []
        os.set_blocking(OUTPUT, False)

    def tell(self, **values: Any) -> bool:
        """Write a line; whether it could be."""
        try:
            os.write(OUTPUT, json.dumps(values, default=str).encode() + b"\n")
        except OSError:
            return False
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Let the backup log it; if it is gone, keep it."""
        if not self.tell(log=[record.levelno, record.msg, record.args or {}]):
            self._missed.append(record)

    def catch_up(self, plan: Plan) -> None:
        """Log what the backup did not hear of."""
        if not self._missed:
            return
        import syslog

        from backyfs import log as logs

        syslog.openlog("backyfs", syslog.LOG_PID, syslog.LOG_DAEMON)
        logs.configure(quiet=True)
        with logs.about(plan.vm, plan.directory):
            for record in self._missed:
                severe = record.levelno >= logging.WARNING
                level = syslog.LOG_WARNING if severe else syslog.LOG_INFO
                syslog.syslog(level, f"{plan.vm}: {record.msg} {record.args or ''}".strip())
                record.name = log.name
                logging.getLogger().handle(record)
        logs.shut_down()


class _Guard:
    def __init__(self, plan: Plan, backup: _Backup, signalled: int) -> None:
        self._plan, self._backup, self._signalled = plan, backup, signalled
        self._steps = Steps(plan.quiescers(), lambda due_s: backup.tell(due_s=due_s))
        self.thawed = False

    def run(self) -> None:
        """Freeze, wait, thaw; `thawed` says how it ended."""
        started, why = time.monotonic(), ""
        try:
            done = self._steps.freeze([INPUT, self._signalled])
            why = self._wait() if self._backup.tell(frozen=done) else _GONE
        except NotFrozen as exc:
            why = "" if self._backup.tell(failed=str(exc)) else _GONE
        finally:
            doubt = self._thaw()
            seconds = round(time.monotonic() - started, 3)
            if why:
                log.warning("guest thawed too early", {"reason": why, "seconds": seconds})
            self._backup.tell(thawed=self.thawed, doubt=why or doubt, seconds=seconds)

    def _wait(self) -> str:
        """Wait until the guest is to be thawed; "" = because the backup asks for it."""
        limit_s = self._plan.quiesce.frozen_limit_s
        try:
            Waiting(limit_s, [self._signalled]).for_any([INPUT])
        except Stopped:
            return "the guard of the frozen guest was told to end"
        except TimeoutError:
            return f"the snapshots took longer than {limit_s:g} s (frozen-limit)"
        return "" if os.read(INPUT, 64) else _GONE

    def _thaw(self) -> str:
        """Why the guest may not have been frozen until now; "" = it was."""
        try:
            doubt = self._steps.thaw(self._plan.thaw_s)
            self.thawed = True
        except NotFrozen as exc:
            log.error("the guest may still be frozen", {"reason": str(exc)})
            doubt = str(exc)
        finally:
            self._steps.close()
        return doubt


_GONE = "the backup ended"


if __name__ == "__main__":
    sys.exit(main())
