"""The units of the server: systemd understands them, and their command serves what it is handed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from tests.nbd.test_service import PATIENCE_S, Process, activate
from tests.nbd.wire import connected
from tests.parts import require
from tests.reader.stores import content, make_vm

UNITS = Path(__file__).parent.parent.parent / "contrib/systemd"
PROGRAM = "/usr/local/bin/backyfs"
IMAGE = content(8, seed=12)


def settings() -> dict[str, str]:
    lines = (UNITS / "backyfs-nbd.service").read_text().splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
    return {key: value for key, _, value in pairs}


def test_systemd_understands_them(tmp_path: Path) -> None:
    analyze = require("systemd-analyze")
    program = str(Path(sys.executable).with_name("backyfs"))
    copies = []
    for name in ("backyfs-nbd.socket", "backyfs-nbd.service"):
        copies.append(tmp_path / name)
        copies[-1].write_text((UNITS / name).read_text().replace(PROGRAM, program))
    done = subprocess.run(
        [analyze, "verify", "--man=no", "--recursive-errors=no", *copies],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_units_command_serves_the_socket_it_is_handed(tmp_path: Path) -> None:
    """With the unit's environment and no more capabilities than it has."""
    require("root")
    make_vm(tmp_path, "web01", IMAGE)
    (tmp_path / "backyfs-nbd").mkdir()
    given = dict(word.split("=", 1) for word in settings()["Environment"].split())
    assert given.keys() == {"BACKYFS_BACKUP_DIR", "OPTIONS"}
    line = settings()["ExecStart"].replace("%C", str(tmp_path)).replace("$OPTIONS", "")
    program, *words = shlex.split(line)
    assert program == PROGRAM
    kept = settings()["CapabilityBoundingSet"].lower().replace("cap_", "+").split()
    limits = ["--no-new-privs", "--bounding-set", ",".join(["-all", *kept])]
    command = [require("setpriv"), *limits, sys.executable, "-m", "backyfs", *words]
    make = "create_server(('127.0.0.1', 0))"
    with activate(make, *command, BACKYFS_BACKUP_DIR=str(tmp_path / "web01")) as process:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        with connected(address) as client:
            client.open("latest@rw")
            assert not client.call(1, 0, 3, payload=b"abc").error
            assert client.read(0, len(IMAGE)) == b"abc" + IMAGE[3:]
        server = Process(process)
        server.wait_for("detached")
        assert server.end(signal.SIGTERM) == 0
    assert process.wait(PATIENCE_S) == 0
