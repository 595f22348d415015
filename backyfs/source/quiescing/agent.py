"""QEMU's guest agent: JSON lines over the unix socket of the virtio channel org.qemu.guest_agent.0.

The protocol is that of qemu-ga (QEMU's docs/interop/qemu-ga-ref): one client at a time, no banner,
no events. Each connection begins with the byte 0xFF, which clears half a command that a dead
client left, and `guest-sync-delimited`: everything before its answer is stale and dropped. After
any fault the connection is given up; the next call makes, and synchronises, a new one. Since the
agent answers in order, a synchronised connection also proves that an earlier command is over.

While a guest is frozen the agent refuses all but ping, info, sync, status and thaw.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backyfs.log import one_line
from backyfs.source.quiescing.contract import NotFrozen
from backyfs.source.quiescing.lines import Lines
from backyfs.source.quiescing.waiting import Stopped, Waiting

ANSWER_S = 5.0
"""How long the agent may take for an answer, freezing apart."""

QUEUE_S = 75.0
"""How long another process of ours may keep the agent busy: a default freeze, and a little."""

_POLL_S = 0.05
_FILE_SYSTEMS_END = 1 << 16
_FREEZE, _FREEZE_LIST = "guest-fsfreeze-freeze", "guest-fsfreeze-freeze-list"
_THAW, _STATUS = "guest-fsfreeze-thaw", "guest-fsfreeze-status"
_SYNC = "guest-sync-delimited"
_MARK = b"\xff"


class Refused(NotFrozen):
    """The agent's answer is an error; the connection is sound."""


class GuestAgent:
    """A Quiescer. `mountpoints` (none: all) as the guest calls them.

    `freeze_timeout_s` bounds freezing, `answer_s` everything else.

    Keeps the connection from `prepare` to `close`: as long as it is open nobody else is answered,
    so that nobody else can thaw.
    """

    def __init__(
        self,
        path: Path,
        mountpoints: Sequence[str] = (),
        freeze_timeout_s: float = 60.0,
        answer_s: float = ANSWER_S,
    ) -> None:
        self._path, self._mountpoints = path, list(mountpoints)
        self._freeze_timeout_s, self._answer_s = freeze_timeout_s, answer_s
        self._queue: socket.socket | None = None
        self._connection: _Connection | None = None
        self._frozen = -1
        """How many file systems the last freeze said it froze; -1: it did not say."""

    @property
    def patience_s(self) -> float:
        return max(QUEUE_S, self._freeze_timeout_s) + 6 * self._answer_s

    def prepare(self, stops: Sequence[int] = ()) -> None:
        self._stand_in_line(stops)
        if self._call(_STATUS, stops=stops) != "thawed":
            raise NotFrozen("the guest is frozen already, by somebody else")
        self._refuse_disabled(stops)

    def freeze(self, stops: Sequence[int] = ()) -> str:
        self._frozen = -1
        arguments = {"mountpoints": self._mountpoints} if self._mountpoints else None
        command = _FREEZE_LIST if arguments else _FREEZE
        count = self._call(command, arguments, limit_s=self._freeze_timeout_s, stops=stops)
        if type(count) is not int or not 0 <= count < _FILE_SYSTEMS_END:
            raise NotFrozen(f"the guest agent answers {count!r:.100} to {command}")
        self._frozen = count
        if not count:
            raise NotFrozen("the guest agent found no file system to freeze")
        return f"{count} file system{'s' if count > 1 else ''}"

    def thaw(self) -> str:
        doubt = self._doubt()
        try:
            count = self._call(_THAW)
        except Refused as exc:  # Windows: VSS gave up holding writes by itself, and says so now
            doubt, count = doubt or f"thawing: {exc}", self._frozen
        if (status := self._call(_STATUS)) != "thawed":
            raise NotFrozen(f"the guest agent says {status!r:.100} after thawing")
        if not doubt and (type(count) is not int or count < self._frozen):
            doubt = f"of {self._frozen} file systems only {count!r:.100} were still frozen"
        return doubt

    def _doubt(self) -> str:
        """Why the guest may not have been frozen all the time; "" = it is, as far as it says."""
        if self._frozen < 0:
            return "it is not known to have been frozen"
        if self._connection is None:
            return "the connection to the guest agent was lost meanwhile"
        with contextlib.suppress(NotFrozen):
            status = self._call(_STATUS)
            return "" if status == "frozen" else "the guest was thawed meanwhile"
        return "the guest agent did not answer"

    def close(self) -> None:
        self._hang_up()
        if self._queue is not None:
            self._queue.close()
            self._queue = None

    def _stand_in_line(self, stops: Sequence[int]) -> None:
        """Wait for other processes of ours at this agent.

        An abstract name is the lock: it goes with its process. Who keeps it too long is ignored:
        if it does talk to the agent, the agent will not answer us.
        """
        self._queue = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        digest = hashlib.sha256(os.path.realpath(self._path).encode()).hexdigest()[:32]
        end = time.monotonic() + QUEUE_S
        while time.monotonic() < end:
            try:
                self._queue.bind(f"\0backyfs/agent/{digest}")
                return
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE:
                    return
            with _told("another backup at the guest agent"), contextlib.suppress(TimeoutError):
                Waiting(_POLL_S, stops).for_any([])

    def _refuse_disabled(self, stops: Sequence[int]) -> None:
        try:
            info = self._call("guest-info", stops=stops)
        except Refused:
            return  # an agent that hides even this; freezing will tell
        listed = info.get("supported_commands") if isinstance(info, Mapping) else None
        enabled = {
            command.get("name"): command.get("enabled", True)
            for command in listed or ()
            if isinstance(command, Mapping)
        }
        for command in (_FREEZE_LIST if self._mountpoints else _FREEZE, _THAW, _STATUS):
            if enabled and not enabled.get(command):
                raise NotFrozen(f"the guest agent does not allow {command}")

    def _call(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        limit_s: float = 0.0,
        stops: Sequence[int] = (),
    ) -> Any:
        """What the agent returns within `limit_s` seconds (0: as usual).

        Refused: an error; NotFrozen: no sensible answer.
        """
        limit = limit_s or self._answer_s
        with _told(f"the guest agent ({command})"):
            if self._connection is None:
                self._connection = self._connected(stops)
            try:
                return self._connection.call(command, arguments, Waiting(limit, stops))
            except Refused:
                raise
            except BaseException:
                self._hang_up()
                raise

    def _connected(self, stops: Sequence[int]) -> _Connection:
        connection = _Connection(self._path)
        try:
            with _told("the guest agent (is it running in the guest, is the VM paused?)"):
                connection.synchronise(Waiting(self._answer_s, stops))
        except BaseException:
            connection.close()
            raise
        return connection

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@contextlib.contextmanager
def _told(who: str) -> Iterator[None]:
    """Whatever can go wrong on a socket as NotFrozen, in words."""
    try:
        yield
    except Stopped:
        raise NotFrozen("stopped while freezing") from None
    except TimeoutError as exc:
        raise NotFrozen(f"{who}: {exc}") from exc
    except (EOFError, ValueError, OSError) as exc:
        raise NotFrozen(f"{who}: {getattr(exc, 'strerror', None) or exc}") from exc


