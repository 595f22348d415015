"""The real parts of the machine that tests use: which are here, and what to do without one.

A missing part is a skip with a reason on a laptop and a failure where BACKYFS_REQUIRE=all is
set (or names the part, in a list separated by commas). A part is one of PARTS or the name of a
program.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Part:
    """Something of the real world: how to find it and which package brings it."""

    look: Callable[[], str | None]
    remedy: str


def _programs(*names: str) -> Callable[[], str | None]:
    """Finds a part that is there when all of these programs are."""

    def look() -> str | None:
        found = [shutil.which(name, path=_PATH) for name in names]
        return found[0] if all(found) else None

    return look


def _module(name: str) -> Callable[[], str | None]:
    def look() -> str | None:
        spec = importlib.util.find_spec(name)
        return (spec.origin or name) if spec else None

    return look


def _root() -> str | None:
    return "uid 0" if os.geteuid() == 0 else None


def _fuse() -> str | None:
    helper = shutil.which("fusermount3", path=_PATH)
    return helper if helper and os.access("/dev/fuse", os.R_OK | os.W_OK) else None


def _loop() -> str | None:
    usable = _root() and os.access("/dev/loop-control", os.R_OK | os.W_OK)
    return shutil.which("losetup", path=_PATH) if usable else None


def _mountable(kind: str) -> Callable[[], str | None]:
    """Finds mkfs for a file system of `kind`, if loop devices can be mounted."""

    def look() -> str | None:
        return shutil.which(f"mkfs.{kind}", path=_PATH) if _loop() else None

    return look


def _device_mapper() -> str | None:
    """LVM's program, if the kernel lets us make volumes."""
    usable = _loop() and os.path.exists("/dev/mapper/control")
    return shutil.which("lvcreate", path=_PATH) if usable else None


def _vm() -> str | None:
    """QEMU and what the machine in tests/nbd/machine.py is made of."""
    kernel = KERNEL / "vmlinuz"
    programs = _programs("qemu-system-x86_64", "busybox", "nbd-client", "cpio")()
    return programs if kernel.exists() else None


def _systemd() -> str | None:
    """The daemon itself, and what puts it into namespaces (tests/contrib/host.py)."""
    daemon = "/lib/systemd/systemd"
    ready = _root() and _programs("unshare", "nsenter", "ip")() and os.access(daemon, os.X_OK)
    return daemon if ready else None


def _ceph() -> str | None:
    """The daemons of a cluster and its programs, and the binding."""
    programs = _programs("ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool", "rbd")()
    return programs if _module("rbd")() else None


_PATH = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"

KERNEL = Path(sys.prefix) / "kernel"
"""Where contrib/test-kernel.sh puts the kernel of the tests' virtual machine."""

PARTS = {
    "root": Part(_root, "run the tests as root"),
    "fuse": Part(_fuse, "apt install fuse3, and give access to /dev/fuse"),
    "loop": Part(_loop, "run as root where /dev/loop-control is"),
    "ext4": Part(_mountable("ext4"), "apt install e2fsprogs; loop devices"),
    "xfs": Part(_mountable("xfs"), "apt install xfsprogs; loop devices"),
    "btrfs": Part(_mountable("btrfs"), "apt install btrfs-progs; loop devices"),
    "lvm": Part(_device_mapper, "apt install lvm2; loop devices and the device mapper"),
    "qemu-ga": Part(_programs("qemu-ga", "busybox"), "apt install qemu-guest-agent busybox-static"),
    "qemu-img": Part(_programs("qemu-img"), "apt install qemu-utils"),
    "strace": Part(_programs("strace"), "apt install strace"),
    "rsync": Part(_programs("rsync"), "apt install rsync"),
    "telnet": Part(_programs("telnet"), "apt install inetutils-telnet"),
    "systemd-analyze": Part(_programs("systemd-analyze"), "apt install systemd"),
    "systemd": Part(_systemd, "apt install systemd iproute2"),
    "debugfs": Part(_programs("debugfs", "mkfs.ext4"), "apt install e2fsprogs"),
    "promtool": Part(_programs("promtool"), "apt install prometheus"),
    "sfdisk": Part(_programs("sfdisk"), "apt install fdisk"),
    "vm": Part(
        _vm, "apt install qemu-system-x86 busybox-static nbd-client cpio; make setup; amd64 only"
    ),
    "fio": Part(_programs("fio"), "apt install fio"),
    "libnbd": Part(
        _programs("nbdinfo", "nbdcopy", "nbddump", "nbdsh", "nbdfuse"),
        "apt install libnbd-bin python3-libnbd",
    ),
    "nbd-client": Part(_programs("nbd-client"), "apt install nbd-client"),
    "nbdkit": Part(_programs("nbdkit"), "apt install nbdkit"),
    "qemu-storage-daemon": Part(_programs("qemu-storage-daemon"), "apt install qemu-system-common"),
    "certtool": Part(_programs("certtool"), "apt install gnutls-bin"),
    "rbd": Part(_module("rbd"), "apt install python3-rbd, then: make setup"),
    "ceph": Part(
        _ceph, "apt install ceph-mon ceph-osd ceph-common python3-rbd python3-rados; make setup"
    ),
}

# What a machine of the kind that builds the project need not have even under BACKYFS_REQUIRE=all:
# its kernel decides, not its packages.
OF_THE_KERNEL = frozenset({"lvm"})


@functools.cache
def found(part: str) -> str | None:
    """Where `part` is, or None."""
    known = PARTS.get(part)
    return known.look() if known else shutil.which(part, path=_PATH)


def _demanded(part: str) -> bool:
    wanted = os.environ.get("BACKYFS_REQUIRE", "").split(",")
    return part in wanted or ("all" in wanted and part not in OF_THE_KERNEL)


def require(part: str, reason: str = "") -> str:
    """Return where `part` is; without it skip the test, or fail where it is demanded.

    `reason` says what the test needs it for.
    """
    where = found(part)
    if where:
        return where
    remedy = PARTS[part].remedy if part in PARTS else f"install the program {part}"
    message = f"needs {part}{f' ({reason})' if reason else ''}: {remedy}"
    if _demanded(part):
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def summary() -> list[str]:
    """Two lines for the head of a test run: the parts found and the parts missing."""
    here = [name for name in PARTS if found(name)]
    gone = [name for name in PARTS if not found(name)]
    lines = [f"real parts found: {', '.join(here) or 'none'}"]
    if gone:
        lines.append(f"real parts missing: {', '.join(gone)}")
    return lines
