"""The daemon as a process: real backups, the real telnet client, kill -9, a full disk."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backyfs.store.repository import Repository
from tests.cli.program import backyfs, environment, refused
from tests.engine.scheduling.daemons import FULL, PATIENCE_S, Site, eventually
from tests.filesystems import MIB, mounted, run, unmount
from tests.parts import require


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


class Telnet:
    """The real telnet client on a terminal."""

    def __init__(self, port: int) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [require("telnet", "talks to the console"), "127.0.0.1", str(port)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(TERM="dumb"),
            start_new_session=True,
        )
        os.close(slave)
        self._seen = ""

    def until(self, text: str) -> str:
        """What it shows up to `text`, which is taken off."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self._seen:
            assert time.monotonic() < deadline, self._seen
            if select.select([self._master], [], [], 0.5)[0]:
                try:
                    self._seen += os.read(self._master, 65536).decode()
                except OSError:  # the client ended
                    assert text in self._seen, self._seen
        found, _, self._seen = self._seen.partition(text)
        return found.replace("\r", "")

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def ask(self, line: str) -> str:
        self.type(line + "\n")
        return self.until("backyfs> ").partition("\n")[2]

    def close(self) -> None:
        os.close(self._master)
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def telnet(port: int) -> Iterator[Telnet]:
    eventually(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
    client = Telnet(port)
    try:
        yield client
    finally:
        client.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_console_with_the_real_telnet_client(site: Site) -> None:
    site.add("web01")
    site.add("web02")
    site.write("1d")
    with site.scheduler(), telnet(site.port) as client:
        client.until("Ready.")
        client.until("backyfs> ")
        table = client.ask("jobs")
        assert re.search(r"\| web01 +\| OK +\| - +\| waiting for deadline +\| - ", table)
        assert "Next Backup (UTC)" in table
        assert "2 jobs shown" in table
        assert "web02" not in client.ask("jobs web01")
        assert "1 job shown of 2" in client.ask("jobs *01")
        assert client.ask("run web01") == "Triggered immediate run for web01\n"
        assert client.ask("run nope") == "Unknown job nope\n"
        assert client.ask("run") == "run what? run JOB\n"
        assert client.ask("foo") == "no such command. (help lists them)\n"
        assert "revisions JOB" in client.ask("help")
        eventually(lambda: site.count("web01"))
        eventually(lambda: "1 revision" in client.ask("revisions web01"))
        assert "tick" in client.ask("revisions web01")
        assert client.ask("revisions web02") == "0 revisions\n"
        assert re.search(r"\| slow +\| 3 ", client.ask("pools"))
        assert "waiting for deadline" in client.ask("status")
        # Editing is the client's: a wrong key and the key that takes it back.
        client.type("jobx\x7fs web01\n")
        assert "1 job shown of 2" in client.until("backyfs> ")
        assert client.ask("") == ""
        assert client.ask("reload").endswith("Daemon configuration reloaded.\n")
        site.config.write_text(site.config.read_text() + "jbos: {}\n")
        assert "did you mean 'jobs'?" in client.ask("reload")
        site.write("1d", telnet_port=1)
        assert "Needs a restart: telnet-port" in client.ask("reload")
        assert "Triggered immediate run for" in client.ask("runall")
        client.type("quit\n")
        client.until("Connection closed")
    assert "jobs=2" in site.log.read_text()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_clients_that_misbehave_harm_nobody(site: Site) -> None:
    site.add("web01")
    site.write("1d")
    with site.scheduler(), contextlib.ExitStack() as stack:
        eventually(lambda: socket.socket().connect_ex(("127.0.0.1", site.port)) == 0)

        def connect() -> socket.socket:
            return stack.enter_context(
                contextlib.closing(socket.create_connection(("127.0.0.1", site.port), 30))
            )

        first = connect()
        first.sendall(b"x" * 3_000_000 + b"\r\n" + b"jobs\r\n" * 3)
        clients = [connect() for _ in range(20)]
        heard = [client.recv(100) for client in clients]
        assert any(b"too many clients" in text for text in heard)
        assert any(b"Ready" in text for text in heard)
        for client in clients:
            client.close()
        first.close()
        again = eventually(lambda: _answer(site.port, b"status\r\n"))
        assert b"waiting for deadline" in again


def test_the_status_is_json_whatever_the_locale(site: Site) -> None:
    """JSON is UTF-8; a daemon in a locale that has no ß ended when it came to write one."""
    image = site.add("web01")
    more = f"  db01: {{source: {{type: file, filename: {image}}}, schedule: s, tenant: Größe}}\n"
    site.write("1d", more)
    with site.scheduler(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0") as process:
        eventually(lambda: site.status() or process.poll() is not None)
        assert site.status()["db01"]["tenant"] == "Größe"
        assert process.poll() is None


def _answer(port: int, question: bytes) -> bytes:
    """What a client that is no telnet hears; nothing when it was refused."""
    heard = b""
    with socket.create_connection(("127.0.0.1", port), 30) as client:
        client.sendall(question + b"quit\r\n")
        while data := client.recv(65536):
            heard += data
    return heard if b"Ready" in heard else b""


def test_one_scheduler_per_base_directory(site: Site) -> None:
    site.add("web01")
    site.write("1d")
    with site.scheduler() as process:
        eventually(site.status)
        said = refused("scheduler", "-c", site.config, code=75)
        assert said == f"another scheduler keeps {site.base}"
        whole = backyfs("scheduler", "-c", site.config, code=75).err
        assert "--wait" not in whole  # which it does not have
        process.terminate()
        assert process.wait(30) == 0
    assert "scheduler ended" in site.log.read_text()


def test_what_keeps_it_from_starting(site: Site, tmp_path: Path) -> None:
    site.write(base_dir=tmp_path / "none")
    assert "does not exist" in backyfs("scheduler", "-c", site.config, code=2).err
    site.config.write_text("jobs: {a: {source: {type: file}}}\nglbal: {}\n")
    assert "2 problems" in backyfs("scheduler", "-c", site.config, code=2).err
    assert "is missing" in backyfs("scheduler", "-c", tmp_path / "no", code=2).err


def test_a_base_directory_that_goes_away_is_not_made_anew(site: Site, tmp_path: Path) -> None:
    site.add("web01")
    site.write("2s")
    reason = f'reason="the base directory {site.base} does not exist"'
    with site.scheduler():
        eventually(lambda: site.count("web01"))
        site.base.rename(tmp_path / "elsewhere")
        eventually(lambda: reason in site.log.read_text())
        assert not site.base.exists()
        (tmp_path / "elsewhere").rename(site.base)
        before = site.count("web01")
        eventually(lambda: site.count("web01") > before)


def test_a_bared_mountpoint_is_no_base_directory(site: Site, tmp_path: Path) -> None:
    """The file system of the base goes away under the scheduler; what is there fills no disk."""
    require("mount", "moves what is below the base directory out of sight")
    real = tmp_path / "real"
    real.mkdir()
    site.add("web01")
    site.write("2s")
    run("mount", "--bind", real, site.base)
    try:
        with site.scheduler():
            eventually(lambda: site.count("web01"))
            run("umount", "-l", site.base)
            reason = f"{site.base} is another directory than when the scheduler started"
            eventually(lambda: reason in site.status().get("web01", {}).get("last_reason", ""))
            assert set(os.listdir(site.base)) == {"status"}, "which tells monitoring of it"
            run("mount", "--bind", real, site.base)
            before = site.count("web01")
            eventually(lambda: site.count("web01") > before)
        assert (site.base / ".scheduler.json").exists()
    finally:
        unmount(site.base)


def test_jobs_and_callback_and_what_is_remembered(site: Site, tmp_path: Path) -> None:
    callback = tmp_path / "callback"
    callback.write_text(f"#!/bin/sh\ncat > {tmp_path}/given.$1\nexit 3\n")
    callback.chmod(0o755)
    site.add("web01")
    site.vms["gone"] = tmp_path / "gone.img"
    site.write("2s", backup_completed_callback=callback)
    with site.scheduler():
        eventually((tmp_path / "given.web01").exists)
        eventually(lambda: site.status().get("gone", {}).get("failures", 0) >= 2)
        eventually(lambda: site.status()["gone"]["sla"] == "TOO OLD")
        eventually(lambda: site.status()["gone"]["status"] == "failed")
        row = site.status()["gone"]
        assert row["last_code"] == 13
        assert "No such file" in row["last_reason"]

        def jobs() -> list[dict[str, str]]:
            return backyfs("jobs", "-c", site.config, "--json").json_lines

        assert [row["job"] for row in jobs()] == ["gone", "web01"]
        eventually(lambda: jobs()[0]["status"] == "failed")
        eventually(lambda: jobs()[1]["sla"] == "OK")
        eventually(lambda: "callback failed" in site.log.read_text())
    assert "uuid: " in (tmp_path / "given.web01").read_text()
    assert not (tmp_path / "given.gone").exists()
    table = backyfs("jobs", "-c", site.config, "web*").out
    assert "1 job shown of 2" in table
    remembered = json.loads((site.base / ".scheduler.json").read_text())["jobs"]
    assert remembered["gone"]["failures"] >= 2
    (site.base / ".scheduler.json").write_text("{")
    with site.scheduler():
        before = site.counts()
        eventually(lambda: site.count("web01") > before["web01"])
    assert "memory of the last scheduler is lost" in site.log.read_text()


def test_a_device_as_status_file_is_not_replaced(site: Site, tmp_path: Path) -> None:
    """Such as /dev/null, where somebody wants no status. The memory is written all the same."""
    site.add("web01")
    device = tmp_path / "device"
    os.mkfifo(device)
    site.write("1d", status_file=device)
    with site.scheduler():
        eventually(lambda: (site.base / ".scheduler.json").exists())
    assert device.is_fifo()
    assert "no regular file" in site.log.read_text()


def test_it_warns_of_what_is_no_raw_image(site: Site) -> None:
    require("qemu-img")
    image = site.add("web01")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "4M"], check=True)
    site.write()
    with site.scheduler():
        eventually(lambda: site.has_made("web01", 2))
    told = [line for line in site.log.read_text().splitlines() if "is a qcow2 file" in line]
    assert len(told) == 1
    assert " WARNING " in told[0]


