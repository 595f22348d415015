"""Each command does its work, prints it, and keeps its promise about --json."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import backyfs as package
from backyfs.store.record import sealed
from tests import images
from tests.cli.conftest import Vm
from tests.cli.program import PROGRAM, Done, backyfs, refused

ROOT = Path(package.__file__).parent.parent
FRAME = 65536


def on(vm: Vm, *arguments: str | Path, code: int = 0) -> Done:
    return backyfs("-b", vm.directory, *arguments, code=code)


def damage(vm: Vm) -> None:
    """Spoil some stored bytes."""
    pack = max((vm.directory / "packs").iterdir(), key=lambda path: path.stat().st_size)
    pack.chmod(0o640)
    content = bytearray(pack.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 100] = bytes(b ^ 0x55 for b in content[middle : middle + 100])
    pack.write_bytes(content)


# ---- init and backup ---------------------------------------------------------------------------


def test_init_and_backup_of_several_disks(tmp_path: Path) -> None:
    one = images.make_image(tmp_path / "one.img", 300_000, seed=1)
    two = images.make_image(tmp_path / "two.img", 500_001, seed=2)
    directory = tmp_path / "base" / "db01"
    out = backyfs("-b", directory, "init", "file", f"root={one}", f"data={two}").out
    assert "db01: 2 disks, store packs" in out
    summary = backyfs("-b", directory, "backup", "--json").json
    assert [disk["name"] for disk in summary["disks"]] == ["root", "data"]
    assert "2 disks: root, data" in refused("-b", directory, "restore", "-", code=2)
    backyfs("-b", directory, "restore", "--disk", "data", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == two.read_bytes()


def test_a_path_with_a_sign_in_it_is_a_path(tmp_path: Path) -> None:
    image = images.make_image(tmp_path / "a=b.img", 4096)
    backyfs("-b", tmp_path / "vm", "init", "file", image)
    assert backyfs("-b", tmp_path / "vm", "backup", "--json").json["disks"][0]["name"] == "disk"


def test_an_init_that_was_interrupted_can_be_finished(vm: Vm) -> None:
    (vm.directory / "config").unlink()
    on(vm, "init", "file", vm.image)
    on(vm, "backup")
    assert len(vm.ids) == 4


def test_backup_says_what_it_did(vm: Vm) -> None:
    images.change_blocks(vm.image, 2, seed=9)
    out = on(vm, "backup", "daily,weekly", "manual:a b").out
    (line,) = out.splitlines()
    assert line.startswith(vm.ids[-1])
    assert "crash, verified; daily, manual:a b, weekly" in line
    assert on(vm, "backup", "--no-verify", "--json").json["verification"] == "none"
    assert backyfs("-q", "-b", vm.directory, "backup").out == ""


def test_tags_outside_the_schedule_need_force(vm: Vm) -> None:
    refused("-b", vm.directory, "backup", "yearly", code=2)
    assert on(vm, "backup", "--force", "yearly", "--json").json["tags"] == ["yearly"]


def test_without_tags_those_that_are_due(tmp_path: Path) -> None:
    image = images.make_image(tmp_path / "x.img", 100_000)
    backyfs("-b", tmp_path / "vm", "init", "file", image, "--schedule", "hourly")
    tags = [backyfs("-b", tmp_path / "vm", "backup", "--json").json["tags"] for _ in range(2)]
    assert tags == [["daily", "hourly", "monthly", "weekly"], ["hourly"]]


def test_what_is_due() -> None:
    from backyfs.cli.backup import due
    from backyfs.config import DAILY
    from backyfs.model import Consistency, Trust
    from backyfs.store.record import State
    from tests.reader.test_spec import HISTORY, NOW

    class Repository:
        pairs = HISTORY[:5]

        def revisions(self) -> list[Any]:
            return [record for record, _ in self.pairs]

        def state(self, record: Any) -> State:
            return next(state for other, state in self.pairs if other is record)

    repository: Any = Repository()
    assert due(DAILY, repository, NOW) == ["daily", "weekly", "monthly"]
    newest = HISTORY[4][0]
    soon = newest.time + timedelta(hours=13)
    assert due(DAILY, repository, soon) == ["daily", "monthly"]
    assert due(DAILY, repository, newest.time + timedelta(hours=1)) == ["monthly"]
    repository.pairs = [(r, State(("daily", "weekly", "monthly"), Trust.TRUSTED)) for r in [newest]]
    assert due(DAILY, repository, newest.time + timedelta(hours=1)) == ["daily"]
    repository.pairs = [(r, State(s.tags, Trust.DISTRUSTED)) for r, s in repository.pairs]
    assert len(due(DAILY, repository, newest.time + timedelta(hours=1))) == 3
    assert Consistency.TORN.rank == 0
    assert due({}, repository, datetime.now(UTC)) == []


def test_a_change_list_is_believed(vm: Vm, tmp_path: Path) -> None:
    images.change_range(vm.image, 5 * FRAME, 4096, seed=1)
    images.change_range(vm.image, 20 * FRAME, 4096, seed=2)
    changes = tmp_path / "changes.json"
    changes.write_text(json.dumps([{"offset": 5 * FRAME, "length": 4096, "exists": "true"}]))
    summary = on(vm, "backup", "--no-verify", "--changes", changes, "--json").json
    assert summary["read"] == FRAME
    assert summary["changed"] == FRAME


def test_progress_as_json_lines(vm: Vm) -> None:
    *status, summary = on(vm, "backup", "--json", "--progress").json_lines
    assert status
    assert {line["message_type"] for line in status} == {"status"}
    assert status[0]["phase"] == "backing up"
    assert summary["message_type"] == "summary"
    assert summary["vm"] == "web01"


# ---- status and find ---------------------------------------------------------------------------


def test_status_of_a_vm(vm: Vm) -> None:
    out = on(vm, "status").out.splitlines()
    assert out[0].split("  ")[0] == "Date (UTC)"
    assert re.split("  +", out[0])[1:] == [
        *["ID", "Size", "Stored", "Duration", "Tags", "Trust", "Consistency", "Health"]
    ]
    assert [line.split()[2] for line in out[2:5]] == vm.ids
    assert "manual:before upgrade" in out[3]
    assert out[5].startswith("3 revisions")


def test_status_in_another_zone(vm: Vm) -> None:
    time = datetime.fromisoformat(on(vm, "status", "--json").json["revisions"][0]["time"])
    out = backyfs("-b", vm.directory, "status", TZ="JST-9").out
    assert "Date (JST)" in out
    assert f"{time + timedelta(hours=9):%Y-%m-%d %H:%M:%S}" in out


def test_status_of_a_base_directory(vm: Vm) -> None:
    empty = vm.directory.parent / "new01"
    backyfs("-b", empty, "init", "file", vm.image)
    (vm.directory.parent / "broken01").mkdir()
    (vm.directory.parent / "broken01" / "repository.json").write_text("{")
    on(vm, "distrust", "-r", "first")
    damage(vm)
    on(vm, "verify", code=12)
    out = backyfs("-b", vm.directory.parent, "status", code=1).out.splitlines()
    assert [line.split()[0] for line in out[2:]] == ["broken01", "new01", "web01", "3"]
    assert "damaged" in out[2]
    assert "ok" in out[3]
    assert re.search(r"\d damaged, 1 distrusted", out[4])
    assert out[5] == "3 VMs"
    assert backyfs("-b", empty, "status").out.startswith("no revisions yet")


def test_a_vm_that_lost_its_identity_is_in_all_lists(vm: Vm) -> None:
    base = vm.directory.parent
    (vm.directory / "repository.json").unlink()
    lost = f"{vm.directory} has revisions, but no repository.json"
    assert lost in backyfs("-b", base, "status", code=1).out
    assert lost in backyfs("-b", base, "check", code=2).out
    assert lost in backyfs("-b", base, "usage", code=1).err
    assert refused("-b", vm.directory, "status", code=10) == lost


def test_find(vm: Vm) -> None:
    paths = on(vm, "find", "-r", "reverse(all)").out.splitlines()
    assert paths == [str(vm.directory / "revisions" / f"{i}.json") for i in vm.ids[::-1]]
    assert on(vm, "find", "--json").json["id"] == vm.ids[-1]


def test_find_shows_the_image_of_a_cow_store(vm: Vm, btrfs_dir: Path) -> None:
    backyfs("copy", vm.directory, btrfs_dir / "web01")
    path = Path(backyfs("-b", btrfs_dir / "web01", "find", "-r", "first").out.strip())
    assert path.suffix == ".img"
    assert path.read_bytes() == vm.contents[0]


# ---- restore -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "stdout", "check-first"])
def test_restore_every_revision(vm: Vm, tmp_path: Path, kind: str) -> None:
    for number, content in enumerate(reversed(vm.contents)):
        arguments = ["-b", str(vm.directory), "restore", "-r", str(number)]
        if kind == "stdout":
            done = subprocess.run([PROGRAM, *arguments, "-"], capture_output=True, check=True)
            assert done.stdout == content
            assert b"restored" in done.stderr
        else:
            target = tmp_path / f"{number}.img"
            more = ["--check-first"] if kind == "check-first" else []
            assert "restored 3.0 MiB" in backyfs(*arguments, *more, target).out
            assert target.read_bytes() == content


def test_what_a_restore_would_do(vm: Vm, tmp_path: Path) -> None:
    target = tmp_path / "disk.img"
    newest = vm.ids[-1]
    line = f"would restore {newest}/disk (3.0 MiB) to {target}"
    assert on(vm, "restore", "-n", target).out == f"{line}\n"
    target.write_bytes(b"old")
    assert on(vm, "restore", "-n", target).out == f"{line}, over existing data\n"
    assert target.read_bytes() == b"old"


def test_restore_of_damaged_data(vm: Vm, tmp_path: Path) -> None:
    damage(vm)
    target = tmp_path / "out"
    for more in ([], ["--check-first"]):
        assert "damaged at byte" in refused("-b", vm.directory, "restore", *more, target, code=12)
        assert not target.exists()
    result = on(vm, "restore", "--salvage", "--json", target, code=12)
    bad = result.json["bad"]
    assert bad
    expected = bytearray(vm.contents[-1])
    for extent in bad:
        expected[extent["offset"] : extent["offset"] + extent["length"]] = bytes(extent["length"])
    assert target.read_bytes() == expected
    shown = on(vm, "restore", "--salvage", "--force", target, code=12).err
    assert f"offset {bad[0]['offset']}, length {bad[0]['length']}" in shown


def test_a_missing_map_is_found_before_the_first_byte(vm: Vm, tmp_path: Path) -> None:
    for path in (vm.directory / "revisions").glob("*.map"):
        path.unlink()
    target = tmp_path / "old.img"
    target.write_bytes(b"precious")
    refused("-b", vm.directory, "restore", "--force", target, code=12)
    assert target.read_bytes() == b"precious"
    refused("-b", vm.directory, "restore", "--force", "--salvage", target, code=12)
    assert target.read_bytes() == b"precious"


# ---- judging and removing ----------------------------------------------------------------------


def test_verify_and_scrub(vm: Vm) -> None:
    assert on(vm, "verify", "--quick").out.splitlines() == [f"{i}: structure ok" for i in vm.ids]
    assert on(vm, "verify").out.splitlines() == [f"{i}: ok" for i in vm.ids]
    assert {r["trust"] for r in on(vm, "status", "--json").json["revisions"]} == {"verified"}
    assert "0 bad frames; all is read" in on(vm, "scrub").out
    assert on(vm, "scrub", "--budget", "0", "--json").json["complete"] is False
    damage(vm)
    result = on(vm, "verify", code=12)
    assert "fails its checksum" in result.out
    assert re.fullmatch(r"backyfs: web01: damaged: \d of 3 revisions\n", result.err)
    on(vm, "scrub", code=12)
    assert "damaged" in on(vm, "status").out
    on(vm, "backup")
    assert "damaged" not in on(vm, "status").out
    on(vm, "verify")


def test_distrust(vm: Vm) -> None:
    on(vm, "distrust", "-n", "-r", "first")
    assert on(vm, "status", "--json").json["revisions"][0]["trust"] == "trusted"
    on(vm, "distrust", "-r", "first", "--why", "the host had bad memory")
    first = on(vm, "status", "--json").json["revisions"][0]
    assert (first["trust"], first["why"]) == ("distrusted", "the host had bad memory")
    assert on(vm, "find", "-r", "trust:distrusted").out.count("\n") == 1


def test_forget_and_gc(vm: Vm) -> None:
    ids = vm.ids
    assert on(vm, "forget", "-n", "-r", "first").out.startswith(f"would forget: {ids[0]}")
    assert on(vm, "forget", "-y", "-r", "0..1", "--json").json_lines == [
        {"message_type": "forgotten", "id": i} for i in ids[1:]
    ]
    assert vm.ids == ids[:1]
    on(vm, "gc", "-n")
    assert on(vm, "gc", "--json").json["message_type"] == "gc"
    on(vm, "verify")
    on(vm, "forget", "--force", "-yr", "all")
    on(vm, "gc")
    assert list((vm.directory / "packs").iterdir()) == []


def test_forget_while_somebody_reads(vm: Vm) -> None:
    first = vm.ids[0]
    with subprocess.Popen(
        [PROGRAM, "-q", "-b", vm.directory, "restore", "-r", "first", "-"], stdout=subprocess.PIPE
    ) as reader:
        assert reader.stdout is not None
        content = reader.stdout.read(10)
        result = on(vm, "forget", "-yr", "first", code=1)
        assert f"somebody reads {first}" in result.err
        on(vm, "forget", "-y", "--force", "-r", "first")
        assert content + reader.stdout.read() == vm.contents[0]
    assert reader.returncode == 0


def test_forget_looks_again_when_it_is_its_turn(vm: Vm) -> None:
    """Somebody else removed one of two while it waited: the other goes, but not as the last."""
    first, second, third = vm.ids
    arguments = [PROGRAM, "-b", str(vm.directory), "forget", "-y", "--wait", "60", "-r"]

    def forget(spec: str, gone: str) -> tuple[int, str, str]:
        with open(vm.directory / "lock", "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            command = [*arguments, spec]
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as process:
                while not waits_for(process.pid, vm.directory / "lock"):
                    time.sleep(0.01)
                (vm.directory / "revisions" / f"{gone}.json").unlink()
                fcntl.flock(stream, fcntl.LOCK_UN)
                out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    code, out, err = forget(f"{first},{second}", gone=first)
    assert (code, out.startswith(f"forgotten: {second}")) == (0, True)
    assert f"{first} was removed by somebody else meanwhile" in err
    on(vm, "backup")
    third, fourth = vm.ids
    code, out, err = forget(third, gone=fourth)
    assert (code, out) == (2, "")
    assert "no trusted revision any more" in err
    assert vm.ids == [third]


def waits_for(pid: int, path: Path) -> bool:
    return any(os.path.realpath(link) == str(path) for link in Path(f"/proc/{pid}/fd").iterdir())


def test_tags(vm: Vm) -> None:
    newest = vm.ids[-1]
    tags = ("-b", vm.directory, "tags")
    assert backyfs(*tags, "add", "-r", "0", "manual:keep this", "weekly").out == (
        f"{newest}: daily, manual:keep this, weekly\n"
    )
    assert backyfs(*tags, "remove", "-r", "0", "daily,weekly", "--json").json == {
        "id": newest,
        "tags": ["manual:keep this"],
        "dry_run": False,
    }
    refused(*tags, "set", "-r", "0", "daily", "--expect", "weekly", code=2)
    refused(*tags, "set", "-r", "0", "hourly", code=2)
    backyfs(*tags, "set", "-n", "-r", "0", "daily")
    backyfs(*tags, "set", "-f", "-r", "0", "hourly", "--expect", "manual:keep this")
    assert on(vm, "status", "--json").json["revisions"][-1]["tags"] == ["hourly"]


def test_of_a_newer_version_only_what_may_be_read(vm: Vm) -> None:
    identity = vm.directory / "repository.json"
    value = json.loads(identity.read_bytes())
    value["features"]["ro_compat"] = ["later"]
    identity.write_bytes(sealed({k: v for k, v in value.items() if k != "blake3"}))
    damage(vm)

    def files() -> dict[Path, bytes]:
        found = (path for path in vm.directory.rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in found if path.name != "backy.log"}

    before = files()
    for command in (["tags", "add", "-r", "0", "manual:x"], ["distrust", "-r", "0"], ["backup"]):
        assert "allows this program to read only" in refused("-b", vm.directory, *command, code=10)
    assert "not recorded" in on(vm, "verify", "-r", "all", code=12).err
    assert "not recorded" in on(vm, "scrub", code=12).err
    assert files() == before


def test_a_damaged_state(vm: Vm) -> None:
    first = vm.ids[0]
    on(vm, "distrust", "-r", first)
    os.truncate(vm.directory / "revisions" / f"{first}.state", 100)
    on(vm, "verify", "-r", first, code=12)
    for command in (["tags", "add", "-r", first, "manual:zz"], ["distrust", "--lift", "-r", first]):
        for more in ([], ["-n"]):
            result = on(vm, *command, *more, code=12)
            assert result.err.splitlines() == [
                f"backyfs: web01: damaged: the state of revision {first} is not JSON",
                f"  run: backyfs distrust -r {first} (and then perhaps distrust --lift)",
            ]
    shown = on(vm, "status", "--json").json["revisions"][0]
    assert (shown["trust"], bool(shown["damage"])) == ("distrusted", True)
    on(vm, "distrust", "-n", "-r", first)
    assert on(vm, "distrust", "-r", first).err == (
        f"backyfs: warning: {first}: its state was damaged; its tags are those of its backup"
        " again: daily, weekly\n"
    )
    assert on(vm, "distrust", "--lift", "-r", first).err == ""
    on(vm, "tags", "add", "-r", first, "manual:zz")
    assert on(vm, "status", "--json").json["revisions"][0]["trust"] == "trusted"
    on(vm, "verify")


def test_manual_tags_protect(vm: Vm) -> None:
    on(vm, "tags", "set", "--force", "-r", "first", "unknown")
    dry = on(vm, "purge", "--dry-run").out
    assert f"would remove {vm.ids[0]}: unknown is not in the schedule" in dry
    on(vm, "tags", "add", "-r", "first", "manual:mine")
    assert f"would take unknown from {vm.ids[0]}" in on(vm, "expire", "--dry-run").out
    on(vm, "expire")
    ids = vm.ids
    assert len(ids) == 3
    on(vm, "tags", "remove", "-r", "first", "manual:mine")
    decisions = on(vm, "purge", "--json").json_lines
    assert [d["removed"] for d in decisions[:3]] == [True, False, False]
    assert decisions[3]["message_type"] == "gc"
    assert vm.ids == ids[1:]


def test_copy_says_what_it_leaves_out(vm: Vm, tmp_path: Path) -> None:
    middle = vm.ids[1]
    record = vm.directory / "revisions" / f"{middle}.json"
    whole = record.read_bytes()
    record.write_bytes(b"{" + whole)
    target = tmp_path / "copy"
    dry = backyfs("copy", "-n", vm.directory, target, code=12)
    done = backyfs("copy", vm.directory, target, code=12)
    assert done.out.startswith("copied ")
    for told in (dry.err, done.err):
        warning, error = told.splitlines()
        assert warning.startswith("backyfs: warning: left out: damaged: web01: the record of ")
        assert middle in warning
        assert error == "backyfs: web01: damaged: 1 of 3 revisions are not in the copy"
    record.write_bytes(whole)
    backyfs("copy", vm.directory, tmp_path / "all")
    record.write_bytes(b"{" + whole)
    assert backyfs("copy", vm.directory, tmp_path / "all").err == "", "the copy has it"


def test_two_copies_at_once(vm: Vm, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    command = [PROGRAM, "copy", "--json", "--wait", "60", str(vm.directory), str(target)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=90)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(json.loads(line)["revision"] for lines in told for line in lines) == sorted(
        vm.ids
    )
    backyfs("-b", target, "verify", "-r", "all")


def test_copy_lists_what_it_copied_before_an_error(vm: Vm, tmp_path: Path) -> None:
    first = vm.ids[0]
    (vm.directory / "revisions" / f"{vm.ids[1]}.disk.map").unlink()
    done = backyfs("copy", vm.directory, tmp_path / "copy", code=12)
    assert done.out == f"copied {first}\n"
    assert "is missing" in done.err


def test_copy_into_the_other_format(vm: Vm, xfs_dir: Path) -> None:
    target = xfs_dir / "base" / "web01"  # the base is made, too, as by init
    assert backyfs("copy", "-n", vm.directory, target).out.count("would copy") == 3
    assert not target.parent.exists()
    out = backyfs("copy", "--store", "cow", vm.directory, target).out
    assert out.splitlines()[:3] == [f"copied {i}" for i in vm.ids]
    digests = [
        [
            disk["digest"]
            for r in backyfs("-b", d, "status", "--json").json["revisions"]
            for disk in r["disks"]
        ]
        for d in (vm.directory, target)
    ]
    assert digests[0] == digests[1]
    for number, content in enumerate(reversed(vm.contents)):
        backyfs("-b", target, "restore", "-r", str(number), xfs_dir / "disk.img")
        assert (xfs_dir / "disk.img").read_bytes() == content
        (xfs_dir / "disk.img").unlink()
    backyfs("-b", target, "backup")  # the job came along
    assert backyfs("copy", vm.directory, target).out.startswith("0 copied")


# ---- promises ----------------------------------------------------------------------------------


def keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from keys(item)


def test_every_json_key_is_documented(vm: Vm) -> None:
    documented = set(re.findall(r"`([a-z_]+)`", (ROOT / "docs" / "cli.md").read_text()))
    commands: list[tuple[list[str], int]] = [
        (["backup", "--json", "--progress"], 0),
        (["status", "--json"], 0),
        (["find", "--json"], 0),
        (["restore", "--json", "--progress", "/dev/null"], 0),
        (["restore", "--json", "-n", "/dev/null"], 0),
        (["verify", "--json"], 0),
        (["scrub", "--json"], 0),
        (["distrust", "-r", "first", "--json"], 0),
        (["tags", "add", "-r", "0", "weekly", "--json"], 0),
        (["expire", "--json"], 0),
        (["forget", "-n", "-r", "first", "--json"], 0),
        (["purge", "--json"], 0),
        (["doctor", "--json"], 0),
    ]
    found = {
        key
        for args, code in commands
        for line in on(vm, *args, code=code).json_lines
        for key in keys(line)
    }
    found |= set(keys(backyfs("-b", vm.directory.parent, "status", "--json").json))
    damage(vm)
    found |= {key for line in on(vm, "verify", "--json", code=12).json_lines for key in keys(line)}
    found |= set(keys(on(vm, "restore", "--salvage", "--json", "/dev/null", code=12).json))
    found |= set(keys(json.loads(on(vm, "find", "-r", "9", "--json", code=11).err)))
    assert found <= documented, sorted(found - documented)


def test_no_bar_is_drawn_into_json(vm: Vm) -> None:
    assert on(vm, "restore", "--json", "--progress", "/dev/null").err == ""


def test_exit_codes_are_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    for line in backyfs("help", "exit-codes").out.splitlines():
        if line[:3].strip().isdigit():
            assert re.search(rf"^\| {line[:3].strip()} +\|", text, re.MULTILINE), line
