"""The kernel's own client: a small virtual machine attaches exports, mounts what is in them.

One boot per store does it all; each test looks at a part of what the machine reported.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import images
from tests.filesystems import MIB, run, unmount
from tests.nbd import machine
from tests.parts import require

PART_SIZE = 24 * MIB
STARTS = (1 * MIB, 25 * MIB)
SIZE = 50 * MIB


@dataclass(frozen=True)
class Disk:
    """A disk of two ext4 partitions: the first clean, the second as a crash left it."""

    image: Path
    checksum: str
    """SHA-256 of the file `data` in the first partition."""
    late: str
    """SHA-256 of the file `late` in the second one, which only its journal knows."""


def make_disk(directory: Path) -> Disk:
    """Two partitions; the second is copied while it is mounted, right after a sync."""
    tree = directory / "tree"
    tree.mkdir()
    data = images.random_image(tree / "data", 3 * MIB + 77)
    (tree / "hello").write_text("hello from the past\n")
    image = images.sparse_image(directory / "disk.img", SIZE)
    table = "".join(f"start={s // 512}, size={PART_SIZE // 512}, type=linux\n" for s in STARTS)
    sfdisk = require("sfdisk"), "--quiet", "--label", "gpt", str(image)
    subprocess.run(sfdisk, input=table, text=True, check=True)
    clean = images.sparse_image(directory / "clean", PART_SIZE)
    run("mkfs.ext4", "-q", "-F", "-d", tree, clean)
    dirty, late = _crashed(clean, directory)
    for part, start in zip((clean, dirty), STARTS, strict=True):
        run("dd", f"if={part}", f"of={image}", "bs=1M", f"seek={start // MIB}", "conv=notrunc")
    return Disk(image, images.checksum(data), late)


def _crashed(clean: Path, directory: Path) -> tuple[Path, str]:
    """A copy of a file system as it is right after a file was written and synced; that file."""
    require("loop")
    mountpoint, part, copy = (directory / name for name in ("mnt", "part", "crashed"))
    mountpoint.mkdir()
    shutil.copy(clean, part)
    run("mount", "-o", "loop", part, mountpoint)
    try:
        late = images.random_image(mountpoint / "late", 100_000, seed=1)
        run("sync", "-f", mountpoint)
        shutil.copy(part, copy)
        found = copy, images.checksum(late)
    finally:
        unmount(mountpoint)
    features = subprocess.run(["dumpe2fs", "-h", copy], capture_output=True, text=True).stdout
    assert "needs_recovery" in features
    return found


_FUNCTIONS = f"""
host={machine.HOST}
attach() {{ # DEVICE PORT NAME [OPTION...]; makes the kernel look for partitions, too
    local device=$1 at=$2 export=$3; shift 3
    nbd-client -N "$export" $host $at /dev/$device "$@" || report $device-refused
    dd if=/dev/$device of=/dev/null bs=512 count=1 2>/dev/null
}}
checksum() {{ sha256sum $1 | cut -d ' ' -f 1; }}
partitions() {{ ls -d /sys/block/$1/$1p* | wc -l; }}
"""

# $vm: what names shall begin with in the report · $port, $name: the export.
_READ_ONLY = """
attach nbd0 $port "$name" -C 4
report $vm.read-only $(cat /sys/block/nbd0/ro)
report $vm.sectors $(cat /sys/block/nbd0/size)
report $vm.partitions $(partitions nbd0)
mount -t ext4 -o ro /dev/nbd0p1 /mnt && report $vm.clean $(checksum /mnt/data) && umount /mnt
mount -t ext4 -o ro /dev/nbd0p2 /mnt 2>&1 && report $vm.dirty-mounted && umount /mnt
mount -t ext4 -o ro,noload /dev/nbd0p2 /mnt && report $vm.noload $(cat /mnt/hello) && umount /mnt
dd if=/dev/zero of=/dev/nbd0 bs=4096 count=1 conv=fsync 2>/dev/null && report $vm.written
nbd-client -d /dev/nbd0
report $vm.detached $([ -e /sys/block/nbd0/pid ] || echo yes)
"""

_WRITABLE = """
attach nbd1 $port "$name@rw"
report $vm.rw.read-only $(cat /sys/block/nbd1/ro)
mount -t ext4 /dev/nbd1p2 /mnt
report $vm.rw.late $(checksum /mnt/late)
echo 'new and gone' > /mnt/new && dd if=/mnt/late of=/mnt/more bs=4k 2>/dev/null && sync
umount /mnt
mount -t ext4 -o ro /dev/nbd1p2 /mnt
report $vm.rw.new $(cat /mnt/new)
report $vm.rw.more $(checksum /mnt/more)
umount /mnt
nbd-client -d /dev/nbd1
attach nbd1 $port "$name@rw"
mount -t ext4 /dev/nbd1p2 /mnt
report $vm.again.new $([ -e /mnt/new ] && echo kept)
report $vm.again.late $(checksum /mnt/late)
umount /mnt
nbd-client -d /dev/nbd1
"""

_PARTITION = """
attach nbd2 $port "$name/p1"
report $vm.p1.sectors $(cat /sys/block/nbd2/size)
mount -t ext4 -o ro /dev/nbd2 /mnt && report $vm.p1.clean $(checksum /mnt/data) && umount /mnt
nbd-client -d /dev/nbd2
"""

_ALL = _READ_ONLY + _WRITABLE + _PARTITION
