"""Backups of the source `flyingcircus` by the program, with a real cluster.

Consul and the hypervisor are doubles that speak HTTP with each other and with the program; the
snapshots are real. While the guest is frozen its disks say so: what a revision holds tells whose
snapshot was read.
"""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backyfs.config import Job, read_job, write_job
from backyfs.config.site import read_site
from backyfs.store.repository import Repository
from tests.ceph.cluster import Cluster
from tests.cli.program import PROGRAM, backyfs, environment, refused
from tests.source.flyingcircus.consul import Store, serving
from tests.source.flyingcircus.host import taking
from tests.source.flyingcircus.hypervisor import Hypervisor

VM = "web01"
SIZE = (9 << 20) + 4096
FROZEN, RUNNING = b"the guest is frozen.", b"the guest is running"
DISKS = {"root": "web01.root", "data": "web01.data"}


class Site:
    """A VM with two disks, its hypervisor, Consul, and the directory of its backups."""

    def __init__(self, ceph: Cluster, directory: Path, address: str, store: Store) -> None:
        self.ceph, self.directory, self.address, self.store = ceph, directory, address, store
        self.repository = Repository.create(directory, "packs")
        rng = random.Random(3)
        for image in DISKS.values():
            ceph.create_image(image, SIZE)
            self.write(image, rng.randbytes(1 << 20), 4 << 20)
            self.write(image, RUNNING)
        self.configure()

    def configure(self, **settings: Any) -> None:
        """Write the job; what is not given is as in `self.settings`."""
        write_job(self.directory / "config", Job("flyingcircus", self.settings(**settings)))

    def settings(self, **settings: Any) -> dict[str, Any]:
        given = {key.replace("_", "-"): value for key, value in settings.items()}
        images = {"pool": "rbd", "images": DISKS}
        return {**images, "vm": VM, "consul": self.address, "consul-timeout": "60s", **given}

    def write(self, image: str, data: bytes, offset: int = 0) -> None:
        with self.ceph.image(image) as opened:
            opened.write(data, offset)

    def hypervisor(self, *only: str, **options: Any) -> Hypervisor:
        states = {"frozen": FROZEN, "running": RUNNING}
        disks = {disk: taking(self.ceph, DISKS[disk], **states) for disk in only or DISKS}
        return Hypervisor(self.address, VM, disks, **options)

    def backup(self, **options: Any) -> dict[str, Any]:
        """Make a backup; what was published, which is what was in its snapshots."""
        summary: dict[str, Any] = backyfs(
            "-b", self.directory, "backup", "--force", "manual:x", "--json", **options
        ).json_lines[-1]
        self.is_true_to_its_snapshots(summary["id"])
        return summary

    def is_true_to_its_snapshots(self, revision: str) -> None:
        for disk, image in DISKS.items():
            assert self.content(revision, disk) == self.ceph.export(image, self.name(revision))

    def content(self, revision: str, disk: str) -> bytes:
        record = self.repository.record(revision)
        with contextlib.closing(self.repository.open_disk(record, disk)) as image:
            return image.read(0, image.size)

    def forget_clients(self) -> None:
        """Spare us the 30 s for which Ceph waits for those that were killed."""
        import rbd

        with self.ceph.connected() as rados, rados.open_ioctx("rbd") as ioctx:
            for name in DISKS.values():
                with rbd.Image(ioctx, name, read_only=True) as image:
                    for watcher in image.watchers_list():
                        rados.blocklist_add(watcher["addr"], 3600)

    def name(self, revision: str) -> str:
        return f"backy-{self.repository.uuid.hex[:8]}-{revision}"

    def snapshots(self) -> dict[str, list[str]]:
        found = {}
        for disk, image in DISKS.items():
            with self.ceph.image(image) as opened:
                found[disk] = [snap["name"] for snap in opened.list_snaps()]
        return found

    def only_snapshots_of(self, revision: str) -> bool:
        return self.snapshots() == {disk: [self.name(revision)] for disk in DISKS}


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def site(ceph: Cluster, store: Store, tmp_path: Path) -> Iterator[Site]:
    with serving(store) as address:
        yield Site(ceph, tmp_path / VM, address, store)


# ---- the hypervisor takes the snapshots ----------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"removes": True}, {"delay_s": 2.0}],
    ids=["the key stays", "the key goes", "slow"],
)
def test_the_hypervisor_takes_the_snapshots(
    site: Site, store: Store, options: dict[str, Any]
) -> None:
    done: dict[str, Any] = {}
    for _ in range(2):
        with site.hypervisor(**options).running() as host:
            done = site.backup()
        assert done["consistency"] == "filesystem"
        assert done["reason"].startswith("taken by the hypervisor, with the guest frozen, after ")
        assert done["quiescing"] == "done"
        assert host.events[:4] == ["freeze", "take root", "take data", "thaw"]
        for disk in DISKS:
            assert site.content(done["id"], disk).startswith(FROZEN)
        assert store.below("") == {}
        assert site.only_snapshots_of(done["id"])
    assert done["read"] < SIZE  # the second one rests on the hypervisor's snapshots


