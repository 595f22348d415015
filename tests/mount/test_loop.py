"""Files out of guests' file systems, through `backyfs loop`; what is left of it: nothing."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from backyfs.engine.trust import distrust
from backyfs.errors import BackyfsError, TargetError
from backyfs.mount.diskfile import Private
from backyfs.mount.guest import Wishes
from backyfs.mount.loop import Loop, loop, unloop
from backyfs.mount.loopdevice import Backing, backing
from backyfs.mount.mountpoint import mounted_at, mounts, serving
from backyfs.store.record import Record
from backyfs.store.repository import Repository
from tests.filesystems import MIB, run, unmount
from tests.filesystems import mounted as fs_mounted
from tests.guests import attached
from tests.images import sparse_image
from tests.mount.dirty import Files, Guest, back_up_image, files_in
from tests.mount.mounts import eventually, is_alive, mounted
from tests.mount.test_life import backyfs, command
from tests.parts import require
from tests.reader.stores import add_revision

KINDS = ("ext4", "xfs", "btrfs")


@dataclass(frozen=True)
class Vm:
    """A VM with two revisions of a guest: crashed, then shut down."""

    repository: Repository
    dirty: Record
    clean: Record
    expected: Files


def make_guest_vm(where: Path, base: Path, kind: str, *, parts: bool) -> Vm:
    guest = Guest(where, kind, parts=parts)
    guest.fill()
    expected = guest.crash()
    repository = Repository.create(base / f"{kind}-{'parts' if parts else 'whole'}", "packs")
    dirty = back_up_image(repository, guest.clone)
    clean = back_up_image(repository, guest.image)
    return Vm(repository, dirty, clean, expected)


@pytest.fixture(scope="module")
def vms(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Vm]:
    """All of them, by kind and whether the file system is in a partition."""
    require("fuse")
    base = tmp_path_factory.mktemp("base")
    with fs_mounted("xfs", tmp_path_factory.mktemp("fs"), 2048 * MIB) as where:
        made = {}
        for kind in KINDS:
            for parts in (False, True):
                directory = where / f"{kind}{parts}"
                directory.mkdir()
                made[kind, parts] = make_guest_vm(directory, base, kind, parts=parts)
    return made


@pytest.fixture
def ext4(vms: dict[tuple[str, bool], Vm]) -> Vm:
    return vms["ext4", False]


@pytest.fixture
def point(tmp_path: Path) -> Path:
    (tmp_path / "guest").mkdir()
    return tmp_path / "guest"


@pytest.fixture(autouse=True)
def nothing_is_left(point: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test did: no mount, no device, no process, no directory and no overlay."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield
    assert mounted_at(point) is None
    assert os.listdir(point) == []
    assert eventually(lambda: not _ours(tmp_path)), _ours(tmp_path)
    assert os.listdir(tmp_path / "tmp") == []


def _ours(tmp_path: Path) -> list[str]:
    """Processes that serve a tree mounted below `tmp_path`."""
    found = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(tmp_path) in (words := Path(path).read_bytes()):
                found.append(words.decode())
    return found


@contextlib.contextmanager
def looped(vm: Vm, record: Record, point: Path, **options: object) -> Iterator[Loop]:
    """A guest, mounted; its device and its process are gone when this is left."""
    done = loop(vm.repository, record, "disk", point, **options)  # type: ignore[arg-type]
    file = backing(done.device)
    assert file is not None
    with serving(file.device) as process:
        assert process is not None
        shared = any(mount.device == file.device for mount in mounts())
        try:
            yield done
        finally:
            if mounted_at(point) is not None:
                unloop(point)
        assert backing(done.device) != file
        assert shared or eventually(lambda: not is_alive(process.pid))


# ---- a file out of a guest -----------------------------------------------------------------------


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "partition"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_out_of_a_guest(
    vms: dict[tuple[str, bool], Vm], point: Path, tmp_path: Path, kind: str, parts: bool
) -> None:
    vm = vms[kind, parts]
    with looped(vm, vm.dirty, point) as done:
        assert done.plan.scratch, "a dirty journal is replayed"
        assert done.place.partition == (2 if parts else None)
        assert files_in(point).items() >= vm.expected.items()
        assert "old-0" not in os.listdir(point)
        name = max(vm.expected)
        run("cp", point / name, tmp_path / "copy")
        assert files_in(tmp_path)["copy"] == vm.expected[name]
        with pytest.raises(OSError, match="Read-only"):
            (point / "new").touch()
    with looped(vm, vm.clean, point) as done:
        assert not done.plan.scratch, "a clean file system needs no overlay"
        assert files_in(point).items() >= vm.expected.items()
        run("cp", point / name, tmp_path / "copy")
        assert files_in(tmp_path)["copy"] == vm.expected[name]
    for record in (vm.dirty, vm.clean):
        assert not vm.repository.structure(record)
        with contextlib.closing(vm.repository.open_disk(record, "disk", check=True)) as image:
            assert image.digest == record.disks["disk"].digest


def options_of(point: Path) -> set[str]:
    line = next(
        line for line in Path("/proc/self/mounts").read_text().splitlines() if f" {point} " in line
    )
    return set(line.split()[3].split(","))


def test_nothing_of_a_guest_is_trusted(ext4: Vm, point: Path) -> None:
    with looped(ext4, ext4.clean, point):
        assert options_of(point) >= {"ro", "nodev", "nosuid", "noexec"}
    with looped(ext4, ext4.clean, point, options="nodev"):
        assert not options_of(point) & {"nosuid", "noexec"}


@pytest.mark.parametrize("kind", KINDS)
def test_without_replay_on_request(vms: dict[tuple[str, bool], Vm], point: Path, kind: str) -> None:
    vm = vms[kind, False]
    with looped(vm, vm.dirty, point, wishes=Wishes(unsafe=True)) as done:
        assert not done.plan.scratch
        assert "not replayed" in done.plan.reason
        os.listdir(point)
    with looped(vm, vm.dirty, point, wishes=Wishes(noload=True)) as done:
        assert done.plan.scratch == (kind != "ext4"), "the others may look empty"


def test_a_guest_cannot_ask_for_a_panic(tmp_path: Path, point: Path) -> None:
    require("ext4")
    require("fuse")
    disk = tmp_path / "disk.img"
    with open(disk, "xb") as stream:
        stream.truncate(8 * MIB)
    run("mkfs.ext4", "-q", "-e", "panic", disk)
    repository = Repository.create(tmp_path / "vm", "packs")
    record = back_up_image(repository, disk)
    with looped(Vm(repository, record, record, {}), record, point):
        assert "errors=panic" not in options_of(point)


def test_a_journal_on_another_device(tmp_path: Path, point: Path) -> None:
    """No revision has it: an ext4 without it is whole when clean, and else on request."""
    require("ext4")
    require("fuse")
    image = sparse_image(tmp_path / "disk", 32 * MIB)
    used = tmp_path / "used"
    with attached(sparse_image(tmp_path / "journal", 8 * MIB)) as journal:
        run("mke2fs", "-q", "-b", 4096, "-O", "journal_dev", journal)
        run("mkfs.ext4", "-q", "-F", "-b", 4096, "-J", f"device={journal}", image)
        run("mount", "-o", "loop", image, point)
        try:
            (point / "file").write_text("here")
            run("sync", "-f", point)
            shutil.copy(image, used)
        finally:
            unmount(point)
    repository = Repository.create(tmp_path / "vm", "packs")
    clean, dirty = back_up_image(repository, image), back_up_image(repository, used)
    vm = Vm(repository, dirty, clean, {})
    for wishes in (Wishes(), Wishes(noload=True), Wishes(writable=True)):
        with looped(vm, clean, point, wishes=wishes):
            assert (point / "file").read_text() == "here"
    with pytest.raises(TargetError, match="needs recovery, and lies on another device") as caught:
        loop(repository, dirty, "disk", point)
    assert "--noload" in caught.value.hint
    with looped(vm, dirty, point, wishes=Wishes(noload=True)):
        os.listdir(point)


def test_a_log_on_another_device(tmp_path: Path, point: Path) -> None:
    require("xfs")
    require("fuse")
    image = sparse_image(tmp_path / "disk", 64 * MIB)
    log = sparse_image(tmp_path / "log", 16 * MIB)
    run("mkfs.xfs", "-q", "-f", "--unsupported", "-l", f"logdev={log},size=13m", image)
    repository = Repository.create(tmp_path / "vm", "packs")
    record = back_up_image(repository, image)
    with pytest.raises(TargetError, match="cannot be mounted") as caught:
        loop(repository, record, "disk", point)
    assert "logdev=DEVICE" in caught.value.hint
    with attached(log) as device:
        done = loop(repository, record, "disk", point, options=f"nodev,logdev={device}")
        assert done.plan.scratch
        unloop(point)


def test_for_writing(ext4: Vm, point: Path) -> None:
    with looped(ext4, ext4.clean, point, wishes=Wishes(writable=True)):
        (point / "new").write_bytes(b"x" * MIB)
        (point / "old-1").unlink()
        run("sync", "-f", point)
    with looped(ext4, ext4.clean, point, wishes=Wishes(writable=True)):
        assert "new" not in os.listdir(point)
        assert "old-1" in os.listdir(point)


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_two_revisions_at_once(
    vms: dict[tuple[str, bool], Vm], point: Path, tmp_path: Path, kind: str
) -> None:
    """Their file systems have the same id."""
    vm = vms[kind, False]
    other = tmp_path / "other"
    other.mkdir()
    with looped(vm, vm.clean, point, wishes=Wishes(writable=True)):
        (point / "mine").touch()
        if kind == "btrfs" and not Path("/sys/fs/btrfs/features/temp_fsid").exists():
            with pytest.raises(TargetError, match="mounted already"):
                loop(vm.repository, vm.dirty, "disk", other)
            return
        with looped(vm, vm.dirty, other):
            assert "mine" not in os.listdir(other)


def test_damage_costs_the_files_in_it_only(ext4: Vm, point: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(ext4.repository.path, copy)
    repository = Repository.open(copy)
    pack = max((copy / "packs").glob("*.pack"), key=lambda path: path.stat().st_size)
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(data)
    vm = replace(ext4, repository=repository)
    whole, bad = {}, set()
    with looped(vm, ext4.clean, point):
        for name in os.listdir(point):
            try:
                if (point / name).is_file():
                    whole[name] = hashlib.sha256((point / name).read_bytes()).hexdigest()
            except OSError as exc:
                assert exc.errno == errno.EIO
                bad.add(name)
    assert 0 < len(bad) < len(ext4.expected) // 2, "a frame of 64 KiB holds a few files"
    assert whole.items() >= {n: d for n, d in ext4.expected.items() if n not in bad}.items()


@pytest.mark.parametrize("kind", KINDS)
def test_a_journal_too_large_for_the_quota(
    vms: dict[tuple[str, bool], Vm], point: Path, kind: str
) -> None:
    vm = vms[kind, False]
    with pytest.raises(TargetError, match=f"the {kind} cannot be mounted") as caught:
        loop(vm.repository, vm.dirty, "disk", point, private=Private(Path("/var/tmp"), 4096))
    assert "no space" in caught.value.hint


# ---- which tree, and what remains ----------------------------------------------------------------


def test_a_mount_that_is_there_is_used(ext4: Vm, point: Path, tmp_path: Path) -> None:
    base = ext4.repository.path.parent
    with mounted(base, tmp_path / "mnt") as tree:
        with looped(ext4, ext4.clean, point) as done:
            file = backing(done.device)
            mount = mounted_at(tree.path)
            assert file is not None
            assert mount is not None
            assert file.device == mount.device
        assert tree.alive()
        with looped(ext4, ext4.dirty, point) as done:
            file = backing(done.device)
            assert file is not None
            assert file.device != mount.device, "it has no scratch views"
    with (
        mounted(base, tmp_path / "mnt", scratch=tmp_path) as tree,
        looped(ext4, ext4.dirty, point) as done,
    ):
        assert files_in(point).items() >= ext4.expected.items()
        file = backing(done.device)
        mount = mounted_at(tree.path)
        assert file is not None
        assert mount is not None
        assert file.device == mount.device


def test_a_tree_of_another_user_is_not_used(
    ext4: Vm, point: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(ext4.repository.path, tmp_path / "mnt") as tree:
        real = mounted_at(tree.path)
        assert real is not None
        assert real.owner == os.geteuid()
        others = [replace(mount, owner=65534) for mount in mounts()]
        monkeypatch.setattr("backyfs.mount.diskfile.mounts", lambda: others)
        with looped(ext4, ext4.clean, point) as done:
            file = backing(done.device)
            assert file is not None
            assert file.device != real.device


def test_unmounting_it_by_hand_leaves_nothing(ext4: Vm, point: Path) -> None:
    with looped(ext4, ext4.dirty, point):
        run("umount", point)


def test_one_in_use(ext4: Vm, point: Path) -> None:
    with looped(ext4, ext4.clean, point) as done:
        with open(point / "old-1", "rb") as stream:
            with pytest.raises(TargetError, match="busy") as caught:
                unloop(point)
            assert "backyfs unloop --lazy" in caught.value.hint
            assert mounted_at(point) is not None
            unloop(point, lazy=True)
            assert len(stream.read()) == 30001
        assert eventually(lambda: backing(done.device) is None)


def test_its_revision_is_in_use(ext4: Vm, point: Path) -> None:
    with looped(ext4, ext4.dirty, point):
        assert ext4.repository.remove([ext4.dirty.id]).in_use == [ext4.dirty.id]


@pytest.mark.parametrize("state", ["clean", "dirty"])
def test_when_its_process_is_killed(ext4: Vm, point: Path, state: str) -> None:
    """Soon the kernel asks the dead for the attributes of a scratch view, which may change."""
    with looped(ext4, getattr(ext4, state), point) as done:
        file = backing(done.device)
        assert file is not None
        with serving(file.device) as process:
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)
        Path("/proc/sys/vm/drop_caches").write_text("3")
        with pytest.raises(OSError, match="error"):
            files_in(point)
        if done.plan.scratch:
            path = f"/{ext4.repository.name}/{ext4.dirty.id}/disk.rw.img"
            assert eventually(lambda: backing(done.device) == Backing("", path))
        with pytest.raises(TargetError, match="mounted already"):
            loop(ext4.repository, ext4.clean, "disk", point)
        unloop(point)


@pytest.mark.parametrize("after_s", [0.3, 0.45, 0.6, 0.75, 0.9])
def test_the_command_may_be_killed_at_any_time(
    ext4: Vm, point: Path, tmp_path: Path, after_s: float
) -> None:
    """Then all is there, or nothing but an empty directory (see `nothing_is_left`)."""
    words = command("-b", ext4.repository.path, "loop", ext4.dirty.id, point)
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        time.sleep(after_s)
        process.kill()
    eventually(lambda: mounted_at(point) is not None, 0.5)  # mount(8) may be at work
    if mounted_at(point) is not None:
        assert files_in(point).items() >= ext4.expected.items()
        unloop(point)
    assert eventually(lambda: not _ours(tmp_path)), _ours(tmp_path)
    for path in (tmp_path / "tmp").iterdir():
        path.rmdir()


# ---- refusals ------------------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path: Path) -> Repository:
    """A VM whose disks hold nothing that can be mounted."""
    repository = Repository.create(tmp_path / "odd", "packs")
    ext = bytearray(MIB)
    ext[1080:1082] = b"\x53\xef"  # and nothing else of an ext2
    volume = bytearray(MIB)
    volume[512:520], volume[536:544] = b"LABELONE", b"LVM2 001"
    swap = bytearray(MIB)
    swap[4086:4096] = b"SWAPSPACE2"
    lying = bytearray(MIB)  # an MBR whose only partition reaches beyond the end
    lying[446:462] = bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + struct.pack("<II", 8, 1 << 30)
    lying[510:512] = b"\x55\xaa"
    disks = {"broken": ext, "empty": bytearray(MIB), "volume": volume, "swap": swap, "lying": lying}
    add_revision(repository, {name: bytes(data) for name, data in disks.items()})
    return repository


@pytest.mark.parametrize(
    ("disk", "partition", "why"),
    [
        ("broken", None, "the ext2 cannot be mounted"),
        ("empty", None, "holds no file system"),
        ("volume", None, "LVM volume group"),
        ("swap", None, "swap space"),
        ("lying", None, "holds no file system that is known: the partition table is not usable"),
        ("broken", 1, "no partition 1"),
    ],
)
def test_what_cannot_be_mounted(
    odd: Repository, point: Path, disk: str, partition: int | None, why: str
) -> None:
    require("root")
    require("fuse")
    with pytest.raises(TargetError, match=why):
        loop(odd, odd.revisions()[0], disk, point, partition=partition)


def test_mountpoints_that_will_not_do(ext4: Vm, point: Path, tmp_path: Path) -> None:
    for target, why in [
        (tmp_path / "none", "does not exist"),
        (tmp_path, "not empty"),
        (ext4.repository.path / "revisions", "inside the store"),
    ]:
        with pytest.raises(TargetError, match=why):
            loop(ext4.repository, ext4.clean, "disk", target)
    with looped(ext4, ext4.clean, point), pytest.raises(TargetError, match="mounted already"):
        loop(ext4.repository, ext4.clean, "disk", point)
    with pytest.raises(TargetError, match="nothing is mounted"):
        unloop(point)
    with pytest.raises(TargetError, match="not mounted by"):
        unloop(Path("/proc"))
    with pytest.raises(BackyfsError, match="inside the store"):
        loop(
            ext4.repository,
            ext4.dirty,
            "disk",
            point,
            private=Private(ext4.repository.path / "revisions"),
        )


def test_mount_options_that_make_no_sense(ext4: Vm, point: Path) -> None:
    with pytest.raises(BackyfsError, match="cannot be mounted"):
        loop(ext4.repository, ext4.clean, "disk", point, options="no-such-option")


def test_a_loop_device_of_a_killed_process_goes_away(tmp_path: Path) -> None:
    require("loop")
    (tmp_path / "file").write_bytes(bytes(MIB))
    program = """if True:
        import os, sys, signal
        from backyfs.mount.loopdevice import attached
        with attached(os.open(sys.argv[1], os.O_RDONLY), name="x", writable=False) as device:
            print(device, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "file"], capture_output=True, text=True
    )
    assert done.returncode == -9
    assert eventually(lambda: _file_of(done.stdout.strip()) != str(tmp_path / "file"))


