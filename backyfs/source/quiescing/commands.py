"""The operator's own programs for freezing and thawing; no shell, unless they name one.

They run in a process group each, within the guard's session: who runs longer than allowed is
killed with all it started. Environment: BACKYFS_ACTION (freeze or thaw), BACKYFS_VM,
BACKYFS_REVISION, BACKYFS_DIRECTORY (the VM's). Standard input is empty; what they print is logged.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence

from backyfs.log import one_line
from backyfs.source.quiescing.contract import NotFrozen
from backyfs.source.quiescing.waiting import Stopped, Waiting

log = logging.getLogger(__name__)

OUTPUT_MAX = 4096
"""Bytes of what a command prints that are kept: the end."""


_KILLED_S = 1.0


class Commands:
    """A Quiescer: one command to freeze, one to thaw, each with `timeout_s` seconds."""

    def __init__(
        self,
        freeze: Sequence[str],
        thaw: Sequence[str],
        environment: Mapping[str, str],
        timeout_s: float,
    ) -> None:
        self._freeze, self._thaw = list(freeze), list(thaw)
        self._environment, self._timeout_s = environment, timeout_s
        self._frozen = False

    @property
    def patience_s(self) -> float:
        return self._timeout_s + 5.0

    def prepare(self, stops: Sequence[int] = ()) -> None:
        """See whether both can be run: what cannot be thawed is not frozen."""
        for argv in (self._freeze, self._thaw):
            if shutil.which(argv[0]) is None:
                raise NotFrozen(f"cannot run {argv[0]}: no such program")

    def freeze(self, stops: Sequence[int] = ()) -> str:
        self._frozen = False
        self._run("freeze", self._freeze, stops)
        self._frozen = True
        return "freeze-command"

    def thaw(self) -> str:
        self._run("thaw", self._thaw, ())
        return "" if self._frozen else "the freeze-command failed"

    def close(self) -> None:
        """Nothing is open."""

    def _run(self, action: str, argv: Sequence[str], stops: Sequence[int]) -> None:
        environment = {**os.environ, **self._environment, "BACKYFS_ACTION": action}
        try:
            output, code = _finished(argv, environment, Waiting(self._timeout_s, stops))
        except Stopped:
            raise NotFrozen(f"stopped while the {action}-command ran") from None
        except TimeoutError:
            raise NotFrozen(f"the {action}-command ran longer than {self._timeout_s:g} s") from None
        except (OSError, ValueError) as exc:
            raise NotFrozen(f"cannot run {argv[0]}: {exc}") from exc
        lines = output.decode("utf-8", "replace").split("\n")
        said = one_line(" | ".join(" ".join(line.split()) for line in lines if line.strip()))
        log.info("command ended", {"action": action, "code": code, "output": said})
        if code:
            how = f"exited {code}" if code > 0 else f"was killed by signal {-code}"
            raise NotFrozen(f"the {action}-command {how}" + (said and f": {said[-300:]}"))


def _finished(
    argv: Sequence[str], environment: Mapping[str, str], waiting: Waiting
) -> tuple[bytes, int]:
    """The end of the output, and the exit code. When waiting ends too soon, the group is killed."""
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd="/",
        process_group=0,
    )
    assert process.stdout is not None
    ended = os.pidfd_open(process.pid)
    with process.stdout:
        try:
            return _output(process.stdout.fileno(), ended, waiting), process.wait()
        except BaseException:
            _kill(process)
            raise
        finally:
            os.close(ended)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process group. Who waits for a dead disk does not even die: it is not waited for."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_KILLED_S)


def _output(pipe: int, ended: int, waiting: Waiting) -> bytes:
    """What is printed until the process has ended, whoever else may hold the pipe open."""
    os.set_blocking(pipe, False)
    output, wanted = bytearray(), [pipe, ended]
    while True:
        ready = waiting.for_any(wanted)
        try:
            data = os.read(pipe, 65536)
            output += data
            del output[:-OUTPUT_MAX]
        except BlockingIOError:
            data = None
        if data:
            continue
        if ended in ready:
            return bytes(output)
        if data is not None:  # it closed its output, and goes on
            wanted = [ended]
