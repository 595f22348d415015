"""A real Ceph cluster for tests: one monitor, one storage daemon, on 127.0.0.1, up in a second.

Everything it has lies below one directory. The settings differ from Ceph's defaults in three
ways: one daemon is enough (sizes of 1, no host to choose); waits that only matter in a cluster of
many are short (without them a start takes 15 s); and clients give up instead of waiting for ever.
Figures behind them are for Ceph 16.2.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0

_CONF = """\
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{port}]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv6 = false
ms_bind_msgr1 = false
auth_cluster_required = {auth}
auth_service_required = {auth}
auth_client_required = {auth}
auth_allow_insecure_global_id_reclaim = false
keyring = {dir}/keyring
run_dir = {dir}/run
crash_dir = {dir}/crash
admin_socket =
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_allow_pool_delete = true
client_mount_timeout = 10
rados_mon_op_timeout = 30
rados_osd_op_timeout = 60

[mon]
mon_data = {dir}/mon
pid_file = {dir}/run/mon.pid
# every change of a map (pool, snapshot, start of a daemon) waits for this
paxos_propose_interval = 0.02
paxos_min_wait = 0.01
mon_warn_on_pool_no_redundancy = false
mon_data_avail_warn = 1
mon_data_avail_crit = 0
mon_cluster_log_to_file = false
mon_osd_cache_size = 50
rocksdb_cache_size = 16777216
debug_mon = 0/5
debug_paxos = 0/5
debug_rocksdb = 0/5

