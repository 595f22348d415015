"""Tags, times, partitions and attributes in a mounted tree, used with the system's own tools."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from backyfs.partition import parse
from backyfs.store.record import Record
from backyfs.store.repository import Repository
from bench import histories
from tests.mount.mounts import Mounted, eventually, mounted, server_of
from tests.mount.test_tree import EXTRA
from tests.mount.test_use import loop_mounted
from tests.parts import require
from tests.reader.stores import add_revision, content, make_vm

MIB = 1 << 20
TAGS = ("daily", "manual:before upgrade")
ZONE = "America/New_York"
"""The zone of the mount: five hours behind UTC in November."""
TIMES = [datetime(2025, 11, day, 3, 30, tzinfo=UTC) for day in (14, 15, 16)]


def out(*command: object, **environment: str) -> str:
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A disk with two partitions; a file system with a file is in the second."""
    directory = tmp_path_factory.mktemp("disk")
    image, root = directory / "disk.img", directory / "root"
    root.mkdir()
    (root / "motd").write_text("hello\n")
    with open(image, "xb") as stream:
        stream.truncate(16 * MIB)
    subprocess.run(
        [require("sfdisk"), "-q", "--label", "gpt", image],
        input="size=2MiB, type=swap\nsize=10MiB, name=root\n",
        text=True,
        check=True,
    )
    require("ext4")
    out("mkfs.ext4", "-q", "-F", "-d", root, "-E", f"offset={3 * MIB}", image, "10M")
    return image.read_bytes()


