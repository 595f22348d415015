"""A small virtual machine with a real Linux kernel, for what the kernel at hand cannot do.

It runs under QEMU without any acceleration (a boot takes about four seconds), needs no root, and
holds a busybox, nbd-client and the modules that contrib/test-kernel.sh fetched. A job is a shell
script; its console comes back as text. Jobs report by lines `= NAME VALUE`, which `results` reads.
The host is at 10.0.2.2, and ports bound to its loopback can be reached there.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.parts import KERNEL, require

HOST = "10.0.2.2"
BOOT_S = 100

_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
# There is no list of what depends on what: a module that comes too early is tried again.
for pass in 1 2 3 4; do
    for module in /modules/*.ko; do insmod $module 2>/dev/null && rm $module; done
done
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
report() { echo "= $*"; }
. /job.sh
report end
poweroff -f
"""


class JobFailed(Exception):
    """The machine did not get to the end of its job."""


@dataclass(frozen=True)
class Machine:
    """The kernel and the base of the initial RAM disk; each `run` boots it anew."""

    base: bytes

    def run(self, job: str, *options: str) -> str:
        """Boot, run a job (a shell script), power off; what the console said.

        `options` are more of QEMU's. JobFailed when the job does not end by itself.
        """
        with self.started(job, *options) as process:
            try:
                console, _ = process.communicate(timeout=BOOT_S)
            except subprocess.TimeoutExpired as exc:
                process.kill()
                console, _ = process.communicate()
                raise JobFailed(f"not done after {BOOT_S} s:\n{console}") from exc
        if "end" not in results(console):
            raise JobFailed(console)
        return console

    @contextlib.contextmanager
    def started(self, job: str, *options: str) -> Iterator[subprocess.Popen[str]]:
        """The machine at work; its console is `stdin` and `stdout`. It is killed at the end."""
        with tempfile.TemporaryDirectory() as scratch:
            initrd = Path(scratch) / "initrd"
            initrd.write_bytes(self.base + _archive({"job.sh": job.encode()}))
            process = subprocess.Popen(
                [*_QEMU, "-kernel", KERNEL / "vmlinuz", "-initrd", initrd, *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            try:
                yield process
            finally:
                process.kill()
                process.wait()
                for stream in (process.stdin, process.stdout):
                    assert stream is not None
                    stream.close()


def results(console: str) -> dict[str, str]:
    """What a job reported, by name."""
    found = re.findall(r"^= (\S+) ?(.*?)\r?$", console, flags=re.MULTILINE)
    return {name: value.strip() for name, value in found}


def assemble(*more: str) -> Machine:
    """The machine, with `more` programs; skips the test where a part of it is missing."""
    require("vm")
    files: dict[str, bytes] = {}
    for name in ("nbd-client", *more):
        program = require(name)
        files |= {str(path).lstrip("/"): path.read_bytes() for path in _libraries(program)}
        files[f"usr/sbin/{name}"] = Path(program).read_bytes()
    files["bin/busybox"] = Path(require("busybox")).read_bytes()
    files["init"] = _INIT.encode()
    files.update({f"modules/{path.name}": path.read_bytes() for path in KERNEL.glob("*.ko")})
    return Machine(_archive(files))


_QEMU = (
    *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg", "-cpu", "qemu64", "-m", "384"),
    *("-smp", "1", "-nodefaults", "-serial", "stdio", "-display", "none", "-no-reboot"),
    *("-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0,romfile="),
    *("-append", "console=ttyS0 panic=-1 quiet"),
)


def _libraries(program: str) -> Iterator[Path]:
    """The shared libraries a program loads, and the loader."""
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    yield from map(Path, re.findall(r"(/\S+) \(", said))


def _archive(files: dict[str, bytes]) -> bytes:
    """A compressed cpio archive for the kernel; every file can be executed."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for directory in ("proc", "sys", "dev", "mnt", "tmp") if "init" in files else ():
            (root / directory).mkdir()
        for name, data in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.chmod(0o755)
        return gzip.compress(_cpio(root, sorted(_names(root))), 1)


def _names(root: Path) -> Iterator[str]:
    for directory, subdirectories, names in os.walk(root):
        at = Path(directory).relative_to(root)
        yield from (str(at / name) for name in (*subdirectories, *names))


def _cpio(root: Path, names: Sequence[str]) -> bytes:
    done = subprocess.run(
        [require("cpio"), "-o", "-H", "newc", "-R", "0:0", "--quiet"],
        input="".join(f"{name}\n" for name in names).encode(),
        cwd=root,
        capture_output=True,
        check=True,
    )
    return done.stdout
