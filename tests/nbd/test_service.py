"""`backyfs nbd-server` as a process: where it listens, what it logs, how it ends."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from backyfs.nbd.protocol.constants import Option
from backyfs.store.packs.decoders import PROCESSES
from tests.cli.program import PROGRAM, environment, refused
from tests.mount.mounts import eventually, is_alive
from tests.nbd.certificates import make_certificates
from tests.nbd.wire import connected, option
from tests.parts import require
from tests.processes import cpu_ticks, decoders_of, heaps
from tests.reader.stores import content, make_vm

IMAGE = content(20, seed=31)
LARGE = random.Random(5).randbytes(48 << 20)
ONLY = "web01/latest"
PATIENCE_S = 30


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("service")
    make_vm(directory, "web01", IMAGE)
    return directory


@dataclass
class Process:
    """A running `backyfs nbd-server`, and what it says."""

    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)

    def wait_for(self, what: str) -> str:
        """Read lines until one has `what` in it."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if what in line:
                return line
        raise AssertionError(f"never said {what!r}: {''.join(self.said)}")

    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, _, port = self.wait_for("listening").rpartition("on=")[2].strip().rpartition(":")
        return host, int(port)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=PATIENCE_S)
        self.said.append(err)
        assert "Traceback" not in "".join(self.said)
        return self.process.returncode


@contextlib.contextmanager
def started(*arguments: str | Path, **more: str) -> Iterator[Process]:
    with subprocess.Popen(
        [PROGRAM, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**more),
    ) as process:
        try:
            yield Process(process)
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_serves_logs_and_ends_cleanly(base: Path, tmp_path: Path, number: int) -> None:
    log = tmp_path / "log"
    with started("-l", log, "-b", base, "nbd-server", "-p", "0") as server:
        with connected(server.address()) as client:
            client.open(ONLY)
            attached = server.wait_for("attached")
            assert f"export={client.name}" in attached
            assert "peer=127.0.0.1:" in attached
            assert client.read(0, len(IMAGE)) == IMAGE
            assert client.call(4711).error
            assert client.disconnect()
            detached = server.wait_for("detached")
            for value in ("requests=", f"read={len(IMAGE)}", "written=0", "errors=1", "seconds="):
                assert value in detached
        assert server.end(number) == 0
    lines = log.read_text().splitlines()
    assert any(" web01 nbd.server detached " in line for line in lines)
    assert lines[-1].endswith("nbd.service stopped")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("large")
    make_vm(directory, "vm", LARGE)
    return directory


@pytest.mark.parametrize("killed", [False, True])
def test_processes_decode_what_is_read_in_sequence(large: Path, killed: bool) -> None:
    piece = 1 << 20
    with started("-b", large, "nbd-server", "-p", "0") as server:
        with connected(server.address()) as client:
            pids = decoders_of(server.process.pid)
            assert len(pids) == PROCESSES
            client.open("vm/latest")
            for at in range(0, len(LARGE), piece):
                assert client.read(at, piece) == LARGE[at : at + piece]
                if killed and at == 16 * piece:
                    for pid in pids:
                        os.kill(pid, signal.SIGKILL)
        if killed:
            assert eventually(lambda: decoders_of(server.process.pid) == [])
        else:
            assert sum(cpu_ticks(pid) for pid in pids) > 0
        assert server.end() == 0
        assert not any(is_alive(pid) for pid in pids)
        gone = "".join(server.said).count("a process that decoded is gone")
        assert gone == (PROCESSES if killed else 0)


def test_a_refused_export_is_logged_on_one_line(base: Path) -> None:
    with started("-b", base, "nbd-server", "-p", "0") as server:
        with connected(server.address()) as client:
            client.hello()
            client.ask(Option.INFO, b"\0\0\0\x09evil\nname\0\0")
            line = server.wait_for("refused")
            assert "evil\\nname" in line
        assert server.end() == 0


