"""Bad input: one line that says what, where and what to do; an exit code; no traceback."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backyfs.store.record import sealed
from tests import images
from tests.cli.conftest import SIZE, Vm
from tests.cli.program import backyfs, refused
from tests.conftest import SmallFs
from tests.filesystems import run
from tests.parts import require

MIB = 1024 * 1024


def test_a_missing_directory(tmp_path: Path) -> None:
    for arguments in (["status"], ["backup"], ["restore", "x"], ["verify"], ["gc"], ["find"]):
        assert "no directory" in refused("-b", tmp_path / "missing", *arguments, code=10)


def test_a_directory_without_a_repository(tmp_path: Path) -> None:
    assert f"no repository in {tmp_path}" in refused("-b", tmp_path, "status", code=10)


def test_a_base_directory_where_a_vm_is_needed(vm: Vm) -> None:
    base = vm.directory.parent
    assert "base directory of 1 VMs" in refused("-b", base, "restore", "x", code=10)
    assert f"backyfs -b {vm.directory}" in backyfs("-b", base, "restore", "x", code=10).err


def test_a_file_where_a_directory_is_needed(vm: Vm) -> None:
    refused("-b", vm.image, "status", code=10)
    refused("-b", vm.image / "vm", "init", "file", vm.image, code=10)
    assert "not a directory" in refused("-b", vm.image, "init", "file", vm.image, code=10)
    assert "not a directory" in refused("copy", vm.directory, vm.image, code=10)


def test_an_empty_path_is_not_the_current_directory(
    vm: Vm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a variable that was not set: `copy SRC "$DST"` made a repository where one stood."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for arguments in (
        ("copy", vm.directory, ""),
        ("copy", "", here / "copy"),
        ("-b", "", "init", "file", vm.image),
        ("-b", vm.directory, "-l", "", "backup"),
        ("-c", "", "jobs"),
        ("-b", vm.directory, "mount", ""),
        ("umount", ""),
        ("-b", vm.directory, "nbd-server", "--scratch", ""),
    ):
        assert "it is empty" in refused(*arguments, code=2)
    assert os.listdir(here) == []


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ("nope", 11),
        ("99", 11),
        ("20200101T000000Z-abcd", 11),
        ("tag:nope", 11),
        ("2020-01-01", 11),
        ("0,,1", 2),
        ("first(", 2),
        ("trust:perhaps", 2),
        ("tag:daily", 2),  # several
        ("2026-02-30", 2),
        ("", 2),
    ],
)
def test_revisions_that_do_not_exist(vm: Vm, tmp_path: Path, spec: str, code: int) -> None:
    refused("-b", vm.directory, "restore", "-r", spec, tmp_path / "out", code=code)
    assert not (tmp_path / "out").exists()


def test_an_unknown_disk(vm: Vm) -> None:
    assert "no disk 'data'" in refused(
        "-b", vm.directory, "restore", "--disk", "data", "-", code=11
    )


@pytest.mark.parametrize("name", [".hidden", "a b", "a:b", "ü", "x" * 65])
def test_bad_vm_names(tmp_path: Path, name: str) -> None:
    image = images.random_image(tmp_path / "x.img", 4096)
    assert "is no VM name" in refused("-b", tmp_path / name, "init", "file", image, code=2)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    "sources",
    [["a b={}"], ["-x={}"], ["root={}", "root={}"], ["{}", "{}"], ["=x"]],
)
def test_bad_disk_names(tmp_path: Path, sources: list[str]) -> None:
    image = images.random_image(tmp_path / "x.img", 4096)
    words = [source.format(image) for source in sources]
    refused("-b", tmp_path / "vm", "init", "file", "--", *words, code=2)
    assert not (tmp_path / "vm").exists()


@pytest.mark.parametrize("tag", ["a/b", "", " ", ".x", "ü", "x" * 65, "weird"])
def test_bad_tags(vm: Vm, tag: str) -> None:
    ids = vm.ids
    if tag.strip():
        refused("-b", vm.directory, "backup", tag, code=2)
        refused("-b", vm.directory, "tags", "add", "-r", "0", tag, code=2)
    assert vm.ids == ids


def test_a_vm_instead_of_tags(vm: Vm) -> None:
    shutil.copytree(vm.directory, vm.directory.parent / "db01")
    assert "'db01' is no tag" in refused("-b", vm.directory, "backup", "db01", code=2)
    assert (
        f"-b {vm.directory.parent / 'db01'} backup"
        in backyfs("-b", vm.directory, "backup", "db01", code=2).err
    )


def test_init_twice(vm: Vm) -> None:
    assert "repository already" in refused("-b", vm.directory, "init", "file", vm.image, code=2)


def test_a_repository_around_or_inside_another(vm: Vm) -> None:
    base = vm.directory.parent
    inside = vm.directory / "packs" / "db01"
    for directory, why in (
        (base, f"{base} is a base directory of 1 VMs"),
        (inside, f"lies in the repository {vm.directory}"),
    ):
        assert why in refused("-b", directory, "init", "file", vm.image, code=2)
        assert why in refused("copy", vm.directory, directory, code=2)
    assert sorted(base.iterdir()) == [vm.directory]
    assert not inside.exists()


def test_a_source_device_that_has_no_medium(vm: Vm, tmp_path: Path) -> None:
    ids = vm.ids
    config = vm.directory / "config"
    with looped(0, tmp_path) as device:
        config.write_text(config.read_text().replace(str(vm.image), device))
        assert f"{device} is a device of 0 bytes" in refused("-b", vm.directory, "backup", code=13)
    assert vm.ids == ids


def test_a_copy_of_a_config_that_is_none(vm: Vm, tmp_path: Path) -> None:
    config = vm.directory / "config"
    config.write_text(config.read_text() + "#" * (1 << 20))
    assert f"{config} has more than" in refused("copy", vm.directory, tmp_path / "web01", code=2)
    assert not (tmp_path / "web01").exists()


def test_a_source_file_that_was_emptied(vm: Vm) -> None:
    ids = vm.ids
    os.truncate(vm.image, 0)
    assert f"{vm.image} is a file of 0 bytes" in refused("-b", vm.directory, "backup", code=13)
    assert vm.ids == ids


def test_init_of_what_is_not_there(tmp_path: Path) -> None:
    for source in (tmp_path / "missing.img", tmp_path):
        refused("-b", tmp_path / "vm", "init", "file", source, code=13)
    assert not (tmp_path / "vm").exists()
    done = backyfs("-b", tmp_path / "vm", "init", "file", tmp_path / "missing.img", code=13)
    assert "given to init" in done.err
    refused("-b", tmp_path / "vm", "init", "floppy", "A:", code=2)


def test_init_warns_of_what_is_no_raw_image(tmp_path: Path) -> None:
    require("qemu-img")
    image, raw = tmp_path / "disk.img", tmp_path / "raw.img"
    raw.write_bytes(bytes(MIB))
    for name in ("qcow2", "vmdk", "vhdx", "vpc", "vdi"):
        subprocess.run(["qemu-img", "create", "-q", "-f", name, image, "4M"], check=True)
        done = backyfs("-b", tmp_path / name, "init", "file", f"a={raw}", f"b={image}")
        shown = {"vmdk": "VMDK", "vhdx": "VHDX", "vpc": "VHD", "vdi": "VDI"}.get(name, name)
        assert done.err.startswith(f"backyfs: warning: {image} is a {shown} file: ")
        assert done.err.count("\n") == 1
    assert not backyfs("-b", tmp_path / "raw", "init", "file", raw).err


def test_a_source_that_cannot_be_read(vm: Vm) -> None:
    ids = vm.ids
    vm.image.unlink()
    assert str(vm.image) in refused("-b", vm.directory, "backup", code=13)
    vm.image.mkdir()
    refused("-b", vm.directory, "backup", code=13)
    assert vm.ids == ids


def test_a_broken_config(vm: Vm) -> None:
    config = vm.directory / "config"
    config.write_text("source: [")
    assert "config" in refused("-b", vm.directory, "backup", code=2)
    config.unlink()
    assert "config is missing" in refused("-b", vm.directory, "backup", code=2)
    backyfs("-b", vm.directory, "restore", "/dev/null")  # needs none


@contextmanager
def looped(size: int, where: Path) -> Iterator[str]:
    require("loop")
    file = images.sparse_image(where / "loop.img", size)
    done = subprocess.run(
        ["losetup", "--find", "--show", file], capture_output=True, text=True, check=True
    )
    try:
        yield done.stdout.strip()
    finally:
        subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)


def test_a_tag_that_is_no_file_name_either(vm: Vm) -> None:
    """A VM of its name is looked for, as who forgets -b gives it."""
    line = refused("-b", vm.directory, "backup", "manual:" + 300 * "x", code=2)
    assert line.endswith(" is no tag name")


def test_targets_that_do_not_fit(vm: Vm, tmp_path: Path) -> None:
    with looped(SIZE // 512 * 512, tmp_path) as device:
        line = refused("-b", vm.directory, "restore", device, code=1)
    assert f"has {SIZE // 512 * 512} bytes, the image {SIZE}" in line


def test_targets_in_use(vm: Vm, tmp_path: Path) -> None:
    with looped(8 * MIB, tmp_path) as device:
        run("mkfs.ext4", "-q", device)
        (tmp_path / "mnt").mkdir()
        run("mount", device, tmp_path / "mnt")
        try:
            assert "is in use" in refused("-b", vm.directory, "restore", "--force", device, code=1)
            assert "is in use" in refused("-b", vm.directory, "restore", "-n", device, code=1)
        finally:
            run("umount", tmp_path / "mnt")


def test_a_device_is_compared_only_when_asked(vm: Vm, tmp_path: Path) -> None:
    with looped(8 * MIB, tmp_path) as device:
        restore = ("-b", vm.directory, "restore", "--json", "--force")
        assert "data" in json.loads(backyfs(*restore, device).out)
        again = json.loads(backyfs(*restore, "--delta", device).out)
        assert again["compared"] > again["written"] == 0


def test_targets_that_are_none(vm: Vm, tmp_path: Path) -> None:
    restore = ("-b", vm.directory, "restore")
    assert "is a directory" in refused(*restore, tmp_path, code=1)
    assert "TARGET is empty" in refused(*restore, "", code=1)
    assert "no directory" in refused(*restore, tmp_path / "a" / "b", code=1)
    assert "lies in the repository" in refused(*restore, vm.directory / "x.img", code=1)
    rehearsal = (*restore, "-n")
    assert "is a directory" in refused(*rehearsal, tmp_path, code=1)
    assert "no directory" in refused(*rehearsal, tmp_path / "a" / "b", code=1)
    assert "lies in the repository" in refused(*rehearsal, vm.directory / "x.img", code=1)
    with open(tmp_path / "open.img", "wb") as stream:
        stream.write(b"x")
        stream.flush()
        assert "open for writing" in refused(*restore, "-f", tmp_path / "open.img", code=1)


def test_a_mistyped_device_is_no_new_file(vm: Vm) -> None:
    require("root")
    if not os.path.ismount("/dev"):
        pytest.skip("/dev is a plain directory here")
    typo = Path(f"/dev/backyfs-test-{os.getpid()}")
    try:
        assert f"{typo} is no device" in refused("-b", vm.directory, "restore", typo, code=1)
        assert not typo.exists()
        typo.touch()
        refused("-b", vm.directory, "restore", "--force", typo, code=1)
        assert typo.stat().st_size == 0
    finally:
        typo.unlink(missing_ok=True)


def test_existing_data_is_safe_without_a_terminal(vm: Vm, tmp_path: Path) -> None:
    target = tmp_path / "old.img"
    target.write_bytes(b"precious")
    assert "Not without --force" in refused("-b", vm.directory, "restore", target, code=2)
    assert target.read_bytes() == b"precious"
    backyfs("-b", vm.directory, "restore", "--force", target)
    assert target.read_bytes() == vm.contents[-1]


def test_forget_without_a_terminal(vm: Vm) -> None:
    ids = vm.ids
    assert "Not without --yes" in refused("-b", vm.directory, "forget", "-r", "0", code=2)
    assert "no trusted revision" in refused("-b", vm.directory, "forget", "-yr", "all", code=2)
    assert "Missing option" in refused("-b", vm.directory, "forget", "-y", code=2)
    assert vm.ids == ids


def test_an_unwritable_base(vm: Vm, tmp_path: Path) -> None:
    require("root")
    base = tmp_path / "ro"
    base.mkdir()
    run("mount", "-t", "tmpfs", "tmpfs", base)
    try:
        shutil.copytree(vm.directory, base / "web01")
        run("mount", "-o", "remount,ro", base)
        assert "Read-only" in refused("-b", base / "new", "init", "file", vm.image, code=1)
        assert "Read-only" in refused("-b", base / "web01", "backup", code=1)
        refused("-b", base / "web01", "forget", "-yr", "first", code=1)
        refused("-b", base / "web01", "tags", "add", "-r", "0", "manual:x", code=1)
        # What only reads works as ever.
        backyfs("-b", base, "status")
        backyfs("-b", base / "web01", "status")
        backyfs("-b", base / "web01", "restore", "/dev/null")
    finally:
        run("umount", base)


def respelt(path: Path, **changes: object) -> None:
    """Change keys of a self-checking JSON file, with a right checksum."""
    value = json.loads(path.read_bytes())
    path.write_bytes(sealed(value | changes))


def test_a_newer_format(vm: Vm) -> None:
    respelt(vm.directory / "repository.json", format=2)
    for command in (["status"], ["backup"], ["restore", "-"], ["gc"]):
        assert "format" in refused("-b", vm.directory, *command, code=10)


def test_an_unknown_feature(vm: Vm) -> None:
    identity = vm.directory / "repository.json"
    features = {"incompat": ["time-travel"], "ro_compat": [], "compat": []}
    respelt(identity, features=features)
    assert "time-travel" in refused("-b", vm.directory, "status", code=10)
    respelt(identity, features={"incompat": [], "ro_compat": ["time-travel"], "compat": []})
    backyfs("-b", vm.directory, "restore", "/dev/null")
    refused("-b", vm.directory, "backup", code=10)


def test_a_damaged_repository_file(vm: Vm) -> None:
    (vm.directory / "repository.json").write_text("{")
    refused("-b", vm.directory, "status", code=12)
    assert "put repository.json back" in backyfs("-b", vm.directory, "backup", code=12).err


def test_a_lost_repository_file(vm: Vm) -> None:
    (vm.directory / "repository.json").unlink()
    assert "has revisions, but no" in refused("-b", vm.directory, "status", code=10)
    assert "put repository.json back" in backyfs("-b", vm.directory, "status", code=10).err


def test_a_vm_whose_revisions_are_all_unreadable_does_not_look_new(vm: Vm) -> None:
    for record in vm.directory.glob("revisions/*.json"):
        record.write_bytes(record.read_bytes()[:-20])
    status = backyfs("-b", vm.directory, "status")
    assert status.out.count("unreadable") == 3
    assert "no revision can be read" in status.out
    assert "no revisions yet" not in status.out


def test_an_unreadable_record_is_never_passed_over_silently(vm: Vm, tmp_path: Path) -> None:
    first, second, newest = vm.ids
    record = vm.directory / "revisions" / f"{newest}.json"
    record.write_bytes(record.read_bytes()[:-20])
    assert newest in refused("-b", vm.directory, "restore", "-r", newest, "-", code=12)
    result = backyfs("-b", vm.directory, "restore", tmp_path / "out")
    assert f"warning: left out: web01/{newest}" in result.err.replace(": damaged", "") or (
        newest in result.err
    )
    assert (tmp_path / "out").read_bytes() == vm.contents[1]
    status = backyfs("-b", vm.directory, "status")
    assert f"{newest}" in status.out
    assert "unreadable" in status.out
    assert "unreadable" in backyfs("-b", vm.directory.parent, "status").out
    assert newest in backyfs("-b", vm.directory, "verify", code=12).out
    refused("-b", vm.directory, "gc", code=12)
    backyfs("-b", vm.directory, "forget", "-yr", newest)
    assert vm.ids == [first, second]
    backyfs("-b", vm.directory, "gc")


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "1e999", "soon", ""])
def test_bad_numbers_of_seconds(seconds: str) -> None:
    assert "is no number of seconds" in refused("backup", "--wait", seconds, code=2)
    assert "is no number of seconds" in refused("scrub", "--budget", seconds, code=2)


def test_cow_where_nothing_can_be_shared(ext4_dir: Path, vm: Vm) -> None:
    line = refused("-b", ext4_dir / "vm", "init", "file", vm.image, "--store", "cow", code=2)
    assert "needs btrfs or XFS" in line
    assert not (ext4_dir / "vm" / "repository.json").exists()


def test_busy(vm: Vm) -> None:
    with open(vm.directory / "lock", "rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        for command in (["backup"], ["gc"], ["forget", "-yr", "0"], ["backup", "--wait", "0.3"]):
            assert "busy" in refused("-b", vm.directory, *command, code=75)
        backyfs("-b", vm.directory, "status")
        backyfs("-b", vm.directory, "restore", "/dev/null")
        backyfs("-b", vm.directory, "tags", "add", "-r", "0", "manual:x")


def test_a_full_store(small_fs: SmallFs, tmp_path: Path) -> None:
    base = small_fs("ext4", 16 * MIB)
    image = images.random_image(tmp_path / "big.img", 32 * MIB)
    backyfs("-b", base / "vm", "init", "file", image)
    assert "space" in refused("-b", base / "vm", "backup", code=14)
    assert backyfs("-b", base / "vm", "status", "--json").json["revisions"] == []


def test_a_full_target(small_fs: SmallFs, tmp_path: Path) -> None:
    image = images.random_image(tmp_path / "big.img", 16 * MIB)
    backyfs("-b", tmp_path / "vm", "init", "file", image)
    backyfs("-b", tmp_path / "vm", "backup", "--no-verify")
    target = small_fs("ext4", 8 * MIB) / "disk.img"
    assert "no space left" in refused("-b", tmp_path / "vm", "restore", target, code=14)
    assert not target.exists()


@pytest.mark.parametrize(
    "content", ["", "{", '{"a": 1}', '[{"offset": 0}]', '[{"offset": -1, "length": 5}]', None]
)
def test_bad_change_lists(vm: Vm, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "changes.json"
    if content is not None:
        path.write_text(content)
    ids = vm.ids
    refused("-b", vm.directory, "backup", "--changes", path, code=2)
    refused("-b", vm.directory, "backup", "--changes", f"data={path}", code=2)
    assert vm.ids == ids


def test_a_change_list_without_a_parent(tmp_path: Path) -> None:
    image = images.random_image(tmp_path / "x.img", 4096)
    (tmp_path / "changes.json").write_text("[]")
    backyfs("-b", tmp_path / "vm", "init", "file", image)
    assert "needs a revision" in refused(
        "-b", tmp_path / "vm", "backup", "--changes", tmp_path / "changes.json", code=2
    )


def test_copies_that_cannot_be(vm: Vm, tmp_path: Path) -> None:
    refused("copy", vm.directory, vm.directory, code=2)
    refused("copy", tmp_path / "missing", tmp_path / "x", code=10)
    refused("copy", vm.directory, vm.image / "b", code=10)
    stranger = tmp_path / "srv" / "db01"
    backyfs("-b", stranger, "init", "file", vm.image)
    backyfs("-b", stranger, "backup")
    assert "none of them is of this source" in refused("copy", vm.directory, stranger, code=2)