def _file_of(device: str) -> str:
    try:
        return Path(f"/sys/block/{Path(device).name}/loop/backing_file").read_text().strip()
    except FileNotFoundError:
        return ""


# ---- the commands --------------------------------------------------------------------------------


def test_the_commands(vms: dict[tuple[str, bool], Vm], point: Path) -> None:
    vm = vms["xfs", True]
    done = backyfs("-b", vm.repository.path, "loop", vm.dirty.id, point)
    assert done.returncode == 0, done.stderr
    device = mounted_at(point)
    assert device is not None
    assert done.stdout.splitlines() == [
        f"{device.source}: xfs of {vm.dirty.id}/disk partition 2, from the scratch view",
        "  the log holds changes, and was replayed in a throw-away overlay",
        f"mounted on {point} (ro,nouuid,nodev,nosuid,noexec)",
    ]
    assert files_in(point).items() >= vm.expected.items()
    done = backyfs("unloop", point)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_commands_with_json(ext4: Vm, point: Path) -> None:
    distrust(ext4.repository, [ext4.clean], "the guest was broken")
    done = backyfs("-b", ext4.repository.path, "loop", "--json", ext4.clean.id, point)
    try:
        value = json.loads(done.stdout)
        assert value["view"] == "image"
        assert value["filesystem"] == "ext4"
        assert value["partition"] is None
        warning = json.loads(done.stderr)
        assert warning["message_type"] == "warning"
        assert "distrusted: the guest was broken" in warning["message"]
    finally:
        backyfs("unloop", point)
    done = backyfs("unloop", point)
    assert done.returncode == 1
    assert "nothing is mounted" in done.stderr


def test_a_choice_of_partitions(tmp_path: Path, point: Path) -> None:
    require("sfdisk")
    require("ext4")
    disk = tmp_path / "disk.img"
    with open(disk, "xb") as stream:
        stream.truncate(40 * MIB)
    table = "size=16MiB,name=boot\nsize=16MiB,name=root\n"
    subprocess.run(["sfdisk", "-q", "--label", "gpt", disk], input=table, text=True, check=True)
    for start, label in ((1, "boot"), (17, "root")):
        run("mkfs.ext4", "-q", "-L", label, "-E", f"offset={start * MIB}", disk, "16M")
    repository = Repository.create(tmp_path / "vm", "packs")
    record = back_up_image(repository, disk)
    done = backyfs("-b", repository.path, "loop", "latest", point)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"backyfs: {record.id}/disk has 2 partitions with a file system",
        "  choose one with --partition: 1 (ext4, 16 MiB, boot), 2 (ext4, 16 MiB, root)",
    ]
    done = backyfs("-b", repository.path, "loop", "--partition", 2, "latest", point)
    assert done.returncode == 0, done.stderr
    assert os.listdir(point) == ["lost+found"]
    assert backyfs("unloop", point).returncode == 0