@pytest.fixture(scope="module")
def vm(disk: bytes, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    base = tmp_path_factory.mktemp("base")
    make_vm(base, "web01")
    repository = Repository.open(base / "web01")
    tables = {"disk": parse(lambda at, length: disk[at : at + length], len(disk)).partitions}
    for number, moment in enumerate(TIMES):
        add_revision(repository, disk, time=moment, tags=TAGS[: number + 1], partitions=tables)
    return repository


@pytest.fixture(scope="module")
def tree(vm: Repository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TZ", ZONE)
        with mounted(vm.path.parent, tmp_path_factory.mktemp("mnt")) as mount:
            yield mount.path


@pytest.fixture
def records(vm: Repository) -> list[Record]:
    return vm.revisions()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[tuple[Repository, Path]]:
    """A repository of one's own, and the VM's directory in its mount."""
    repository = make_vm(tmp_path, "vm", content(3))
    with mounted(repository.path, tmp_path / "mnt") as mount:
        yield repository, mount.path / "vm"


# ---- tags and times ------------------------------------------------------------------------------


def test_revisions_by_tag(tree: Path, records: list[Record]) -> None:
    by_tag = tree / "web01/by-tag"
    assert sorted(os.listdir(by_tag)) == list(TAGS)
    assert sorted(os.listdir(by_tag / "daily")) == [record.id for record in records]
    for record in records[1:]:
        link = by_tag / "manual:before upgrade" / record.id
        assert os.readlink(link) == f"../../{record.id}"
        assert link.samefile(tree / "web01" / record.id)


def test_a_change_of_tags_shows(own: tuple[Repository, Path]) -> None:
    repository, directory = own
    record = repository.revisions()[0]
    assert os.listdir(directory / "by-tag") == []
    for tags in (["a b"], ["a b", "manual:x"], ["manual:x"], []):
        changed = partial(replace, tags=tuple(tags))
        repository.update_state(record.id, changed)
        assert eventually(partial(lists, directory / "by-tag", tags))
        for tag in tags:
            assert os.listdir(directory / "by-tag" / tag) == [record.id]
    assert eventually(lambda: not (directory / "by-tag/manual:x").exists())


def lists(directory: Path, names: list[str]) -> bool:
    return os.listdir(directory) == names


def leads_to(link: Path, target: str) -> bool:
    return os.readlink(link) == target


def test_revisions_by_time(tree: Path, records: list[Record]) -> None:
    at = tree / "web01/at"
    listed = os.listdir(at)
    assert sorted(listed)[:6] == [
        "2025-11-13", "2025-11-13T22", "2025-11-14", "2025-11-14T22", "2025-11-15", "2025-11-15T22",
    ]  # fmt: skip
    assert {"now", "today", "yesterday"} < set(listed)
    for name, number in [
        ("2025-11-13", 0),
        ("2025-11-14T22:29", 0),
        ("2025-11-14T22:30", 1),
        ("2025-11-15T03:30Z", 1),
        ("2025-11-15T04:29:59+01:00", 0),
        ("2025-11-15 12:00", 1),
        ("now", 2),
        ("last-saturday", 2),
        ("before-2025-11-15", 1),
        ("1-hour-ago", 2),
    ]:
        assert os.readlink(at / name) == f"../{records[number].id}", name
        assert (at / name / "disk.img").samefile(tree / "web01" / records[number].id / "disk.img")
    for name in ("2025-11-12", "2025-11-31", "9-years-ago", "nonsense"):
        assert not (at / name).exists()
    assert os.listdir(at) == listed


def test_a_new_revision_is_now(own: tuple[Repository, Path]) -> None:
    repository, directory = own
    for _ in range(2):
        added = add_revision(repository, content(3)).id
        for name in ("now", "today", datetime.now().astimezone().date().isoformat()):
            assert eventually(partial(leads_to, directory / "at" / name, f"../{added}"))


# ---- partitions ----------------------------------------------------------------------------------


def test_partitions(tree: Path, disk: bytes) -> None:
    directory = tree / "web01/latest/partitions"
    assert os.listdir(directory) == ["1.img", "2.img"]
    assert (directory / "1.img").stat().st_size == 2 * MIB
    assert (directory / "2.img").read_bytes() == disk[3 * MIB : 13 * MIB]
    assert (directory / "disk-2.img").samefile(directory / "2.img")
    assert not (directory / "3.img").exists()


def test_a_partition_can_be_loop_mounted(tree: Path, tmp_path: Path) -> None:
    require("loop")
    with loop_mounted(tree / "web01/latest/partitions/2.img", tmp_path / "guest", "ro") as guest:
        assert (guest / "motd").read_text() == "hello\n"


def test_a_file_out_of_a_partition_without_root(tree: Path) -> None:
    require("debugfs")
    image = tree / "web01/latest/partitions/2.img"
    assert out("debugfs", "-R", "cat /motd", image) == "hello\n"


# ---- attributes ----------------------------------------------------------------------------------


def test_getfattr(tree: Path, records: list[Record]) -> None:
    require("getfattr")
    record = records[-1]
    image = tree / "web01/latest/disk.img"
    shown = out("getfattr", "-d", "--absolute-names", image).splitlines()
    assert f'user.backyfs.digest="{record.disks["disk"].digest}"' in shown
    assert f'user.backyfs.parent="{record.parent}"' in shown
    assert 'user.backyfs.tags="daily,manual:before upgrade"' in shown
    assert 'user.backyfs.time="2025-11-16T03:30:00.000000Z"' in shown
    one = out("getfattr", "--only-values", "-n", "user.backyfs.revision", tree / "web01/latest")
    assert one == record.id
    found = out("getfattr", "-R", "-d", "-m", "user.backyfs.filesystem", tree / "web01" / record.id)
    assert found.count("user.backyfs.filesystem") == 1  # swap was never made
    assert 'user.backyfs.filesystem="ext4"' in found


def test_other_attributes_are_not_there_and_ours_go_on(tree: Path) -> None:
    image = tree / "web01/latest/disk.img"
    for name, expected in [
        ("user.other", errno.ENODATA),
        ("user.backyfs.nothing", errno.ENODATA),
        ("user.backyfs.", errno.ENODATA),
        ("security.capability", errno.EOPNOTSUPP),
        ("trusted.x", errno.EOPNOTSUPP),
    ]:
        with pytest.raises(OSError, match=os.strerror(expected)):
            os.getxattr(image, name)
        assert os.getxattr(image, "user.backyfs.vm") == b"web01"
    assert os.listxattr(tree / "web01") == []
    assert os.listxattr(tree / "web01/latest", follow_symlinks=False) == []
    with pytest.raises(OSError, match="Read-only"):
        os.setxattr(image, "user.backyfs.trust", b"trusted")


# ---- walks ---------------------------------------------------------------------------------------


def test_walks_are_finite_and_go_through_no_link(tree: Path, records: list[Record]) -> None:
    images = out("find", tree, "-name", "disk.img").split()
    assert len(images) == len(records)
    followed = out("find", "-L", tree, "-name", "disk.img").splitlines()
    assert len(followed) > 3 * len(records)
    assert out("find", tree, "-xtype", "l") == ""  # no link leads nowhere
    listed = out("ls", "-lR", "--time-style=full-iso", tree, TZ="UTC").splitlines()
    assert sum("2025-11-16 03:30:00.000000000 +0000" in line for line in listed) > 5


def test_listing_opens_nothing_but_records(tmp_path: Path) -> None:
    """The maps and packs of these revisions do not even exist."""
    base = tmp_path / "base"
    base.mkdir()
    histories.make(base, vms=3, revisions=20)
    with mounted(base, tmp_path / "mnt") as mount:
        idle = len(mount.descriptors())
        found = out("find", mount.path, "-type", "f").splitlines()
        assert len(found) == 3 * 20 * 4  # the image, two partitions, revision.json
        listed = out("ls", "-lR", mount.path).splitlines()
        assert sum(line.startswith("l") for line in listed) > 3 * (1 + 20 + 2 * 20)
        assert len(mount.descriptors()) <= idle  # who asked whether it lives may just have gone


def test_find_by_time(tree: Path, records: list[Record]) -> None:
    newer = out("find", tree / "web01", "-name", "disk.img", "-newermt", "2025-11-14T12:00Z")
    assert sorted(newer.split()) == [str(tree / "web01" / r.id / "disk.img") for r in records[1:]]


def test_du_is_bounded_by_what_is_there(tree: Path, records: list[Record]) -> None:
    data = records[-1].disks["disk"].data
    directory = tree / "web01" / records[-1].id
    one, *_ = out("du", "-B1", directory / "disk.img").split()
    assert int(one) == data
    pieces, *_ = out("du", "-sB1", directory / "partitions").split()
    assert int(pieces) <= 2 * data
    everything, *_ = out("du", "-sB1", tree).split()
    assert int(everything) < (3 * data + 2 * MIB) * len(records)


def test_copies_of_the_tree(tree: Path, tmp_path: Path, disk: bytes) -> None:
    require("rsync")
    out("rsync", "-a", f"{tree}/", tmp_path / "rsync")
    assert out("rsync", "-ain", "--delete", f"{tree}/", tmp_path / "rsync") == ""
    out("cp", "-a", tree / "web01", tmp_path / "cp")
    assert out("diff", "-r", "--no-dereference", tree / "web01", tmp_path / "cp") == ""
    for copy in (tmp_path / "rsync/web01", tmp_path / "cp"):
        assert (copy / "at/now/disk.img").read_bytes() == disk
        assert os.readlink(copy / "latest") == os.readlink(tree / "web01/latest")


def test_updatedb(tree: Path, tmp_path: Path, records: list[Record]) -> None:
    database = tmp_path / "db"
    out(require("updatedb"), "-l", "0", "-U", tree, "-o", database,
        "--prunepaths", "", "--prunefs", "")  # fmt: skip
    found = out("locate", "-d", database, "-b", "disk.img").split()
    assert len(found) == len(records)


@pytest.mark.parametrize("name", ["", "at", "by-tag/x"])
def test_listings_hold_while_revisions_come_and_go(own: tuple[Repository, Path], name: str) -> None:
    """A directory that is open is read to its end as it was, without a name twice."""
    repository, directory = own
    now = datetime.now(UTC)
    for number in range(60):  # more than one request can list
        add_revision(repository, b"", time=now - timedelta(hours=number), tags=("x",))
    assert eventually(lambda: len(os.listdir(directory)) == 61 + len(EXTRA))
    before = os.listdir(directory / name)
    with os.scandir(directory / name) as entries:
        names = [next(entries).name]
        gone = [record.id for record in repository.revisions()[10:30]]
        repository.remove(gone)
        assert eventually(lambda: not (directory / gone[0]).exists())
        names += [entry.name for entry in entries]
    assert names == before
    assert not set(os.listdir(directory)) & set(gone)


def test_nothing_is_remembered_of_names(own: tuple[Repository, Path]) -> None:
    """Thousands of times looked up leave nothing behind in the process."""
    _, directory = own
    mount = Mounted(directory.parent, server_of(directory.parent))
    for hours in range(200):
        os.path.lexists(directory / f"at/{hours}-hours-ago")
    before = mount.status("VmRSS")
    for minutes in range(8000):
        os.path.lexists(directory / f"at/{minutes}-minutes-ago")
    assert mount.status("VmRSS") - before < 2048  # KiB
