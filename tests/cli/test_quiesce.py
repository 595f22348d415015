"""Backups of a guest that is frozen meanwhile, through the program: a real guest agent and a real
file system under writes; policies; kill -9; what a crash leaves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import yaml

from backyfs.config.job import read_job
from backyfs.config.site import SiteJob
from backyfs.engine.scheduling.base import Base
from backyfs.engine.scheduling.processes import Processes
from backyfs.source.quiescing import note
from tests.cli.conftest import Vm
from tests.cli.program import PROGRAM, backyfs, environment, refused
from tests.parts import require
from tests.source.quiescing import guest
from tests.source.quiescing.fake import FakeAgent
from tests.source.quiescing.test_freeze import FREEZE, THAW, until

WRITER = """
cd "$0" || exit
n=0
while :; do
    n=$((n + 1))
    dd if=/dev/urandom of=new bs=4096 count=8 conv=fsync 2>/dev/null
    mv new file$((n % 20))
done
"""


@contextlib.contextmanager
def written_to(directory: Path) -> Iterator[None]:
    """A guest at work: its journal is never empty."""
    process = subprocess.Popen(["sh", "-c", WRITER, directory], start_new_session=True)
    try:
        until(lambda: (directory / "file19").exists())
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_clean(image: Path) -> bool:
    """Whether an ext4 needs no recovery, and has no fault."""
    superblock = subprocess.run(
        [require("dumpe2fs"), "-h", image], capture_output=True, text=True, check=True
    ).stdout
    if "needs_recovery" in superblock:
        return False
    done = subprocess.run(
        [require("e2fsck"), "-fn", image], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return True


def configure(directory: Path, **quiesce: object) -> None:
    """Give the VM's job a section `quiesce`."""
    path = directory / "config"
    value = yaml.safe_load(path.read_text())
    value["quiesce"] = {key.replace("_", "-"): item for key, item in quiesce.items()}
    path.write_text(yaml.safe_dump(value))


def newest(directory: Path) -> dict[str, object]:
    revision: dict[str, object] = backyfs("-b", directory, "status", "--json").json["revisions"][-1]
    return revision


def test_a_frozen_guest_at_work_mounts_clean(reflink_dir: Path) -> None:
    directory, restored = reflink_dir / "srv" / "web01", reflink_dir / "restored.img"
    with guest.running(reflink_dir) as running, written_to(running.data):
        backyfs("-b", directory, "init", "file", running.image)
        backyfs("-b", directory, "backup", "daily")
        assert newest(directory)["consistency"] == "crash"
        backyfs("-b", directory, "restore", "-r", "latest", restored)
        assert not is_clean(restored), "the guest is idle: it proves nothing"
        configure(directory, agent=str(running.agent), policy="require")
        done = backyfs("-b", directory, "backup", "--json", "daily")
        revision = done.json_lines[-1]
        assert revision["consistency"] == "filesystem"
        assert revision["quiescing"] == "done"
        assert 0 < revision["freeze_seconds"] < 10
        assert "(1 file system)" in revision["reason"]
        assert done.err == ""
        restored.unlink()
        backyfs("-b", directory, "restore", "-r", "latest", restored)
        assert is_clean(restored)
        assert running.hook_log == ["freeze", "thaw"]


@pytest.fixture
def fake(vm: Vm, xfs_dir: Path, tmp_path: Path) -> Iterator[FakeAgent]:
    """An agent for `vm`, whose image is where it can be cloned."""
    image = xfs_dir / "web01.img"
    subprocess.run(["cp", vm.image, image], check=True)
    config = vm.directory / "config"
    config.write_text(config.read_text().replace(str(vm.image), str(image)))
    with FakeAgent(tmp_path / "agent") as agent:
        configure(vm.directory, agent=str(agent.path), consistency="application")
        yield agent


