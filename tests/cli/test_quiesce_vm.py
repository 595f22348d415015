"""A whole virtual machine that writes, with the guest agent on QEMU's own virtio channel."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from backyfs.source.quiescing import note
from tests.cli.program import PROGRAM, backyfs, environment
from tests.cli.test_quiesce import configure, is_clean, newest
from tests.filesystems import MIB, run
from tests.nbd import machine
from tests.parts import require
from tests.source.quiescing.test_freeze import until

JOB = """
mount -t ext4 /dev/vda /mnt
mkdir -p /var/run
qemu-ga -m virtio-serial -p /dev/vport*p1 -t /tmp &
n=0
while :; do
    n=$((n + 1))
    echo $n > /mnt/new && sync && mv /mnt/new /mnt/file$((n % 7))
    report at $n
done
"""


@dataclass
class Vm:
    """A machine at work. `said`: what its console said so far."""

    image: Path
    agent: Path
    said: list[str] = field(default_factory=list)

    @property
    def at(self) -> int:
        """How often the guest has written."""
        return int(machine.results("".join(self.said)).get("at", 0))

    def goes_on(self) -> None:
        """Wait until the guest has written again."""
        before = self.at
        until(lambda: self.at > before, machine.BOOT_S)


@pytest.fixture
def vm(xfs_dir: Path, tmp_path: Path) -> Iterator[Vm]:
    found = Vm(xfs_dir / "vm.img", tmp_path / "agent")
    with open(found.image, "xb") as stream:
        stream.truncate(32 * MIB)
    run(require("mkfs.ext4"), "-q", found.image)
    options = (
        *("-drive", f"file={found.image},if=virtio,format=raw,cache=writeback"),
        *("-device", "virtio-serial"),
        *("-chardev", f"socket,id=qga0,path={found.agent},server=on,wait=off"),
        *("-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0"),
    )
    with machine.assemble("qemu-ga").started(JOB, *options) as process:
        reader = threading.Thread(target=_listen, args=(process, found))
        reader.start()
        try:
            until(lambda: found.at > 3, 2 * machine.BOOT_S)
            yield found
        finally:
            process.kill()
            reader.join()


def _listen(process: subprocess.Popen[str], vm: Vm) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        vm.said.append(line)


@pytest.mark.timeout(600)
def test_a_machine_at_work(vm: Vm, tmp_path: Path) -> None:
    directory, restored = tmp_path / "web01", tmp_path / "restored.img"
    backyfs("-b", directory, "init", "file", vm.image)
    backyfs("-b", directory, "backup", "daily")
    backyfs("-b", directory, "restore", restored)
    assert not is_clean(restored), "the guest is idle: it proves nothing"

    configure(directory, agent=str(vm.agent), policy="require")
    backyfs("-b", directory, "backup", "daily")
    assert newest(directory)["consistency"] == "filesystem"
    vm.goes_on()
    restored.unlink()
    backyfs("-b", directory, "restore", restored)
    assert is_clean(restored)

    _kill_while_frozen(vm, directory)
    backyfs("-b", directory, "backup", "daily")
    vm.goes_on()


def _kill_while_frozen(vm: Vm, directory: Path) -> None:
    """Stop a backup while its guard freezes the guest, and kill it a moment later."""
    with subprocess.Popen(
        [PROGRAM, "-b", directory, "backup", "daily"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    ) as process:
        until(note.place(directory).exists)
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGKILL)
    until(lambda: not note.place(directory).exists())
    vm.goes_on()
