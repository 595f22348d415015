"""Acceptance, from outside: ten states of a disk come back byte for byte, whatever way they went.

Each disk (tests/guests.py) is backed up in each of its states into three stores: `packs` on ext4,
`cow` on XFS and on btrfs. What must come back is the checksum that the source had at that time:
by `restore` to a file, to stdout and to a block device, through the mount, after `copy` into the
other format, and by contrib/restore_packs.py. The digests of a state are the same everywhere.

By default the disks are small and each revision of a store comes back by one way of `restore`, in
turn; each state by all of them, since the stores begin differently. BACKYFS_HISTORY_MIB is another
size of the disks, and then every revision comes back by every way. 2048 takes about 20 minutes and
8 GiB below the temporary directory for each of the three disks; run one at a time (-k).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import images
from tests.cli import program
from tests.cli.program import PROGRAM, backyfs, environment
from tests.filesystems import MIB
from tests.guests import DISKS, STATES, Disk, attached
from tests.mount.mounts import watched
from tests.parts import require

THOROUGH = "BACKYFS_HISTORY_MIB" in os.environ
SIZE = int(os.environ.get("BACKYFS_HISTORY_MIB", "64")) * MIB
PATIENCE_S = 120 + SIZE // MIB
SCRIPT = Path(__file__).parent.parent / "contrib" / "restore_packs.py"


@dataclass(frozen=True)
class State:
    """What the source was at the time of a backup."""

    size: int
    checksum: str


@dataclass
class Store:
    """One repository, and which state each of its revisions has to be."""

    directory: Path
    revisions: dict[str, State] = field(default_factory=dict)

    def init(self, image: Path) -> None:
        format_ = self.directory.parent.name
        backyfs("-b", self.directory, "init", "--store", format_, "file", image)

    def back_up(self, state: State) -> None:
        done = backyfs("-b", self.directory, "backup", "manual:history", "--json").json
        assert done["consistency"] != "torn"
        assert done["size"] == state.size
        self.revisions[done["id"]] = state

    def digests(self) -> list[str]:
        """The digest of each state, oldest first; every revision must be whole."""
        rows = backyfs("-b", self.directory, "status", "--json").json["revisions"]
        assert [row["id"] for row in rows] == list(self.revisions)
        assert {row["health"] for row in rows} == {"ok"}
        return [row["disks"][0]["digest"] for row in rows]

    def copy(self, directory: Path, format_: str) -> Store:
        backyfs("copy", "--store", format_, self.directory, directory)
        return Store(directory, self.revisions)


@dataclass(frozen=True)
class Wanted:
    """One revision to be brought back: from where, to a place below `scratch`."""

    repository: Path
    revision: str
    state: State
    scratch: Path

    def restore(self, target: str | Path) -> list[str | Path]:
        return ["-b", self.repository, "restore", "--force", "-r", self.revision, target]


def by_file(wanted: Wanted) -> str:
    target = wanted.scratch / "restored.img"
    backyfs(*wanted.restore(target))
    assert target.stat().st_size == wanted.state.size
    try:
        return images.checksum(target)
    finally:
        target.unlink()


def by_stdout(wanted: Wanted) -> str:
    command = [PROGRAM, "-q", *map(str, wanted.restore("-"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(environment())) as process:
        assert process.stdout is not None
        checksum = hashlib.file_digest(process.stdout, "sha256").hexdigest()  # type: ignore[arg-type]
    assert process.returncode == 0
    return checksum


def by_device(wanted: Wanted) -> str:
    """To a device that is larger by less than a sector, and full of something else."""
    backing = wanted.scratch / "device.img"
    images.sparse_image(backing, -(-wanted.state.size // 512) * 512, {8192: b"old" * 4096})
    try:
        with attached(backing) as device:
            backyfs(*wanted.restore(device))
        images.resize(backing, wanted.state.size)
        return images.checksum(backing)
    finally:
        backing.unlink()


def by_script(wanted: Wanted) -> str:
    target = wanted.scratch / "script.img"
    subprocess.run(
        [sys.executable, SCRIPT, wanted.repository, wanted.revision, "disk", target],
        check=True,
        timeout=PATIENCE_S,
    )
    try:
        return images.checksum(target)
    finally:
        target.unlink()


WAYS = (by_file, by_stdout, by_device)


def check(store: Store, scratch: Path, *also: Callable[[Wanted], str], first: int) -> None:
    """Every revision of a store must be its state: by the ways `also`, and by `restore`.

    `first`: by which of WAYS the first revision comes back, if each does by one only.
    """
    for number, (revision, state) in enumerate(store.revisions.items()):
        ways = WAYS if THOROUGH else (WAYS[(first + number) % len(WAYS)],)
        for way in (*ways, *also):
            wanted = Wanted(store.directory, revision, state, scratch)
            assert way(wanted) == state.checksum, f"{store.directory}, state {number}, {way}"


def check_mounted(store: Store, mountpoint: Path) -> None:
    """Every revision of a store must be its state in the mounted tree."""
    require("fuse")
    mountpoint.mkdir()
    backyfs("-b", store.directory.parent, "mount", mountpoint)
    with watched(mountpoint, PATIENCE_S):
        tree = mountpoint / store.directory.name
        assert sorted(os.listdir(tree)) == [*sorted(store.revisions), "at", "by-tag", "latest"]
        for number, (revision, state) in enumerate(store.revisions.items()):
            image = tree / revision / "disk.img"
            assert image.stat().st_size == state.size
            assert images.checksum(image) == state.checksum, f"{tree}, state {number}"
        backyfs("umount", mountpoint)
    mountpoint.rmdir()


@dataclass(frozen=True)
class Places:
    """Directories on file systems of their kinds."""

    ext4: Path
    xfs: Path
    btrfs: Path


@pytest.fixture
def places(ext4_dir: Path, xfs_dir: Path, btrfs_dir: Path) -> Places:
    return Places(ext4_dir, xfs_dir, btrfs_dir)


def live(disk: Disk, stores: list[Store]) -> None:
    """Take the disk through its states, backing each of them up into every store."""
    for number in range(STATES):
        with disk.state(number):
            state = State(os.path.getsize(disk.image), images.checksum(disk.image))
            for store in stores:
                if number == 0:
                    store.init(disk.image)
                store.back_up(state)
            assert images.checksum(disk.image) == state.checksum, "the disk did not stand still"


@pytest.fixture(params=DISKS)
def disk(request: pytest.FixtureRequest, places: Places) -> Disk:
    """Generated on btrfs (backed up by reflink), the others on file systems of their own kind."""
    where = {"generated": places.btrfs, "ext4": places.ext4, "xfs": places.xfs}[request.param]
    directory = where / "source"
    directory.mkdir()
    return DISKS[request.param](directory, SIZE)


@pytest.mark.slow
@pytest.mark.timeout(15 * PATIENCE_S)
def test_every_state_comes_back_by_every_way(
    disk: Disk, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "TIMEOUT_S", PATIENCE_S)
    packs = Store(places.ext4 / "packs" / "vm")
    on_xfs = Store(places.xfs / "cow" / "vm")
    on_btrfs = Store(places.btrfs / "cow" / "vm")
    live(disk, [packs, on_xfs, on_btrfs])

    check(packs, places.ext4, by_script, first=0)
    check(on_xfs, places.xfs, first=1)
    check(on_btrfs, places.btrfs, first=2)

    packed = on_xfs.copy(places.ext4 / "copies" / "vm", "packs")
    check(packed, places.ext4, by_script, first=1)
    shared = packs.copy(places.btrfs / "copies" / "vm", "cow")
    check(shared, places.btrfs, first=0)

    digests = packs.digests()
    for store in (packs, on_xfs, on_btrfs, packed, shared):
        assert store.digests() == digests, store.directory
        check_mounted(store, tmp_path / "mnt")
        backyfs("-b", store.directory, "verify")