def test_a_command_that_is_killed(site: Site, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho 'backyfs: warning: slow' >&2\nkill -9 $$\n")
    program.chmod(0o755)
    site.add("web01")
    site.write("2s")
    with site.scheduler(BACKY_CMD=str(program)):
        eventually(lambda: site.status().get("web01", {}).get("failures"))
        assert site.status()["web01"]["last_reason"] == "killed by SIGKILL: warning: slow"


def test_a_command_that_cannot_be_started(site: Site) -> None:
    site.add("web01")
    site.write("2s")
    with site.scheduler(BACKY_CMD="/nowhere/program") as process:
        eventually(lambda: site.status().get("web01", {}).get("failures") or process.poll())
        reason = site.status()["web01"]["last_reason"]
        assert reason == "cannot run /nowhere/program: No such file or directory"


def test_a_callback_that_cannot_be_started(site: Site) -> None:
    site.add("web01")
    site.write("2s", backup_completed_callback="/nowhere/callback")
    with site.scheduler() as process:
        eventually(lambda: site.has_made("web01", 2) or process.poll())
        assert process.poll() is None
    assert "callback failed job=web01" in site.log.read_text()


def test_it_tells_of_a_backup_that_it_ended(site: Site, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/runs\nexec sleep 1000\n")
    program.chmod(0o755)
    site.add("web01")
    site.write("2s", stop_timeout="1s")
    with site.scheduler(BACKY_CMD=str(program)) as process:
        eventually((tmp_path / "runs").exists)
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    assert "backup ended unfinished, the scheduler stops job=web01" in site.log.read_text()


def test_what_it_says_of_jobs_when_it_has_ended(site: Site) -> None:
    site.add("web01")
    site.write("2s")
    with site.scheduler():
        eventually(lambda: site.status().get("web01", {}).get("status"))
    assert site.status()["web01"]["status"] == "not scheduled"
    [row] = backyfs("jobs", "-c", site.config, "--json").json_lines
    assert row["status"] == "not scheduled"


def test_it_tells_systemd(site: Site, tmp_path: Path) -> None:
    site.add("web01")
    site.write("1d")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
        with site.scheduler(**env) as process:
            heard = ""

            def hear(text: str) -> None:
                nonlocal heard
                while text not in heard:
                    heard += manager.recv(65536).decode() + "\n"

            for text in ("READY=1", "WATCHDOG=1", "STATUS=1 jobs, 0 running, 0 not within SLA"):
                hear(text)
            heard = ""
            process.send_signal(signal.SIGHUP)
            hear("RELOADING=1\nMONOTONIC_USEC=")
            hear("READY=1")
            process.terminate()
            hear("STOPPING=1")
            assert process.wait(30) == 0


def test_it_ends_while_a_reload_hangs(site: Site) -> None:
    site.add("web01")
    site.write("2s")
    with site.scheduler() as process:
        eventually(lambda: site.count("web01"))
        site.config.unlink()
        os.mkfifo(site.config)  # as a file on a server that does not answer
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    assert "configuration reloaded" not in site.log.read_text()


@pytest.mark.timeout(1800 if FULL else 300)
def test_a_real_run(tmp_path: Path) -> None:
    """Every few seconds a backup of each VM; meanwhile all that happens to a server.

    BACKYFS_REAL_RUN=full: thirty VMs and one-minute intervals.
    """
    require("loop", "a disk that gets full")
    with mounted("ext4", tmp_path, 200 * MIB if FULL else 60 * MIB) as disk:
        site = Site(tmp_path, disk / "srv")
        for n in range(30 if FULL else 5):
            site.add(f"vm{n}")
        site.write("60s" if FULL else "2s")
        with site.scheduler() as process:
            eventually(lambda: site.have_grown(dict.fromkeys(site.vms, 0)), site.counts)
            for _ in range(3):  # workers die
                eventually(site.kill_worker)
            before = site.counts()
            eventually(lambda: site.have_grown(before), site.counts)
            # A broken configuration is refused, and nothing changes.
            good = site.config.read_text()
            site.config.write_text(good + "jbos: {}\n")
            process.send_signal(signal.SIGHUP)
            eventually(lambda: "configuration not reloaded" in site.log.read_text())
            before = site.counts()
            eventually(lambda: site.have_grown(before, 1), site.counts)
            site.config.write_text(good)
            process.kill()  # and so does the scheduler
            process.wait()
        before = site.counts()
        with site.scheduler() as process:
            eventually(lambda: site.have_grown(before, 1), site.counts)
            # The disk gets full: backups fail, say so, and go on when there is room again.
            filler = disk / "filler"
            _fill(filler)
            for image in site.vms.values():
                image.write_bytes(os.urandom(300_000))
            eventually(lambda: "code=14" in site.log.read_text())
            filler.unlink()
            before = site.counts()
            eventually(lambda: site.have_grown(before), site.counts)
            site.write("60s")  # on a busy machine all may never be within three seconds at once
            process.send_signal(signal.SIGHUP)
            eventually(lambda: all(row["sla"] == "OK" for row in site.status().values()))
        _check(site)


def _fill(path: Path) -> None:
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as stream:
        while True:
            stream.write(b"\xaa" * 65536)


def _check(site: Site) -> None:
    """Nothing was lost, no two backups of a VM overlapped, and what is there is good."""
    for name, image in site.vms.items():
        repository = Repository.open(site.base / name)
        records = repository.revisions()
        assert len(records) >= 3
        assert not repository.damage()
        assert not repository.unreadable()
        ends = [record.time.timestamp() + record.stats.seconds for record in records]
        for end, record in zip(ends, records[1:], strict=False):
            assert record.time.timestamp() > end - 0.01
        target = site.directory / "restored"
        backyfs("-b", site.base / name, "restore", "--force", "-r", "latest", target)
        assert target.read_bytes() == image.read_bytes()
        backyfs("-b", site.base / name, "verify", "-r", "all")


@pytest.mark.timeout(200)
def test_a_thousand_jobs_take_little(site: Site, tmp_path: Path) -> None:
    """Memory; `-s` shows how long a reload takes and what idling costs."""
    image = tmp_path / "image"
    image.write_bytes(b"")
    site.vms = {f"vm{n}": image for n in range(1000)}
    site.write("100d")
    with site.scheduler() as process:
        eventually(lambda: len(site.status()) == 1000)
        assert _rss(process.pid) < 100 << 20
        start = time.monotonic()
        text = site.log.read_text()
        process.send_signal(signal.SIGHUP)
        eventually(lambda: "configuration reloaded" in site.log.read_text()[len(text) :])
        print(f"reload {time.monotonic() - start:.2f} s")
        cpu, start = _cpu_s(process.pid), time.monotonic()
        time.sleep(5)
        share = (_cpu_s(process.pid) - cpu) / (time.monotonic() - start)
        print(f"idle {share:.2%} of a core with a status every second")
        assert _rss(process.pid) < 100 << 20
        print(f"RSS {_rss(process.pid) >> 20} MiB")


def _rss(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
