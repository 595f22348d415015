"""QEMU's monitor, for tests: commands in order, events as they come."""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

PATIENCE_S = 60.0


class MonitorError(Exception):
    """A command was refused, or what was waited for did not come."""


class Monitor:
    """A connection to the monitor of a QEMU that listens on a unix socket, or soon will."""

    def __init__(self, path: Path) -> None:
        self._socket = _connected(path)
        self._socket.settimeout(PATIENCE_S)
        self._stream = self._socket.makefile("rb")
        self._events: deque[dict[str, Any]] = deque()
        self._next()  # the greeting
        self("qmp_capabilities")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stream.close()
        self._socket.close()

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Execute a command; `_` in the names of arguments stands for `-`."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        line = json.dumps({"execute": command, "arguments": named})
        self._socket.sendall(line.encode() + b"\n")
        while True:
            answer = self._next()
            if "event" in answer:
                self._events.append(answer)
            elif "error" in answer:
                raise MonitorError(f"{line}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def wait(self, event: str) -> dict[str, Any]:
        """The next event of that name; those before it are dropped."""
        while True:
            found = self._events.popleft() if self._events else self._next()
            if found.get("event") == event:
                data: dict[str, Any] = found.get("data", {})
                return data

    def _next(self) -> dict[str, Any]:
        line = self._stream.readline()
        if not line:
            raise MonitorError("QEMU has ended")
        message: dict[str, Any] = json.loads(line)
        return message


def _connected(path: Path) -> socket.socket:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        monitor = socket.socket(socket.AF_UNIX)
        try:
            monitor.connect(str(path))
            return monitor
        except OSError as exc:
            monitor.close()
            if time.monotonic() > deadline:
                raise MonitorError(f"no monitor at {path}") from exc
        time.sleep(0.05)
