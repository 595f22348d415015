"""A VM's life on a cluster with keys: scheduled backups under writes, a file and the disk back."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from backyfs.source.ceph.points import prefix
from backyfs.store.repository import Repository
from tests.ceph.cluster import Cluster, running
from tests.cli.program import PROGRAM, backyfs
from tests.engine.scheduling.daemons import Site, eventually
from tests.parts import require

MIB = 1 << 20
SIZE = 64 * MIB
TAIL = 40 * MIB
"""Where a guest writes without end, behind the file system."""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """One on which only client.backyfs is used, which has the caps that docs/ceph.md names."""
    require("ceph")
    require("debugfs")
    with running(tmp_path / "ceph", cephx=True) as cluster:
        monkeypatch.setenv("CEPH_CONF", str(cluster.conf))
        monkeypatch.setenv("CEPH_ARGS", "--id backyfs")
        yield cluster


class Guest:
    """An image with ext4 in it, and a machine that writes to it."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster, self.file = cluster, directory / "guest.img"
        self.motd = directory / "motd"
        with open(self.file, "wb") as stream:
            stream.truncate(SIZE)
        (directory / "root" / "etc").mkdir(parents=True)
        (directory / "root" / "data").write_bytes(random.Random(1).randbytes(5 * MIB))
        command = ["mkfs.ext4", "-q", "-d", f"{directory}/root", str(self.file), f"{TAIL >> 10}"]
        subprocess.run(command, check=True, timeout=60)
        done = cluster.rbd("import", "--no-progress", str(self.file), "rbd/web01")
        assert done.returncode == 0, done.stderr

    def say(self, text: str) -> None:
        """Put a file into the file system, and what that changed onto the image."""
        before = self.file.read_bytes()
        self.motd.write_text(text)
        for request in ("rm /etc/motd", f"write {self.motd} /etc/motd"):
            command = ["debugfs", "-w", "-R", request, str(self.file)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        after = self.file.read_bytes()
        with self.cluster.image("web01") as image:
            for at in range(0, SIZE, 4096):
                if before[at : at + 4096] != after[at : at + 4096]:
                    image.write(after[at : at + 4096], at)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Write blocks, one after the other, while entered."""
        stop, rng = threading.Event(), random.Random(2)

        def write() -> None:
            with self.cluster.image("web01") as image:
                while not stop.wait(0.01):
                    image.write(rng.randbytes(4096), TAIL + 4096 * rng.randrange(2000))

        thread = threading.Thread(target=write)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def test_the_life_of_a_vm(cluster: Cluster, tmp_path: Path) -> None:
    require("fuse")
    guest = Guest(cluster, tmp_path)
    site = Site(tmp_path)
    source = "{type: ceph-rbd, pool: rbd, image: web01}"
    site.write(interval="2s", more=f"  web01: {{source: {source}, schedule: s}}\n")
    with guest.writing(), site.scheduler():
        for number in (1, 2):
            guest.say(f"Welcome, {number}.\n")
            wanted = site.count("web01") + 2
            eventually(partial(site.has_made, "web01", wanted), site.log.read_text)
    backyfs("-b", site.base / "web01", "backup", "manual:last")
    repository = Repository.open(site.base / "web01")
    newest = repository.revisions()[-1]
    assert newest.stats.read < 12 * MIB
    assert_file_is_there(site, tmp_path / "mnt")
    name = prefix(repository.uuid) + newest.id
    restored = f"{PROGRAM} -b {site.base}/web01 restore - | rbd import - rbd/restored"
    subprocess.run(
        ["bash", "-o", "pipefail", "-c", restored], check=True, capture_output=True, timeout=120
    )
    assert cluster.rbd("snap", "create", "rbd/restored@s").returncode == 0
    assert cluster.export("restored", "s") == cluster.export("web01", name)
    listed = cluster.rbd("snap", "ls", "rbd/web01").stdout
    assert listed.count(b"backy-") == 1


def assert_file_is_there(site: Site, mountpoint: Path) -> None:
    """One file, out of the file system in the image in the mounted tree."""
    mountpoint.mkdir()
    backyfs("-b", site.base, "mount", mountpoint)
    try:
        image = mountpoint / "web01" / "latest" / "disk.img"
        command = ["debugfs", "-R", "cat /etc/motd", os.fspath(image)]
        done = subprocess.run(command, check=True, capture_output=True, timeout=60)
        assert done.stdout == b"Welcome, 2.\n"
    finally:
        backyfs("umount", mountpoint)
