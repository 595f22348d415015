"""The real server as a process, and real clients."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cli.program import PROGRAM, environment

HOST = "127.0.0.1"
START_S = 30.0
CLIENT_S = 60.0


@dataclass(frozen=True)
class Service:
    """A running server: its process, its TCP port, and where it logs to."""

    pid: int
    port: int
    log: Path

    def uri(self, export: str = "") -> str:
        """The URI of an export."""
        return f"nbd://{HOST}:{self.port}/{export}"

    def sockets(self) -> int:
        """How many sockets the process has open."""
        found = 0
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found += os.readlink(entry).startswith("socket:")
        return found


@contextlib.contextmanager
def serving(directory: Path, log: Path, *options: str | Path) -> Iterator[Service]:
    """`backyfs nbd-server` on a free TCP port; it must come to a good end when it is told to."""
    port = free_port()
    command = nbd_server(directory, log, "-p", str(port), *options)
    with _running(command, lambda: _connects(socket.AF_INET, (HOST, port))) as pid:
        yield Service(pid, port, log)


@contextlib.contextmanager
def serving_at(path: Path, directory: Path, log: Path, *options: str | Path) -> Iterator[int]:
    """`backyfs nbd-server` on a unix socket; its process."""
    command = nbd_server(directory, log, "--socket", path, *options)
    with _running(command, lambda: _connects(socket.AF_UNIX, str(path))) as pid:
        yield pid


def nbd_server(directory: Path, log: Path, *options: str | Path) -> list[str]:
    """The command that starts a server."""
    return [PROGRAM, "-l", str(log), "-b", str(directory), "nbd-server", *map(str, options)]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.create_server((HOST, 0)) as taken:
        port: int = taken.getsockname()[1]
    return port


@contextlib.contextmanager
def _running(command: list[str], ready: Callable[[], bool]) -> Iterator[int]:
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    )
    try:
        deadline = time.monotonic() + START_S
        while not ready():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.02)
        yield process.pid
        process.terminate()
        said = process.communicate(timeout=START_S)[1]
        assert "Traceback" not in said, said
        assert process.returncode in (0, -15, 143), said
    finally:
        process.kill()
        process.communicate()


def _connects(family: int, address: tuple[str, int] | str) -> bool:
    with socket.socket(family) as client:
        client.settimeout(START_S)
        try:
            client.connect(address)
            return client.recv(8) == b"NBDMAGIC"
        except OSError:
            return False


def client(*command: str | Path) -> str:
    """Run a client, which must succeed; what it printed."""
    done = _run(command)
    assert done.returncode == 0, f"{done.args}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def client_fails(*command: str | Path) -> str:
    """Run a client, which must fail; what it said."""
    done = _run(command)
    assert done.returncode != 0, f"{done.args}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def _run(command: tuple[str | Path, ...]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=CLIENT_S,
        # nbdsh takes the first python3, but its module is made for the distribution's.
        env=environment(PATH="/usr/bin:/usr/sbin:/bin:/sbin"),
        check=False,
    )
