"""The recipe of docs/operations.md: boot a machine from its backup, move it while it runs.

The guest writes numbered files all the time: before its disk is moved from a writable export to a
file, while that goes on, and after; then the server is gone. All of them must be in the file.
"""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

from tests import images
from tests.filesystems import run
from tests.nbd import machine
from tests.nbd.disks import HELLO, SIZE, STARTS
from tests.nbd.qmp import Monitor
from tests.nbd.service import serving
from tests.nbd.site import Site
from tests.parts import require

_JOB = """
stty -echo </dev/console
(read line; touch /tmp/stop) </dev/console &
mount -t ext4 /dev/vda1 /mnt
report hello $(cat /mnt/hello)
number=0
while [ ! -e /tmp/stop ]; do
    number=$((number + 1))
    dd if=/dev/urandom of=/mnt/file$number bs=32k count=1 2>/dev/null && sync
    report file$number $(sha256sum /mnt/file$number | cut -d ' ' -f 1)
done
umount /mnt
"""


class Console:
    """What a guest reports, read as it comes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._input, self._output = process.stdin, process.stdout
        self.said = ""

    @property
    def results(self) -> dict[str, str]:
        return machine.results(self.said)

    def wait_for(self, name: str) -> str:
        """Read until this is reported."""
        while name not in self.results:
            line = self._output.readline()
            assert line, f"{name} was never reported:\n{self.said}"
            self.said += line
        return self.results[name]

    def wait_for_more_files(self, count: int) -> int:
        """Until `count` files more are written; the number of the last one."""
        last = sum(name.startswith("file") for name in self.results) + count
        self.wait_for(f"file{last}")
        return last

    def stop(self) -> None:
        """Tell the guest to come to an end, and wait for it."""
        self._input.write("stop\n")
        self._input.flush()
        self.wait_for("end")


def test_a_guest_boots_from_its_backup_and_moves_while_it_runs(
    site: Site, vm: machine.Machine, tmp_path: Path
) -> None:
    store = site.fingerprint("packs")
    target, raw = tmp_path / "new.qcow2", tmp_path / "new.img"
    run(require("qemu-img"), "create", "-q", "-f", "qcow2", target, SIZE)
    monitor_path = tmp_path / "qmp"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(contextlib.ExitStack())
        service = server.enter_context(serving(site.base, tmp_path / "log"))
        options = _options(service.port, "packs/latest@rw", monitor_path)
        console = Console(stack.enter_context(vm.started(_JOB, *options)))
        monitor = stack.enter_context(Monitor(monitor_path))
        assert console.wait_for("hello") == HELLO
        console.wait_for_more_files(2)
        _move(monitor, target, console)
        server.close()
        console.wait_for_more_files(2)
        console.stop()
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", target, raw)
    run("e2fsck", "-f", "-n", f"{raw}?offset={STARTS[0]}")
    written = {name: it for name, it in console.results.items() if name.startswith("file")}
    assert len(written) >= 8
    for name, checksum in written.items():
        assert images.digest(_file_in(raw, name)) == checksum
    assert site.fingerprint("packs") == store


def _options(port: int, export: str, monitor: Path) -> list[str]:
    where = f"server.type=inet,server.host=127.0.0.1,server.port={port},export={export}"
    return [
        *("-blockdev", f"driver=nbd,node-name=backup,{where}"),
        *("-device", "virtio-blk-pci,drive=backup"),
        *("-qmp", f"unix:{monitor},server=on,wait=off"),
    ]


def _move(monitor: Monitor, target: Path, console: Console) -> None:
    file = {"driver": "file", "filename": str(target)}
    monitor("blockdev-add", driver="qcow2", node_name="new", file=file)
    monitor("blockdev-mirror", job_id="move", device="backup", target="new", sync="full")
    console.wait_for_more_files(2)
    monitor.wait("BLOCK_JOB_READY")
    console.wait_for_more_files(2)
    monitor("block-job-complete", device="move")
    assert "error" not in monitor.wait("BLOCK_JOB_COMPLETED")
    monitor("blockdev-del", node_name="backup")


def _file_in(image: Path, name: str) -> bytes:
    """A file of the first partition."""
    command = ["debugfs", "-R", f"cat /{name}", f"{image}?offset={STARTS[0]}"]
    return subprocess.run(command, capture_output=True, check=True).stdout
