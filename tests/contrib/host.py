"""A host that runs systemd, in namespaces of its own: what the units do when it starts them.

The host has this machine's root directory, but an empty /run, /srv, /mnt and /var/log, another
network, and no units but those it is given. The project is found below /srv: units with a /tmp of
their own see no checkout that lies in the other one.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.filesystems import MINIMUM
from tests.parts import require

UNITS = Path(__file__).parents[2] / "contrib/systemd"
CONFIG = "/srv/backy.conf"
"""What the scheduler's unit reads, in place of /etc/backy.conf."""
_PROJECT = Path(__file__).parents[2]
_PROGRAM = "/usr/local/bin/backyfs"
_PYTHON = "/srv/venv/bin/python -m backyfs"
_TARGETS = (
    *("sysinit", "basic", "shutdown", "sockets", "multi-user", "local-fs", "remote-fs"),
    *("network-online", "umount", "start"),
)
_UP_S = 60.0

_SETUP = """
set -e
mount --make-rprivate /
# What other tests have mounted is theirs alone.
while read -r _ at kind _; do
    case "$kind" in fuse*|xfs|btrfs|ext4) test "$at" = / || umount -l "$at" || true;; esac
done </proc/self/mounts
ip link set lo up
for at in /run /srv /mnt /var/log; do mount -t tmpfs tmpfs $at; done
mount -t cgroup2 none /sys/fs/cgroup
mkdir -p /run/units /run/conf /run/log /srv/backy /srv/vms /srv/project /srv/venv /mnt/backy
mount --bind {project} /srv/project
mount --bind {venv} /srv/venv
cp {units}/* /run/units
mkfs.xfs -q -m reflink=1 {image}
mount -o loop {image} /srv/vms
printf '[Manager]\\nDefaultEnvironment=PYTHONPATH=/srv/project\\n' >/run/conf/system.conf
mount --bind /run/conf /etc/systemd
export container=test SYSTEMD_UNIT_PATH=/run/units
exec {systemd} --system --unit=start.target --log-target=console --show-status=no
"""


class Host:
    """The running one. `said` is what it has logged."""

    def __init__(self, pid: int, log: Path) -> None:
        self._pid, self._log = pid, log

    @property
    def said(self) -> str:
        """What systemd has logged."""
        return self._log.read_text(errors="replace")

    def run(self, *command: str, check: bool = True) -> str:
        """What a command says that runs on the host, beside its units."""
        done = subprocess.run(
            ["nsenter", f"--target={self._pid}", *("-m", "-p", "-i", "-u", "-n", "-C"), *command],
            env={**os.environ, "SYSTEMD_UNIT_PATH": "/run/units", "PYTHONPATH": "/srv/project"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command}: {done.stdout}{done.stderr}\n{self.said}")
        return done.stdout.strip()

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        """What systemctl says."""
        return self.run("systemctl", "--no-pager", *arguments, check=check)

    def backyfs(self, *arguments: str) -> str:
        """What a command of ours says."""
        return self.run(*shlex.split(_PYTHON), *arguments)


@contextlib.contextmanager
def booted(directory: Path) -> Iterator[Host]:
    """A host with the project's units, none of them started, and XFS at /srv/vms."""
    for part in ("root", "systemd", "xfs"):
        require(part)
    units = directory / "units"
    _write_units(units)
    image = directory / "vms.img"
    with open(image, "xb") as stream:
        stream.truncate(MINIMUM["xfs"])
    setup = _SETUP.format(
        project=_PROJECT, venv=sys.prefix, units=units, image=image, systemd=require("systemd")
    )
    log = directory / "systemd.log"
    apart = ("--mount", "--pid", "--ipc", "--uts", "--net", "--cgroup", "--mount-proc")
    with log.open("wb") as stream:
        unshare = subprocess.Popen(
            ["unshare", *apart, "--fork", "--kill-child", "sh", "-c", setup],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
        )
    with unshare:
        try:
            yield _up(unshare, log)
        finally:
            unshare.kill()


def _write_units(directory: Path) -> None:
    directory.mkdir()
    for unit in UNITS.iterdir():
        text = unit.read_text().replace(_PROGRAM, _PYTHON).replace("/etc/backy.conf", CONFIG)
        (directory / unit.name).write_text(text)
    for name in _TARGETS:
        (directory / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")


def _up(unshare: subprocess.Popen[bytes], log: Path) -> Host:
    children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
    deadline = time.monotonic() + _UP_S
    while time.monotonic() < deadline and unshare.poll() is None:
        for pid in children.read_text().split():
            host = Host(int(pid), log)
            if host.systemctl("is-active", "start.target", check=False) == "active":
                return host
        time.sleep(0.05)
    pytest.skip(f"systemd does not come up in a namespace here: {log.read_text()[-1000:]}")