def test_a_lack_of_descriptors_is_told_once(base: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started("-l", log, "-b", base, "nbd-server", "-p", "0") as server:
        address = server.address()
        pid = server.process.pid
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        taken = len(os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (taken + 2, hard))
        with contextlib.ExitStack() as waiting:
            for _ in range(6):
                waiting.enter_context(connected(address))
            eventually(lambda: "EMFILE" in log.read_text())
            time.sleep(0.5)  # in which trio tries five times
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
        with connected(address) as client:
            client.hello()
        assert server.end() == 0
    assert log.read_text().count("EMFILE") == 1
    assert "Traceback" not in log.read_text()


def test_the_recipe_of_one_vm(base: Path) -> None:
    """In the VM's directory, without options for it; the name is the revision."""
    with started("-b", base / "web01", "nbd-server", "-p", "0") as server:
        with connected(server.address()) as client:
            client.hello()
            ((_, listed),) = client.ask(Option.LIST)[1]
            name = listed[4 : 4 + listed[3]].decode()
            revision = name.removeprefix("web01/")
            assert client.open(revision, hello=False).name == name
            assert client.read(0, 1000) == IMAGE[:1000]
        assert server.end() == 0


def test_a_unix_socket_is_the_users_alone_and_goes_away(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    for _ in range(2):
        with started("-b", base, "nbd-server", "--socket", path) as server:
            server.wait_for("listening")
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            with connected(str(path)) as client:
                client.open(ONLY)
                assert f"peer=pid:{os.getpid()},uid:{os.getuid()}" in server.wait_for("attached")
                assert client.read(0, len(IMAGE)) == IMAGE
            assert server.end() == 0
        assert not path.exists()


def test_a_socket_left_by_a_killed_server_is_taken_over(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    with started("-b", base, "nbd-server", "--socket", path) as server:
        server.wait_for("listening")
        message = refused("-b", base, "nbd-server", "--socket", path, code=1)
        assert "in use" in message
        server.process.kill()
        server.process.wait()
    assert path.exists()
    with started("-b", base, "nbd-server", "--socket", path) as server:
        server.wait_for("listening")
        assert server.end() == 0


def test_a_file_is_never_taken_for_a_socket(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    assert str(path) in refused("-b", base, "nbd-server", "--socket", path, code=1)
    assert path.read_text() == "precious"


def test_a_port_in_use_is_one_clear_line(base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = refused("-b", base, "nbd-server", "-p", port, code=1)
    assert message.startswith(f"cannot listen on 127.0.0.1:{port}: Address already in use")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["-H", "no.such.host.invalid"], 1, "cannot listen on no.such.host.invalid:9000"),
        (["-H", "192.0.2.1"], 1, "cannot listen on 192.0.2.1:9000"),
        (["-p", "70000"], 2, "70000"),
        (["--socket", "/x", "-p", "1"], 2, "--socket"),
        (["--socket", "/nonexistent/dir/sock"], 1, "/nonexistent/dir/sock"),
        (["--socket", "/tmp/" + "x" * 200], 1, "cannot listen on /tmp/xxx"),
        (["--tls-cert", "/etc/hostname"], 2, "--tls-key"),
        (["--tls-ca", "/etc/hostname"], 2, "--tls-cert"),
        (["--tls-cert", "/nope", "--tls-key", "/nope"], 2, "cannot read /nope"),
        (["--max-connections", "0"], 2, "0"),
        (["--scratch", "/nonexistent"], 1, "/nonexistent"),
        (["--scratch", ":5G"], 2, ":5G"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    base: Path, options: list[str], code: int, message: str
) -> None:
    assert message in refused("-b", base, "nbd-server", *options, code=code)


def test_without_a_repository_there_is_nothing_to_serve(tmp_path: Path) -> None:
    refused("-b", tmp_path / "nope", "nbd-server", "-p", "0", code=10)


def test_overlays_do_not_lie_in_the_store(base: Path) -> None:
    assert "inside the store" in refused("-b", base, "nbd-server", "--scratch", base, code=1)


def test_listening_to_the_world_without_tls_is_warned_of(base: Path, tmp_path: Path) -> None:
    with started("-b", base, "nbd-server", "-H", "0.0.0.0", "-p", "0") as server:
        assert "no TLS" in server.wait_for("warning")
        server.wait_for("listening")
        assert server.end() == 0
    pki = make_certificates(tmp_path / "pki")
    tls: list[str | Path] = [
        "--tls-cert",
        pki / "server-cert.pem",
        "--tls-key",
        pki / "server-key.pem",
    ]
    with started("-b", base, "nbd-server", "-H", "0.0.0.0", "-p", "0", *tls) as server:
        assert "no client certificates" in server.wait_for("warning")
        server.wait_for("listening")
        assert server.end() == 0
    tls += ["--tls-ca", pki / "ca-cert.pem"]
    with started("-b", base, "nbd-server", "-H", "0.0.0.0", "-p", "0", *tls) as server:
        server.wait_for("listening")
        assert server.end() == 0
        assert "warning" not in "".join(server.said)


# ---- socket activation ---------------------------------------------------------------------------

_ACTIVATE = """
import os, socket, sys
sock = socket.{make}
if sock.fileno() != 3:
    os.dup2(sock.fileno(), 3)
os.set_inheritable(3, True)
os.environ |= {{"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "nbd"}}
print(sock.getsockname()[1], flush=True)
os.execv(sys.argv[1], sys.argv[1:])
"""


def activated(make: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """The program, given a socket as a service manager does it; its port is the first line."""
    return activate(make, PROGRAM, *arguments)


def activate(make: str, *command: str | Path, **more: str) -> subprocess.Popen[str]:
    """A command that is given a socket as a service manager does it."""
    return subprocess.Popen(
        [sys.executable, "-c", _ACTIVATE.format(make=make), *map(str, command)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**more),
    )


def test_a_socket_that_was_handed_over_is_served(base: Path) -> None:
    make = "create_server(('127.0.0.1', 0))"
    with activated(make, "-b", base, "nbd-server") as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with connected(("127.0.0.1", port)) as client:
            client.open(ONLY)
            assert client.read(0, len(IMAGE)) == IMAGE
        server = Process(process)
        assert f"127.0.0.1:{port}" in server.wait_for("listening")
        assert server.end() == 0


@pytest.mark.parametrize("make", ["socket(type=socket.SOCK_DGRAM)", "socket()"])
def test_what_is_no_listening_socket_is_refused(base: Path, make: str) -> None:
    with activated(make, "-b", base, "nbd-server") as process:
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert err.startswith("backyfs: LISTEN_FDS names descriptor 3")


def test_libnbd_starts_it_by_socket_activation(base: Path) -> None:
    nbdinfo = require("nbdinfo", "socket activation as libnbd does it")
    done = subprocess.run(
        [nbdinfo, "--size", "--", "[", PROGRAM, "-b", str(base / "web01"), "nbd-server", "]"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=environment(),
    )
    assert done.stdout == f"{len(IMAGE)}\n", done.stderr


def test_ready_is_told_to_the_service_manager(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(path))
        notify.settimeout(PATIENCE_S)
        with started("-b", base, "nbd-server", "-p", "0", NOTIFY_SOCKET=str(path)) as server:
            assert notify.recv(100) == b"READY=1"
            with connected(server.address()) as client:
                client.send(option(99))
                assert server.end() == 0
            assert notify.recv(100) == b"STOPPING=1"


# ---- what a process leaves -----------------------------------------------------------------------


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def test_threads_and_descriptors_do_not_pile_up(base: Path) -> None:
    with started("-b", base, "nbd-server", "-p", "0") as server:
        address, pid = server.address(), server.process.pid
        least = sum_of_sockets(pid)
        peaks = []
        for _ in range(3):
            with contextlib.ExitStack() as stack:
                for _ in range(20):
                    stack.enter_context(connected(address)).open(ONLY)
                assert sum_of_sockets(pid) >= least + 20
                peaks.append(threads(pid))
            assert eventually(lambda: sum_of_sockets(pid) == least)
        assert peaks[-1] <= peaks[0] + 4  # idle ones are used again
        assert server.end() == 0


def test_connections_share_the_memory_that_is_freed(base: Path) -> None:
    with started("-b", base, "nbd-server", "-p", "0") as server, contextlib.ExitStack() as stack:
        address = server.address()
        for _ in range(12):
            client = stack.enter_context(connected(address))
            client.open(ONLY)
            assert client.read(0, 100_000) == IMAGE[:100_000]
        assert heaps(server.process.pid) <= 1  # with one for each what they freed would pile up
        assert server.end() == 0


def sum_of_sockets(pid: int) -> int:
    found = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found += os.readlink(entry).startswith("socket:")
    return found
