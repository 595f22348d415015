"""Disks with real file systems, for real kernels."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests import images
from tests.filesystems import MIB, run, unmount
from tests.parts import require

PART_SIZE = 24 * MIB
STARTS = (1 * MIB, 25 * MIB)
SIZE = 50 * MIB + 3 * 512
PATTERN = 0xA5
PATTERN_AT, PATTERN_SIZE = 49 * MIB + 96 * 1024, 100_000
"""Where the disk holds nothing but bytes of one value, behind its partitions."""
HELLO = "hello from the past"


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
    (tree / "hello").write_text(f"{HELLO}\n")
    pattern = bytes([PATTERN]) * PATTERN_SIZE
    image = images.sparse_image(directory / "disk.img", SIZE, {PATTERN_AT: pattern})
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
