"""Symbolic links in a VM's directory, put there by whoever filled it: none leads us outside."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from backyfs import log
from backyfs.errors import Corrupt
from backyfs.model import FRAME
from backyfs.store.repository import Repository
from tests.store.contract import back_up, noise, read_all

CONTENT = noise(2 * FRAME)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(tmp_path / "vm", "packs")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside"
    path.write_text("theirs\n")
    return path


def linked(path: Path, target: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def test_a_lock_is_not_written_outside(repository: Repository, outside: Path) -> None:
    linked(repository.layout.lock, outside)
    with pytest.raises(OSError, match="it is a symbolic link"):
        back_up(repository, CONTENT)
    assert outside.read_text() == "theirs\n"


def test_the_lock_of_states_is_not_made_outside(repository: Repository, tmp_path: Path) -> None:
    record = back_up(repository, CONTENT).record
    linked(repository.layout.meta_lock, tmp_path / "new")
    with pytest.raises(OSError, match="it is a symbolic link"):
        repository.update_state(record.id, lambda state: state)
    assert not (tmp_path / "new").exists()


def test_usage_is_not_noted_outside(
    repository: Repository, outside: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = back_up(repository, CONTENT).record
    repository.note_usage("backup", record)
    [readings] = (repository.path / "usage").iterdir()
    linked(readings, outside)
    repository.note_usage("gc")
    assert outside.read_text() == "theirs\n"
    assert "usage is not noted" in caplog.text


def test_the_log_is_not_written_outside(repository: Repository, outside: Path) -> None:
    linked(repository.path / log.VM_LOG, outside)
    with log.about("vm", repository.path):
        logging.getLogger("backyfs.test").warning("a line")
    assert outside.read_text() == "theirs\n"


@pytest.mark.parametrize("name", ["revisions", "packs", "quarantine", "reports", "usage"])
def test_a_directory_that_leads_to_another_vm_is_refused(
    repository: Repository, tmp_path: Path, name: str
) -> None:
    other = Repository.create(tmp_path / "other", "packs")
    record = back_up(other, CONTENT).record
    linked(repository.path / name, other.path / name)
    with pytest.raises(Corrupt, match=f"{name} is a symbolic link"):
        Repository.open(repository.path).gc()
    assert read_all(other, record) == CONTENT


@pytest.mark.parametrize("suffix", [".json", ".state"])
def test_what_is_read_whole_is_not_read_elsewhere(
    repository: Repository, tmp_path: Path, suffix: str
) -> None:
    record = back_up(repository, CONTENT).record
    repository.update_state(record.id, lambda state: state.__class__(("manual:x",), state.trust))
    path = repository.layout.revisions / f"{record.id}{suffix}"
    shutil.move(path, tmp_path / "elsewhere")
    linked(path, tmp_path / "elsewhere")
    assert "it is a symbolic link" in str(Repository.open(repository.path).damage())


@pytest.mark.parametrize(
    "name", ["../../outside", "/etc/passwd", "20260101T000000Z-0000.x/../../y", "x.map", ""]
)
def test_a_record_names_no_files_outside(repository: Repository, name: str) -> None:
    """Though its checksum is right."""
    record = back_up(repository, CONTENT).record
    disk = replace(record.disks["disk"], files={name: "00"})
    wrong = replace(record, disks={"disk": disk}).encode()
    repository.layout.record(record.id).write_bytes(wrong)
    assert Repository.open(repository.path).unreadable().keys() == {record.id}