[osd]
osd_data = {dir}/osd
pid_file = {dir}/run/osd.pid
osd_objectstore = {store}
osd_crush_initial_weight = 1
osd_fast_shutdown = false
osd_max_object_name_len = 256
osd_max_object_namespace_len = 64
osd_snap_trim_sleep = 0.001
# how long a client that died or hangs is thought to be there (30): its lock is broken then
osd_client_watch_timeout = 10
osd_snap_trim_sleep_hdd = 0
osd_delete_sleep_hdd = 0
memstore_device_bytes = {size}
memstore_page_set = false
bluestore_block_size = {size}
bluestore_block_create = true
bluestore_fsck_on_mkfs = false
# each close of the block file waits for this, and a start closes it some twelve times
bdev_aio_poll_ms = 5
osd_op_num_shards = 2
osd_op_num_threads_per_shard = 2
bluestore_cache_autotune = false
bluestore_cache_size = 134217728
debug_rocksdb = 0/5
debug_bluestore = 0/5
debug_osd = 0/5
"""

_CAPS = {
    "mon.": ("mon", "allow *"),
    "client.admin": ("mon", "allow *", "osd", "allow *", "mgr", "allow *"),
    "osd.0": ("mon", "allow profile osd", "osd", "allow *"),
    "client.backyfs": ("mon", "profile rbd", "osd", "profile rbd"),
}


class Cluster:
    """A cluster in `directory`; `store` is memstore (data in memory) or bluestore, `size` bytes.

    With `cephx`, clients need a key: there are client.admin and, as in production, client.backyfs,
    which may use RBD and nothing else.
    """

    def __init__(
        self,
        directory: Path,
        *,
        store: str = "memstore",
        size: int = 2 << 30,
        cephx: bool = False,
        pools: Sequence[str] = ("rbd",),
    ) -> None:
        self.directory, self.pools = directory, pools
        self.conf = directory / "ceph.conf"
        self._store, self._size, self._cephx = store, size, cephx

    @property
    def environment(self) -> dict[str, str]:
        """For programs that shall use this cluster."""
        return {**os.environ, "CEPH_CONF": str(self.conf), "CEPH_ARGS": ""}

    def create(self) -> None:
        """Make the cluster, start it, and make its pools."""
        for name in ("mon", "osd", "run", "log", "crash"):
            (self.directory / name).mkdir(parents=True)
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        port = _free_port()
        self._write_conf(fsid, port)
        self._make_keys()
        made = self._spawn("ceph-osd", "-i", "0", "--mkfs", "--no-mon-config", "--osd-uuid", osd)
        self._make_monitor(fsid, port)
        self.start("mon")
        with self.connected() as rados:
            _ask(rados, "osd new", uuid=osd)
            for pool in self.pools:
                _ask(rados, "osd pool create", pool=pool, pg_num=8)
        assert made.wait(PATIENCE_S) == 0, self.log("osd")
        self.start("osd")
        self._await_osd()
        self._initialise_pools()

    def _write_conf(self, fsid: str, port: int) -> None:
        self.conf.write_text(
            _CONF.format(
                fsid=fsid,
                port=port,
                auth="cephx" if self._cephx else "none",
                dir=self.directory,
                store=self._store,
                size=self._size,
            )
        )

    def _make_keys(self) -> None:
        keyring = self.directory / "keyring"
        keyring.touch(0o600)
        if not self._cephx:
            return
        for name, caps in _CAPS.items():
            pairs = zip(caps[::2], caps[1::2], strict=True)
            given = [word for kind, cap in pairs for word in ("--cap", kind, cap)]
            self._run("ceph-authtool", str(keyring), "--gen-key", "-n", name, *given, conf=False)

    def _make_monitor(self, fsid: str, port: int) -> None:
        monmap, address = f"{self.directory}/run/monmap", f"[v2:127.0.0.1:{port}]"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        keyring = ["--keyring", f"{self.directory}/keyring"] if self._cephx else []
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, *keyring)

    def _await_osd(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        with self.connected() as rados:
            while not _ask(rados, "osd stat")["num_up_osds"]:
                assert time.monotonic() < deadline, self.log("osd")
                time.sleep(0.03)

    def _initialise_pools(self) -> None:
        import rbd

        with self.connected() as rados:
            for pool in self.pools:
                with rados.open_ioctx(pool) as ioctx:
                    rbd.RBD().pool_init(ioctx, True)

    # ---- daemons -----------------------------------------------------------------------------

    def start(self, daemon: str) -> None:
        """Start the "mon" or the "osd"; its data are as they were when it was stopped."""
        name = {"mon": "a", "osd": "0"}[daemon]
        self._run(f"ceph-{daemon}", "-i", name, "--log-file", f"{self.directory}/log/{daemon}.log")

    def restart(self) -> None:
        """Start both after `stop` or `kill`."""
        self.start("mon")
        self.start("osd")
        self._await_osd()

    def pid(self, daemon: str) -> int:
        """Of a running daemon; 0 = it does not run."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.directory / "run" / f"{daemon}.pid").read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if str(self.conf).encode() in command:
                return pid
        return 0

    def signal(self, daemon: str, number: int) -> None:
        """Send a daemon a signal: SIGSTOP makes it hang, SIGCONT ends that, SIGKILL is a crash."""
        pid = self.pid(daemon)
        assert pid, f"ceph-{daemon} does not run"
        os.kill(pid, number)

    @contextlib.contextmanager
    def hanging(self, daemon: str) -> Iterator[None]:
        """A daemon does not answer while entered."""
        self.signal(daemon, signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(daemon, signal.SIGCONT)

    def stop(self) -> None:
        """End both, whatever state they are in."""
        for daemon in ("osd", "mon"):
            self._end(daemon)

    def _end(self, daemon: str) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(AssertionError, ProcessLookupError):
                self.signal(daemon, signal.SIGCONT)
                self.signal(daemon, number)
            deadline = time.monotonic() + 15
            while self.pid(daemon) and time.monotonic() < deadline:
                time.sleep(0.02)
        assert not self.pid(daemon), f"ceph-{daemon} outlived SIGKILL"

    def log(self, daemon: str) -> str:
        """The last lines a daemon wrote."""
        paths = [self.directory / "log" / f"{daemon}.{end}" for end in ("log", "out")]
        return "\n".join(
            line for path in paths if path.exists() for line in path.read_text().split("\n")[-20:]
        )

    # ---- use ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def connected(self, client: str = "admin") -> Iterator[Any]:
        """A `rados.Rados` of this cluster."""
        import rados

        cluster = rados.Rados(rados_id=client, conffile=str(self.conf))
        cluster.connect()
        try:
            yield cluster
        finally:
            cluster.shutdown()

    def rbd(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
        """Run Ceph's own `rbd` program."""
        command = ["rbd", *arguments]
        run: subprocess.CompletedProcess[bytes] = subprocess.run(
            command, env=self.environment, capture_output=True, timeout=PATIENCE_S, **options
        )
        return run

    def create_image(
        self, name: str, size: int, *, features: int | None = None, order: int = 22
    ) -> None:
        """An empty image of `size` bytes in the pool rbd; objects have 2**order bytes."""
        import rbd

        with self.connected() as rados, rados.open_ioctx("rbd") as ioctx:
            rbd.RBD().create(ioctx, name, size, order=order, old_format=False, features=features)

    @contextlib.contextmanager
    def image(self, name: str, snapshot: str | None = None) -> Iterator[Any]:
        """An `rbd.Image` of the pool rbd."""
        import rbd

        with (
            self.connected() as rados,
            rados.open_ioctx("rbd") as ioctx,
            rbd.Image(ioctx, name, snapshot=snapshot) as image,
        ):
            yield image

    def export(self, name: str, snapshot: str) -> bytes:
        """What Ceph's own program reads of a snapshot."""
        done = self.rbd("export", "--no-progress", f"rbd/{name}@{snapshot}", "-")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def empty(self, pool: str) -> None:
        """Remove everything from a pool: namespaces, clones, snapshots, what is in the trash."""
        import rbd

        with self.connected() as rados, rados.open_ioctx(pool) as ioctx:
            names = rbd.RBD().namespace_list(ioctx)
            for namespace in [*names, ""]:
                ioctx.set_namespace(namespace)
                _remove_images(ioctx)
            for namespace in names:
                rbd.RBD().namespace_remove(ioctx, namespace)

    def _run(self, program: str, *arguments: str, conf: bool = True) -> None:
        running = self._spawn(program, *arguments, conf=conf)
        assert running.wait(PATIENCE_S) == 0, f"{program}: {self._said(program)}"

    def _spawn(self, program: str, *arguments: str, conf: bool = True) -> subprocess.Popen[bytes]:
        chosen = ["-c", str(self.conf)] if conf and program != "monmaptool" else []
        with open(self._output(program), "ab") as output:  # never ours: a pipe would stay open
            return subprocess.Popen(
                [program, *chosen, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment,
            )

    def _output(self, program: str) -> Path:
        return self.directory / "log" / f"{program.removeprefix('ceph-')}.out"

    def _said(self, program: str) -> str:
        return self._output(program).read_text()[-2000:]


@contextlib.contextmanager
def running(directory: Path, **options: Any) -> Iterator[Cluster]:
    """A new cluster while entered."""
    cluster = Cluster(directory, **options)
    try:
        cluster.create()
        yield cluster
    finally:
        cluster.stop()


def _remove_images(ioctx: Any) -> None:
    """All of a namespace, clones before their parents."""
    import rbd

    program = rbd.RBD()
    for entry in list(program.trash_list(ioctx)):
        program.trash_restore(ioctx, entry["id"], f"trash-{entry['id']}")
    left = program.list(ioctx)
    while left:
        before = len(left)
        for name in left:
            with contextlib.suppress(rbd.ImageBusy, rbd.ImageHasSnapshots):
                _remove_snapshots(ioctx, name)
                program.remove(ioctx, name)
        left = program.list(ioctx)
        assert len(left) < before, f"cannot remove {left}"


def _remove_snapshots(ioctx: Any, name: str) -> None:
    import rbd

    with rbd.Image(ioctx, name) as image:
        for snapshot in list(image.list_snaps()):
            if image.is_protected_snap(snapshot["name"]):
                image.unprotect_snap(snapshot["name"])
            image.remove_snap(snapshot["name"])


def _ask(rados: Any, command: str, **arguments: object) -> Any:
    """What the monitor answers to a command."""
    request = json.dumps({"prefix": command, "format": "json", **arguments})
    code, out, error = rados.mon_command(request, b"", timeout=int(PATIENCE_S))
    assert code == 0, f"{command}: {error}"
    return json.loads(out) if out.strip() else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
