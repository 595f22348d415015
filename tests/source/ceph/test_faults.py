"""A cluster that hangs, is full or gone, and a backup that is killed: no hang, no leak, no loss.

Daemons are stopped with SIGSTOP, so that they hang as they do in practice.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backyfs.source.ceph.points import prefix
from backyfs.store.repository import Repository
from tests.ceph.cluster import Cluster, running
from tests.cli.program import backyfs, environment, refused
from tests.engine.checks import content
from tests.parts import require

MIB = 1 << 20
SIZE = 64 * MIB
SOURCE = """\
source: {type: ceph-rbd, pool: rbd, image: vm, connect-timeout: 2, monitor-timeout: 3,
         osd-timeout: 3}
"""


class Vm:
    """A VM with an image of random data, on a cluster of its own."""

    def __init__(self, cluster: Cluster, path: Path) -> None:
        self.cluster, self.path = cluster, path / "vm"
        cluster.create_image("vm", SIZE)
        self.write(0, random.Random(1).randbytes(SIZE // 2))
        backyfs("-b", self.path, "init", "ceph-rbd", "rbd/vm")
        (self.path / "config").write_text(SOURCE)

    def write(self, offset: int, data: bytes) -> None:
        with self.cluster.image("vm") as image:
            image.write(data, offset)

    def snaps(self) -> list[str]:
        with self.cluster.image("vm") as image:
            return [snap["name"] for snap in image.list_snaps()]

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Ceph's limit for being full is below what is used, while entered."""
        self._set_limits(nearfull=0.00005, backfillfull=0.00008, full=0.0001)
        self._await_full(True)
        yield
        self._set_limits(full=0.95)
        self._await_full(False)

    def _set_limits(self, **limits: float) -> None:
        for name, ratio in limits.items():
            self._ask(f"osd set-{name}-ratio", ratio=ratio)

    def _await_full(self, wanted: bool) -> None:
        deadline = time.monotonic() + 60
        while ("OSD_FULL" in self._ask("health", detail="detail")) != wanted:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def _ask(self, prefix: str, **more: object) -> str:
        with self.cluster.connected() as rados:
            code, out, error = rados.mon_command(json.dumps({"prefix": prefix, **more}), b"")
        assert code == 0, error
        return str(out)

    @contextlib.contextmanager
    def running_backup(self, *options: str) -> Iterator[subprocess.Popen[str]]:
        """A backup that has made its snapshot, and reads slowly."""
        before = self.snaps()
        command = [sys.executable, "-m", "backyfs", "-b", str(self.path), "backup"]
        with subprocess.Popen(
            [*command, *(options or ["--rate-limit", "4M"])],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                deadline = time.monotonic() + 60
                while len(self.snaps()) <= len(before):
                    assert process.poll() is None, process.communicate()
                    assert time.monotonic() < deadline
                yield process
            finally:
                process.kill()

    def is_well(self) -> None:
        """The next backup is as good as any, and leaves its own snapshot only."""
        backyfs("-b", self.path, "backup")
        repository = Repository.open(self.path)
        newest = repository.revisions()[-1]
        name = prefix(repository.uuid) + newest.id
        assert self.snaps() == [name]
        assert content(repository, newest) == self.cluster.export("vm", name)


@pytest.fixture
def vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vm]:
    require("ceph")
    with running(tmp_path / "ceph") as cluster:
        monkeypatch.setenv("CEPH_CONF", str(cluster.conf))
        monkeypatch.delenv("CEPH_ARGS", raising=False)
        yield Vm(cluster, tmp_path)


def test_a_storage_daemon_hangs_while_it_is_read(vm: Vm) -> None:
    backyfs("-b", vm.path, "backup")
    vm.write(0, random.Random(2).randbytes(SIZE // 2))
    with vm.running_backup() as process:
        with vm.cluster.hanging("osd"):
            _, said = process.communicate(timeout=60)
        assert process.returncode == 13, said
        assert "did not answer in time" in said
    assert len(Repository.open(vm.path).revisions()) == 1
    vm.is_well()


def test_a_storage_daemon_hangs_before(vm: Vm) -> None:
    backyfs("-b", vm.path, "backup")
    with vm.cluster.hanging("osd"):
        assert "in time" in refused("-b", vm.path, "backup", code=13)
    vm.is_well()


def test_a_monitor_hangs(vm: Vm) -> None:
    """Without one there is no snapshot; what is being read can be read on."""
    backyfs("-b", vm.path, "backup")
    with vm.cluster.hanging("mon"):
        assert "in time" in refused("-b", vm.path, "backup", code=13)
    vm.is_well()


def test_monitor_and_storage_are_gone_and_come_back(vm: Vm) -> None:
    backyfs("-b", vm.path, "backup", "--force", "manual:first")
    vm.cluster.signal("mon", signal.SIGKILL)
    refused("-b", vm.path, "backup", code=13)
    vm.cluster.start("mon")
    vm.is_well()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_backup_is_killed(vm: Vm, number: int) -> None:
    backyfs("-b", vm.path, "backup")
    first = vm.snaps()
    vm.write(0, random.Random(3).randbytes(SIZE // 2))
    with vm.running_backup() as process:
        time.sleep(random.Random(number).random())
        process.send_signal(number)
        process.communicate(timeout=60)
    assert len(vm.snaps()) == (2 if number == signal.SIGKILL else 1)
    assert set(first) <= set(vm.snaps())
    vm.is_well()


def test_a_backup_is_killed_at_any_time(vm: Vm) -> None:
    """Also before there is a snapshot, and when everything is done."""
    rng = random.Random(4)
    for _ in range(6):
        vm.write(rng.randrange(SIZE // 2), rng.randbytes(MIB))
        process = subprocess.Popen(
            [sys.executable, "-m", "backyfs", "-b", str(vm.path), "-q", "backup"],
            env=environment(),
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.1, 2))
        process.kill()
        process.wait()
    vm.is_well()


@pytest.mark.slow
def test_a_hung_client_holds_the_lock(vm: Vm) -> None:
    """Its lock is broken after 30 s, whatever the time-outs are."""
    code = (
        "import os, rados, rbd, sys, time\n"
        "cluster = rados.Rados(conffile=os.environ['CEPH_CONF']); cluster.connect()\n"
        "image = rbd.Image(cluster.open_ioctx('rbd'), 'vm'); image.write(b'x', 0)\n"
        "print('locked', flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as client:
        assert client.stdout
        assert client.stdout.readline() == b"locked\n"
        client.send_signal(signal.SIGSTOP)
        try:
            backyfs("-b", vm.path, "backup")
        finally:
            client.kill()
    vm.is_well()


def test_the_cluster_is_full(vm: Vm) -> None:
    """No snapshot can be made that is worth anything; none is left behind."""
    backyfs("-b", vm.path, "backup")
    first = vm.snaps()
    with vm.full():
        said = refused("-b", vm.path, "backup", code=13)
        assert "cannot be opened" in said or "in time" in said
    assert vm.snaps() == first
    vm.is_well()
