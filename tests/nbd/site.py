"""A base directory with VMs in both formats, made by the real program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests import images
from tests.cli.program import backyfs
from tests.filesystems import run
from tests.nbd.disks import Disk, make_disk

TIB = 1 << 40
FRAME = 64 * 1024
STORES = ("packs", "cow")
PIECES = {0: b"first", TIB // 3 + 5: b"middle" * 1000, TIB - 4096: b"\xff" * 4096}
"""What the disk of 1 TiB holds, by offset."""


@dataclass(frozen=True)
class Site:
    """Below `base`: for each format a VM named like it and one `huge-…`.

    A VM named like a format has two revisions: the first, tagged `daily`, has the bytes of
    `before`, the latest those of `disk.image`.
    """

    base: Path
    disk: Disk
    before: Path

    def ids(self, vm: str) -> list[str]:
        """Revision ids of a VM, oldest first."""
        status = backyfs("-b", self.base / vm, "status", "--json").json
        return [revision["id"] for revision in status["revisions"]]

    def fingerprint(self, vm: str) -> dict[str, str]:
        """The checksum of every file of a VM, by its path."""
        root = self.base / vm
        return {
            str(path.relative_to(root)): images.checksum(path)
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }


def make_site(base: Path, scratch: Path) -> Site:
    """Make it on a file system that can reflink; images lie in `scratch`."""
    disk = make_disk(scratch)
    source, before = scratch / "source.img", scratch / "before.img"
    _copy(disk.image, before)
    images.change_blocks(before, 9, seed=3)
    _copy(before, source)
    huge = images.sparse_image(scratch / "huge.img", TIB, PIECES)
    for store in STORES:
        vm = base / store
        backyfs("-b", vm, "init", "--store", store, "file", source)
        _copy(before, source)
        backyfs("-b", vm, "backup", "daily")
        _copy(disk.image, source)
        backyfs("-b", vm, "backup", "manual:before upgrade")
        backyfs("-b", base / f"huge-{store}", "init", "--store", store, "file", huge)
        backyfs("-b", base / f"huge-{store}", "backup", "--no-verify", "daily")
    return Site(base, disk, before)


def _copy(source: Path, target: Path) -> None:
    run("cp", "--sparse=always", source, target)
