"""The unit of the mount: systemd understands it, and others see what it mounts.

Where systemd does not run, the unit's command is run as the unit would: its environment, its
capabilities, a socket to notify.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from backyfs.mount.mountpoint import mounted_at
from tests.mount.mounts import kill_with_helper, server_of, watched
from tests.parts import require
from tests.reader.stores import content, make_vm

UNIT = Path(__file__).parent.parent.parent / "contrib/systemd/backyfs-mount.service"
PROGRAM = "/usr/local/bin/backyfs"
DATA = content(4, seed=3)

# systemd.exec(5): what makes systemd give a unit a mount namespace (or, the last, another network)
OWN_NAMESPACE = {
    *("PrivateTmp", "PrivateDevices", "PrivateMounts", "PrivateUsers", "PrivateIPC", "PrivatePIDs"),
    *("ProtectSystem", "ProtectHome", "ProtectProc", "ProcSubset", "ProtectControlGroups"),
    *("ProtectKernelTunables", "ProtectKernelModules", "ProtectKernelLogs", "ProtectClock"),
    *("ReadOnlyPaths", "ReadWritePaths", "InaccessiblePaths", "ExecPaths", "NoExecPaths"),
    *("BindPaths", "BindReadOnlyPaths", "TemporaryFileSystem", "MountImages", "ExtensionImages"),
    *("ExtensionDirectories", "MountAPIVFS", "MountFlags", "RootDirectory", "RootImage"),
    *("DynamicUser", "LogNamespace", "RestrictFileSystems", "JoinsNamespaceOf", "PrivateNetwork"),
    *("NetworkNamespacePath", "RestrictNamespaces"),
}


def settings() -> dict[str, str]:
    lines = UNIT.read_text().splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
    return {key: value for key, _, value in pairs}


def test_systemd_understands_it(tmp_path: Path) -> None:
    analyze = require("systemd-analyze")
    program = Path(sys.executable).with_name("backyfs")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(PROGRAM, str(program)))
    done = subprocess.run(
        [analyze, "verify", "--man=no", "--recursive-errors=no", copy],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_it_gets_no_mount_namespace() -> None:
    """Told by the names of settings; those of later versions begin like the ones there are."""
    for name in settings():
        assert name not in OWN_NAMESPACE
        assert not name.startswith(("Private", "Protect", "Bind", "Root", "Extension"))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """What the unit's process gets, for a store and a mountpoint of ours."""
    (tmp_path / "mnt").mkdir()
    make_vm(tmp_path, "vm", DATA)
    given = dict(word.split("=", 1) for word in settings()["Environment"].split())
    ours = {"BACKYFS_BACKUP_DIR": str(tmp_path / "vm"), "MOUNTPOINT": str(tmp_path / "mnt")}
    assert given.keys() == {*ours, "OPTIONS"}
    return {**os.environ, **given, **ours}


def as_started(environment: dict[str, str]) -> list[str]:
    """The unit's command, as systemd makes it of ExecStart, with the capabilities it is left."""
    words: list[str] = []
    for word in shlex.split(settings()["ExecStart"]):
        if word == "$OPTIONS":
            words += environment["OPTIONS"].split()
        else:
            words.append(word.replace("${MOUNTPOINT}", environment["MOUNTPOINT"]))
    assert words[0] == PROGRAM
    kept = settings()["CapabilityBoundingSet"].lower().replace("cap_", "+").split()
    limits = ["--no-new-privs", "--bounding-set", ",".join(["-all", *kept])]
    program = [sys.executable, "-m", "backyfs.cli.main"]
    return [require("setpriv"), *limits, *program, *words[1:]]


@contextlib.contextmanager
def started(environment: dict[str, str], notified: Path) -> Iterator[subprocess.Popen[str]]:
    """The unit's process, once it has said that it is ready."""
    require("fuse")
    require("root")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(notified))
        listener.settimeout(30)
        process = subprocess.Popen(
            as_started(environment),
            env={**environment, "NOTIFY_SOCKET": str(notified)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        with process:
            try:
                assert listener.recv(100) == b"READY=1"
                yield process
            finally:
                process.kill()


def test_others_see_what_it_mounts(environment: dict[str, str], tmp_path: Path) -> None:
    point = tmp_path / "mnt"
    with started(environment, tmp_path / "notify") as process, watched(point):
        assert server_of(point) == process.pid
        done = subprocess.run(
            ["cat", point / "vm/latest/disk.img"], capture_output=True, timeout=60, check=True
        )
        assert done.stdout == DATA
        assert os.readlink(f"/proc/{process.pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert mounted_at(point) is None


def test_a_restart_repairs_what_a_killed_one_left(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """systemd kills the rest of the unit, too: the fusermount3 that would have cleaned up."""
    point = tmp_path / "mnt"
    with started(environment, tmp_path / "first") as process, watched(point):
        kill_with_helper(process.pid, point)
        assert mounted_at(point) is not None
        with started(environment, tmp_path / "second") as again, watched(point):
            assert (point / "vm/latest/disk.img").read_bytes() == DATA
            again.send_signal(signal.SIGTERM)
            assert again.wait(20) == 0
    assert mounted_at(point) is None


def test_options_of_the_unit(environment: dict[str, str], tmp_path: Path) -> None:
    environment["OPTIONS"] = f"--cache 16 --scratch {tmp_path}:1M"
    with started(environment, tmp_path / "notify") as process, watched(tmp_path / "mnt"):
        assert (tmp_path / "mnt/vm/latest/disk.rw.img").read_bytes() == DATA
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