def test_values_of_others_are_in_the_way(site: Site, store: Store) -> None:
    foreign = {"snapshot/1": b"\xff", "snapshot/2": b'{"vm": "other", "snapshot": "backy-1"}'}
    for key, value in foreign.items():
        store.put(key, value)
    with site.hypervisor().running():
        assert site.backup()["consistency"] == "filesystem"
    assert store.below("") == foreign


def test_backys_settings_as_they_are(site: Site, tmp_path: Path) -> None:
    """One disk, and a token that never gets into the VM's directory."""
    token, conf = "a211c244-846b-11e5-999b-081196cf15b4", tmp_path / "backy.conf"
    conf.write_text(f"""\
jobs:
  {VM}:
    source:
      type: flyingcircus
      consul_acl_token: {token}
      vm: {VM}
      pool: rbd
      image: web01.root
""")
    backyfs("-c", conf, "check-config")
    job = read_site(conf).jobs[VM].job
    write_job(site.directory / "config", job.without_secrets())
    with serving(Store({token: "snapshot/"})) as address:
        site.address = address
        with site.hypervisor("root", token=token).running():
            done = backyfs(
                *("-v", "-c", conf, "-b", site.directory, "backup", "daily", "--json"),
                CONSUL_HTTP_ADDR=address,
            )
    assert done.json_lines[-1]["consistency"] == "filesystem"
    assert token not in done.out + done.err
    for path in site.directory.rglob("*"):
        assert path.is_dir() or token.encode() not in path.read_bytes()


def test_init_names_the_vm_as_its_directory(site: Site, tmp_path: Path) -> None:
    directory = tmp_path / "srv" / "db01"
    backyfs("-b", directory, "init", "flyingcircus", "root=rbd/web01.root", "data=rbd/web01.data")
    images = {"root": "rbd/web01.root", "data": "rbd/web01.data"}
    assert read_job(directory / "config").settings == {"images": images, "vm": "db01"}
    directory = tmp_path / "srv" / "db02"
    backyfs("-b", directory, "init", "flyingcircus", "rbd/web01.root")
    one = {"pool": "rbd", "image": "web01.root", "vm": "db02"}
    assert read_job(directory / "config").settings == one
    message = refused("-b", tmp_path / "x", "init", "flyingcircus", "rbd/no", code=13)
    assert message == "there is no RBD image rbd/no"


# ---- it does not ---------------------------------------------------------------------------------

NOT_TAKEN: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "cannot freeze": (
        [],
        {"freezes": False, "removes": True},
        "the request was taken away without a snapshot of root, data",
    ),
    "another name": (
        [],
        {"names": lambda name: f"{name}-keep", "removes": True},
        "the request was taken away without a snapshot of root, data",
    ),
    "one disk of two": (
        ["root"],
        {"removes": True},
        "the request was taken away without a snapshot of data",
    ),
    "dead": (
        [],
        {"freezes": False},
        "the hypervisor has taken no snapshot of root, data within 2 s",
    ),
}


@pytest.mark.parametrize(("only", "options", "reason"), NOT_TAKEN.values(), ids=NOT_TAKEN.keys())
def test_the_backup_takes_the_snapshots_itself(
    site: Site, store: Store, only: list[str], options: dict[str, Any], reason: str
) -> None:
    site.configure(**{} if options.get("removes") else {"consul_timeout": "2s"})
    with site.hypervisor(*only, **options).running():
        done = site.backup()
    assert_taken_by_ourselves(site, store, done, reason)
    foreign = {
        disk: [name for name in names if name != site.name(done["id"])]
        for disk, names in site.snapshots().items()
    }
    assert all(name.endswith("-keep") for names in foreign.values() for name in names)
    site.configure()
    with site.hypervisor().running():
        after = site.backup()
    assert after["consistency"] == "filesystem"
    assert after["read"] < SIZE  # it rests on what we took ourselves
    assert site.snapshots() == {
        disk: [*names, site.name(after["id"])] for disk, names in foreign.items()
    }


def assert_taken_by_ourselves(site: Site, store: Store, done: Any, reason: str) -> None:
    assert (done["consistency"], done["quiescing"]) == ("crash", "failed")
    assert reason in done["reason"]
    assert done["reason"].startswith("RBD snapshots of 2 images, taken within ")
    for disk in DISKS:
        assert site.content(done["id"], disk).startswith(RUNNING)
    assert store.below("") == {}


