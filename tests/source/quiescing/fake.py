"""An agent that misbehaves on demand, on a real unix socket; it counts what is frozen.

Left alone it answers like qemu-ga (test_agent.py holds both against the same tests). One client at
a time, like QEMU's channel.
"""

from __future__ import annotations

import json
import socket
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar

FROZEN_ONLY = {
    "guest-ping",
    "guest-info",
    "guest-sync",
    "guest-sync-delimited",
    "guest-fsfreeze-status",
    "guest-fsfreeze-thaw",
}
COMMANDS = [*sorted(FROZEN_ONLY), "guest-fsfreeze-freeze", "guest-fsfreeze-freeze-list"]

FAULTS = [
    "ignore",  # not done, no answer
    "lose",  # done, no answer
    "close",  # done, connection closed
    "drop",  # not done, connection closed
    "refuse",  # not done, an error
    "lapse",  # done long ago, an error: as VSS on Windows after 10 s
    "garbage",  # done, a line that is no JSON
    "nonsense",  # done, JSON that is no answer
    "half",  # done, half a line
    "huge",  # done, a line without an end
    "wrong",  # done, another answer than the right one
    "late",  # done, answered after `late_s` seconds
]


class FakeAgent:
    """Listens at `path` until `stop`. `faults`: by command, what to do with the next ones of it."""

    def __init__(self, path: Path, *, file_systems: int = 2) -> None:
        self.path = path
        self.file_systems = file_systems
        self.frozen = 0
        """How many file systems are frozen now."""
        self.calls: list[str] = []
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.disabled: set[str] = set()
        self.late_s = 1.0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __enter__(self) -> FakeAgent:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Be gone, as a VM that was switched off."""
        self._stopping.set()
        self._thread.join()
        self._listener.close()
        self.path.unlink(missing_ok=True)

    def _serve(self) -> None:
        self._listener.settimeout(0.02)
        while not self._stopping.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            with client:
                client.settimeout(0.02)
                try:
                    self._talk(client)
                except OSError:
                    pass

    def _talk(self, client: socket.socket) -> None:
        data = b""
        while not self._stopping.is_set():
            try:
                received = client.recv(65536)
            except TimeoutError:
                continue
            if not received:
                return
            data += received
            while b"\n" in data:
                line, _, data = data.partition(b"\n")
                if not self._handle(client, line):
                    return

    def _handle(self, client: socket.socket, line: bytes) -> bool:
        """Answer one line; whether the connection goes on."""
        stale, _, line = line.rpartition(b"\xff")
        if stale:
            client.sendall(b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n')
        request = json.loads(line)
        command = request["execute"]
        self.calls.append(command)
        fault = self.faults[command].pop(0) if self.faults[command] else ""
        if fault in ("ignore", "drop"):
            return fault == "ignore"
        answer = self._refused if fault == "refuse" else self._answer(command, request)
        if fault == "lapse":
            answer = self._refused
        if command == "guest-sync-delimited":
            client.sendall(b"\xff")
        return self._send(client, answer, fault)

    def _send(self, client: socket.socket, answer: dict[str, Any], fault: str) -> bool:
        data = json.dumps(answer).encode() + b"\n"
        if fault == "late":
            self._stopping.wait(self.late_s)
        data = {
            "lose": b"",
            "close": b"",
            "garbage": b"\x00\xfe{]what\n",
            "nonsense": b'[{"return": {}}]\n',
            "half": data[: len(data) // 2],
            "huge": b"x" * (3 << 20),
            "hostile": b'{"error": {"desc": "\\ud800 \\u001b[2J"}}\n',
            "many": b'{"return": 99999999999999999999}\n',
            "wrong": b'{"return": "wrong"}\n',
        }.get(fault, data)
        client.settimeout(None)
        client.sendall(data)
        client.settimeout(0.02)
        return fault != "close"

    _refused: ClassVar = {"error": {"class": "GenericError", "desc": "refused\nfor a test"}}

    def _answer(self, command: str, request: dict[str, Any]) -> dict[str, Any]:
        if command in self.disabled or (self.frozen and command not in FROZEN_ONLY):
            return {"error": {"class": "CommandNotFound", "desc": f"{command} is disabled"}}
        return {"return": self._done(command, request.get("arguments", {}))}

    def _done(self, command: str, arguments: dict[str, Any]) -> Any:
        if command == "guest-sync-delimited":
            return arguments["id"]
        if command == "guest-info":
            listed = [{"name": n, "enabled": n not in self.disabled} for n in COMMANDS]
            return {"version": "7.2.0", "supported_commands": listed}
        if command == "guest-fsfreeze-status":
            return "frozen" if self.frozen else "thawed"
        if command == "guest-fsfreeze-thaw":
            count, self.frozen = self.frozen, 0
            return count
        if command.startswith("guest-fsfreeze-freeze"):
            self.frozen = len(arguments.get("mountpoints", "x" * self.file_systems))
            return self.frozen
        return {}