class _Connection:
    """One connection to an agent; any error but Refused leaves it unusable."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            self._socket.connect(str(path))
        except OSError as exc:
            self._socket.close()
            raise NotFrozen(f"cannot reach the guest agent: {path}: {_why(exc)}") from exc
        self._lines = Lines(self._socket.fileno())

    def synchronise(self, waiting: Waiting) -> None:
        """Drop everything that is not the answer to this question."""
        number = secrets.randbelow(1 << 53)
        self._send(_MARK + _encoded(_SYNC, {"id": number}), waiting)
        while True:
            self._lines.until(_MARK, waiting)
            with contextlib.suppress(ValueError, Refused):
                if _value(self._lines.line(waiting)) == number:
                    return

    def call(self, command: str, arguments: Mapping[str, Any] | None, waiting: Waiting) -> Any:
        self._send(_encoded(command, arguments), waiting)
        return _value(self._lines.line(waiting))

    def _send(self, data: bytes, waiting: Waiting) -> None:
        while data:
            waiting.for_any([self._socket.fileno()], writable=True)
            with contextlib.suppress(BlockingIOError):
                data = data[self._socket.send(data, socket.MSG_NOSIGNAL) :]

    def close(self) -> None:
        self._socket.close()


def _encoded(command: str, arguments: Mapping[str, Any] | None) -> bytes:
    value = {"execute": command} | ({"arguments": dict(arguments)} if arguments else {})
    return json.dumps(value).encode() + b"\n"


def _value(line: bytes) -> Any:
    """What a line of the agent returns. Refused: it is an error; ValueError: it is no answer."""
    try:
        answer = json.loads(line)
    except RecursionError as exc:
        raise ValueError("an answer nobody can read") from exc
    except ValueError as exc:
        raise ValueError(f"an answer that is no JSON ({line[:60]!r})") from exc
    if isinstance(answer, Mapping) and isinstance(error := answer.get("error"), Mapping):
        said = " ".join(str(error.get("desc")).split())[:300]
        raise Refused(f"the guest agent says: {one_line(said)}")
    if not isinstance(answer, Mapping) or "return" not in answer:
        raise ValueError(f"an answer that is none ({line[:60]!r})")
    return answer["return"]


def _why(exc: OSError) -> str:
    if exc.errno == errno.ECONNREFUSED:
        return "nobody listens there (does the VM run?)"
    if exc.errno == errno.EAGAIN:
        return "somebody else talks to it"
    return exc.strerror or str(exc)