def test_it_is_recorded_and_shown(vm: Vm, fake: FakeAgent) -> None:
    said = backyfs("-b", vm.directory, "backup", "daily")
    assert "; application, verified; daily" in said.out
    assert said.err == ""
    revision = newest(vm.directory)
    assert revision["consistency"] == "application"
    assert revision["quiescing"] == "done"
    metrics = vm.directory.parent / "x.prom"
    backyfs("-b", vm.directory.parent, "check", "--metrics", metrics, code=None)
    found = [line for line in metrics.read_text().splitlines() if "freeze_seconds{" in line]
    assert len(found) == 1
    assert float(found[0].split()[-1]) > 0
    backyfs("copy", vm.directory, vm.directory.parent / "copy")
    assert newest(vm.directory.parent / "copy")["quiescing"] == "done"


def test_who_prefers_it_is_warned(vm: Vm, fake: FakeAgent) -> None:
    fake.faults[FREEZE] = ["refuse"]
    said = backyfs("-b", vm.directory, "backup", "daily")
    assert "guest not quiesced: the guest agent says: refused for a test" in said.err
    revision = newest(vm.directory)
    assert (revision["consistency"], revision["quiescing"]) == ("crash", "failed")
    assert fake.frozen == 0


@pytest.mark.parametrize("how", ["require", "strict"])
def test_who_requires_it_gets_no_revision(vm: Vm, fake: FakeAgent, how: str) -> None:
    fake.faults[FREEZE] = ["refuse"]
    before = vm.ids
    strict = ["--strict"] if how == "strict" else []
    configure(vm.directory, agent=str(fake.path), policy="prefer" if strict else "require")
    said = refused("-q", "-b", vm.directory, "backup", *strict, "daily", code=13)
    assert said == "web01: the guest was not frozen: the guest agent says: refused for a test"
    assert vm.ids == before
    assert fake.frozen == 0
    assert backyfs("-b", vm.directory, "backup", *strict, "daily").err == ""
    assert newest(vm.directory)["consistency"] == "filesystem"


def test_an_image_that_is_read_live(vm: Vm, tmp_path: Path) -> None:
    config = vm.directory / "config"
    config.write_text(config.read_text().replace("filename:", "reflink: never\n  filename:"))
    with FakeAgent(tmp_path / "agent") as agent:
        configure(vm.directory, agent=str(agent.path))
        said = backyfs("-b", vm.directory, "backup", "daily")
        assert "freezing is of no use where disks are read live" in said.err
        assert agent.frozen == 0


def test_commands_of_the_operator(vm: Vm, fake: FakeAgent, tmp_path: Path) -> None:
    told = tmp_path / "told"
    line = f"echo $BACKYFS_ACTION $BACKYFS_VM $BACKYFS_DIRECTORY | tee -a {told}"
    configure(vm.directory, freeze_command=["sh", "-c", line], thaw_command=f"sh -c '{line}'")
    backyfs("-b", vm.directory, "backup", "daily")
    assert told.read_text().splitlines() == [
        f"{action} web01 {vm.directory}" for action in ("freeze", "thaw")
    ]
    assert 'action=freeze code=0 output="freeze web01' in (vm.directory / "backy.log").read_text()
    os.chmod(vm.directory / "config", 0o666)
    assert "has commands to run" in refused("-b", vm.directory, "backup", "daily", code=2)


def test_a_copy_makes_no_strangers_commands_ours(vm: Vm, tmp_path: Path) -> None:
    configure(vm.directory, freeze_command="true", thaw_command="true")
    os.chmod(vm.directory / "config", 0o666)
    assert "has commands to run" in refused("copy", vm.directory, tmp_path / "copy", code=2)
    assert not (tmp_path / "copy").exists()
    os.chmod(vm.directory / "config", 0o640)
    backyfs("copy", vm.directory, tmp_path / "copy")
    config = (vm.directory / "config").read_text()
    assert (tmp_path / "copy/config").read_text() == config


def freezing(vm: Vm) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [PROGRAM, "-b", vm.directory, "backup", "daily"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    )


