"""What commands leave in a VM's log, and what they say on stderr besides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backyfs.store import repository
from tests import images
from tests.cli.conftest import Vm
from tests.cli.program import backyfs, refused

MIB = 1024 * 1024


def last_line(directory: Path) -> str:
    return (directory / "backy.log").read_text().splitlines()[-1]


def test_why_a_backup_failed_is_in_the_log(vm: Vm) -> None:
    vm.image.unlink()
    said = refused("-b", vm.directory, "backup", code=13)
    line = last_line(vm.directory)
    assert " ERROR web01 cli.backup failed code=13 reason=" in line
    assert said in line


def test_a_failure_is_logged_where_it_was_asked_for(vm: Vm, tmp_path: Path) -> None:
    vm.image.unlink()
    refused("-l", tmp_path / "log", "-b", vm.directory, "backup", code=13)
    assert "cli.backup failed" in (tmp_path / "log").read_text()


@pytest.fixture
def damaged(xfs_dir: Path) -> Path:
    """A cow repository whose revision has one bad frame that nobody met yet."""
    image = images.random_image(xfs_dir / "web01.img", 2 * MIB)
    directory = xfs_dir / "srv" / "web01"
    backyfs("-b", directory, "init", "--store", "cow", "file", image)
    backyfs("-b", directory, "backup")
    path = Path(backyfs("-b", directory, "find").out.strip())
    path.chmod(0o600)
    images.change_range(path, MIB + 5, 3, seed=1)
    return directory


def test_damage_is_one_line_for_the_operator_and_one_in_the_log(damaged: Path) -> None:
    said = refused("-b", damaged, "restore", "--check-first", "/dev/null", code=12)
    assert f"damaged at byte {MIB}" in said
    lines = (damaged / "backy.log").read_text().splitlines()
    assert [line.split(" ")[4] for line in lines] == [
        "engine.backup",
        "store.cow.damage",
        "cli.restore",
    ]


def test_damage_met_with_json_is_json(damaged: Path) -> None:
    done = backyfs("-b", damaged, "verify", "--json", code=12)
    assert [json.loads(line)["message_type"] for line in done.err.splitlines()] == ["exit_error"]


def test_warnings_of_the_engine_are_json_with_json(vm: Vm) -> None:
    (newest,) = vm.directory.glob(f"revisions/{vm.ids[-1]}*.map")
    newest.unlink()
    done = backyfs("-b", vm.directory, "backup", "--json")
    (warning,) = [json.loads(line) for line in done.err.splitlines()]
    assert warning["message_type"] == "warning"
    assert "building on an older one" in warning["message"]
    (line,) = backyfs("-b", vm.directory, "backup").err.splitlines() or ["backyfs: warning: "]
    assert line.startswith("backyfs: warning: ")


def test_a_vm_that_may_not_be_looked_at_hides_no_other(
    vm: Vm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As root nothing is forbidden, so the refusal is made up."""
    from backyfs.cli.main import main

    secret = vm.directory.parent / "secret"
    secret.mkdir()

    def is_repository(path: Path) -> bool:
        if path == secret:
            raise PermissionError(13, "Permission denied", str(path))
        return (path / "repository.json").is_file()

    monkeypatch.setattr(repository, "is_repository", is_repository)
    assert main(["-b", str(vm.directory.parent), "status", "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)["vms"]
    assert (first["vm"], "error" in first) == ("secret", True)
    assert second["revisions"] == 3


def test_json_logs_on_request(vm: Vm) -> None:
    before = (vm.directory / "backy.log").read_text()
    backyfs("--log-format", "json", "-b", vm.directory, "backup", "manual:x")
    backyfs("-b", vm.directory, "backup", "manual:x", BACKYFS_LOG_FORMAT="json")
    lines = (vm.directory / "backy.log").read_text().removeprefix(before).splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events.count("revision published") == 2


def test_a_log_that_cannot_be_written_is_told_as_other_warnings(vm: Vm) -> None:
    log = vm.directory / "backy.log"
    log.unlink()
    log.mkdir()
    done = backyfs("-b", vm.directory, "backup", "manual:x", "--json")
    assert json.loads(done.err) == {
        "message_type": "warning",
        "message": f"web01: cannot log to {log}: Is a directory",
    }
    assert done.json["vm"] == "web01"
    done = backyfs("-q", "-b", vm.directory, "backup", "manual:x")
    assert done.err == f"backyfs: warning: web01: cannot log to {log}: Is a directory\n"


def test_a_log_that_leads_elsewhere_is_not_written(vm: Vm, tmp_path: Path) -> None:
    log, other = vm.directory / "backy.log", tmp_path / "other"
    log.unlink()
    log.symlink_to(other)
    done = backyfs("-b", vm.directory, "backup", "manual:x")
    assert done.err == f"backyfs: warning: web01: cannot log to {log}: it is a symbolic link\n"
    assert not other.exists()