def test_a_late_hypervisor_finds_the_snapshots_there(site: Site, store: Store) -> None:
    site.configure(consul_timeout="1s")
    with site.hypervisor(held=lambda: all(site.snapshots().values())).running() as host:
        done = site.backup()
        patiently(lambda: "thaw" in host.events)
    assert host.events[:4] == ["freeze", "exists root", "exists data", "thaw"]
    assert_taken_by_ourselves(site, store, done, "no snapshot of root, data within 1 s")
    assert site.only_snapshots_of(done["id"])


def test_a_hypervisor_that_wakes_when_the_backup_is_over(site: Site, store: Store) -> None:
    """The request is gone, and so may be the snapshot: what it takes then goes the next time."""
    site.configure(consul_timeout="1s", full_always=True)  # keeps no snapshot
    over = threading.Event()
    with site.hypervisor(held=over.is_set).running() as host:
        done = backyfs("-b", site.directory, "backup", "daily", "--json").json_lines[-1]
        assert site.snapshots() == {"root": [], "data": []}
        over.set()
        patiently(lambda: "thaw" in host.events)
    assert site.only_snapshots_of(done["id"])
    backyfs("-b", site.directory, "backup", "daily")
    assert site.snapshots() == {"root": [], "data": []}
    assert store.below("") == {}


def test_consul_is_of_no_help(site: Site, store: Store) -> None:
    store.leader = False
    done = site.backup()
    assert_taken_by_ourselves(site, store, done, "answers 500: No cluster leader")
    store.leader, store.tokens = True, {"other": ""}
    done = site.backup()
    assert_taken_by_ourselves(site, store, done, "answers 403: Permission denied")
    site.configure(consul="http://127.0.0.1:1")
    done = site.backup()
    assert_taken_by_ourselves(site, store, done, "http://127.0.0.1:1 cannot be reached")
    site.configure(consul_token_file="/no/such/file")
    done = site.backup()
    assert_taken_by_ourselves(site, store, done, "cannot read the Consul token in /no/such/file")
    assert site.only_snapshots_of(done["id"])


# ---- policies ------------------------------------------------------------------------------------


def test_required_of_the_hypervisor_it_is_that_or_nothing(site: Site, store: Store) -> None:
    site.configure(hypervisor_snapshot="require")
    with site.hypervisor().running():
        first = site.backup()
    with site.hypervisor("root", removes=True).running():
        message = refused("-b", site.directory, "backup", "daily", code=13)
    assert message == (
        f"no snapshot by the hypervisor of {VM}: "
        "the request was taken away without a snapshot of data"
    )
    assert site.only_snapshots_of(first["id"])
    assert store.below("") == {}
    assert len(site.repository.revisions()) == 1
    store.leader = False
    assert "No cluster leader" in refused("-b", site.directory, "backup", "daily", code=13)


def test_strict_is_required_of_the_hypervisor_this_once(site: Site, store: Store) -> None:
    store.leader = False
    message = backyfs("-b", site.directory, "backup", "--strict", "daily", code=13).err
    assert f"{VM}: the guest was not frozen: RBD snapshots of 2 images" in message
    assert "No cluster leader" in message
    assert site.repository.revisions() == []
    assert site.backup()["quiescing"] == "failed"
    store.leader = True
    with site.hypervisor().running():
        backyfs("-b", site.directory, "backup", "--strict", "daily")


def test_never_asks_nobody(site: Site, store: Store) -> None:
    site.configure(hypervisor_snapshot="never")
    with site.hypervisor().running() as host:
        assert site.backup()["consistency"] == "crash"
    assert not any(call.startswith("PUT") for call in store.calls)
    assert host.events == []


# ---- interrupted, killed -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_does_not_wait_on(site: Site, store: Store, number: int) -> None:
    site.configure(consul_timeout="1h")
    command = [PROGRAM, "-b", str(site.directory), "backup", "daily"]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as running:
        patiently(lambda: store.below("snapshot/"))
        running.send_signal(number)
        try:
            running.wait(60)
        finally:
            running.kill()
    assert running.returncode == 128 + number
    assert store.below("") == {}
    assert site.snapshots() == {"root": [], "data": []}
    assert site.repository.revisions() == []


def test_what_a_killed_backup_left_goes_the_next_time(site: Site, store: Store) -> None:
    """Its request stands, so that the hypervisor takes a snapshot that nobody waits for."""
    command = [PROGRAM, "-b", str(site.directory), "backup", "daily"]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as running:
        patiently(lambda: store.below("snapshot/"))
        running.send_signal(signal.SIGKILL)
    (left,) = store.below("snapshot/")
    site.forget_clients()
    with site.hypervisor().running() as host:
        patiently(lambda: "thaw" in host.events)
        assert list(store.below("snapshot/")) == [left]
        (orphan,) = site.snapshots()["root"]
        done = site.backup()
    assert done["consistency"] == "filesystem"
    assert store.below("") == {}
    assert orphan != site.name(done["id"])
    assert site.only_snapshots_of(done["id"])


def patiently(look: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not look():
        assert time.monotonic() < end
        time.sleep(0.02)