def test_killed_while_the_guest_is_frozen(vm: Vm, fake: FakeAgent) -> None:
    fake.faults[FREEZE] = ["lose"]  # frozen, and everybody waits for the answer
    before = vm.ids
    process = freezing(vm)
    until(lambda: fake.frozen > 0)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: fake.frozen == 0)
    until(lambda: not note.place(vm.directory).exists())
    assert vm.ids == before
    backyfs("-b", vm.directory, "backup", "daily")
    assert newest(vm.directory)["quiescing"] == "done"


def test_killed_while_a_command_freezes(vm: Vm, fake: FakeAgent, tmp_path: Path) -> None:
    thawed = tmp_path / "thawed"
    configure(vm.directory, freeze_command="sleep 600", thaw_command=f"touch {thawed}")
    process = freezing(vm)
    until(note.place(vm.directory).exists)
    process.kill()
    process.wait()
    until(lambda: not note.place(vm.directory).exists())
    assert thawed.exists()


@pytest.fixture
def left_frozen(vm: Vm, fake: FakeAgent) -> Path:
    """The VM's directory after the host of the backups lost power."""
    from backyfs.source.quiescing.plan import Plan

    quiesce = read_job(vm.directory / "config").quiesce
    assert quiesce is not None
    note.place(vm.directory).write_bytes(Plan("web01", vm.directory, quiesce, thaw_s=0.2).encode())
    fake.frozen = 2
    return vm.directory


def test_thaw(left_frozen: Path, fake: FakeAgent) -> None:
    found = backyfs("-b", left_frozen.parent, "check", "--json", code=2).json["findings"]
    assert [f["text"] for f in found if f["kind"] == "frozen"] == [
        f"a killed backup left the guest frozen: run backyfs -b {left_frozen} thaw"
    ]
    done = backyfs("-b", left_frozen, "thaw", "--json")
    assert done.json == {"message_type": "thaw", "vm": "web01", "result": "thawed"}
    assert fake.frozen == 0
    found = backyfs("-b", left_frozen.parent, "check", "--json", code=None).json["findings"]
    assert not [f for f in found if f["kind"] == "frozen"]
    fake.frozen = 2  # by whomever
    assert backyfs("-b", left_frozen, "thaw").out == "web01: thawed\n"
    assert fake.frozen == 0


def test_thaw_without_an_agent(left_frozen: Path, fake: FakeAgent) -> None:
    fake.stop()
    said = refused("-q", "-b", left_frozen, "thaw", code=13)
    assert "the guest may be frozen since a backup was killed: cannot reach the guest" in said
    assert note.place(left_frozen).exists()
    assert backyfs("-b", left_frozen, "thaw", "--forget").out == "web01: forgotten\n"
    assert not note.place(left_frozen).exists()


def test_thaw_of_a_job_that_freezes_nothing(vm: Vm) -> None:
    assert "does not say how" in refused("-b", vm.directory, "thaw", code=2)


@pytest.mark.parametrize("keys", [{"policy": "never"}, None])
def test_the_next_backup_thaws_whatever_the_job_says(
    left_frozen: Path, fake: FakeAgent, keys: dict[str, object] | None
) -> None:
    path = left_frozen / "config"
    value = yaml.safe_load(path.read_text())
    value.pop("quiesce")
    path.write_text(yaml.safe_dump(value | ({"quiesce": keys} if keys else {})))
    backyfs("-b", left_frozen, "backup", "daily")
    assert fake.frozen == 0
    assert FREEZE not in fake.calls
    assert newest(left_frozen)["quiescing"] == "none"


def test_the_scheduler_thaws_when_it_starts(left_frozen: Path, fake: FakeAgent) -> None:
    job = SiteJob("web01", read_job(left_frozen / "config"))
    world = Processes(Base(left_frozen.parent), Path("/etc/backy.conf"))
    trio.run(world.settle, job)
    assert fake.frozen == 0
    assert THAW in fake.calls
    trio.run(world.settle, job)
