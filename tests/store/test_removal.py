"""Removing many revisions at once: the records are read once, not once for each of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from backyfs.errors import Corrupt
from backyfs.store.ledger import Ledger
from backyfs.store.record import Record, sealed, unsealed
from backyfs.store.removal import Removal
from backyfs.store.repository import Repository
from tests.reader.stores import content, make_vm

ONE, OTHER = content(3, seed=1), content(3, seed=2)


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one whenever all of revisions/ is looked at."""
    found: list[None] = []
    files = Ledger._files

    def counted(ledger: Ledger) -> Iterator[os.DirEntry[str]]:
        found.append(None)
        return files(ledger)

    monkeypatch.setattr(Ledger, "_files", counted)
    return found


def ids(vm: Repository) -> list[str]:
    return [record.id for record in vm.revisions()]


def removing(vm: Repository, count: int, scans: list[None]) -> int:
    doomed = ids(vm)[:count]
    scans.clear()
    assert vm.remove(doomed) == Removal(removed=doomed)
    return len(scans)


def test_many_cost_no_more_looks_than_one(tmp_path: Path, scans: list[None]) -> None:
    vm = make_vm(tmp_path, "vm", *[ONE, OTHER] * 6)
    assert removing(vm, 1, scans) == removing(vm, 8, scans)
    assert len(ids(vm)) == 3
    assert vm.fsck() == []


def test_what_revisions_share_goes_with_the_last_of_them(tmp_path: Path) -> None:
    vm = make_vm(tmp_path, "vm", ONE, ONE, ONE, OTHER)
    shared = vm.format_files(vm.revisions()[0])
    assert shared == vm.format_files(vm.revisions()[2])
    vm.remove(ids(vm)[:2])
    assert all(path.exists() for path in shared)
    vm.remove(ids(vm)[:1])
    assert not any(path.exists() for path in shared)
    assert vm.fsck() == []


def test_an_unreadable_record_keeps_files_until_it_is_removed(tmp_path: Path) -> None:
    vm = make_vm(tmp_path, "vm", ONE, OTHER, content(3, seed=3))
    first, second, _ = vm.revisions()
    vm.layout.record(second.id).write_bytes(b"{}")
    vm.remove([first.id])
    assert all(path.exists() for path in vm.format_files(first))
    third = vm.revisions()[-1]
    vm.remove([second.id, third.id])
    assert ids(vm) == []
    assert not any(path.exists() for path in vm.format_files(third))


def test_a_state_is_changed_without_a_look_at_others(tmp_path: Path, scans: list[None]) -> None:
    vm = make_vm(tmp_path, "vm", ONE, OTHER)
    records = vm.revisions()
    scans.clear()
    for record in records:
        vm.update_state(record.id, lambda state: replace(state, tags=("manual:x",)))
    assert scans == []
    assert [vm.state(record).tags for record in records] == [("manual:x",)] * 2


def rewritten(vm: Repository, record: Record, files: dict[str, str]) -> None:
    """Have a record name these files for its disk; its checksum is right."""
    path = vm.layout.record(record.id)
    value = unsealed(path.read_bytes(), "it")
    value["disks"][0]["files"] = files
    path.write_bytes(sealed(value))


@pytest.mark.parametrize("store", ["packs", "cow"])
def test_a_record_that_names_no_files_can_be_given_up(
    tmp_path: Path, xfs_dir: Path, store: str
) -> None:
    vm = make_vm(tmp_path if store == "packs" else xfs_dir, "vm", ONE, OTHER, ONE, store=store)
    broken = vm.revisions()[1]
    rewritten(vm, broken, {})
    with pytest.raises(Corrupt, match=f"vm/{broken.id}/disk: .*the record names no"):
        vm.open_disk(vm.record(broken.id), "disk")
    with pytest.raises(Corrupt, match=f"forget -r {broken.id} gives it up"):
        vm.gc()
    assert any(broken.id in problem for problem in vm.fsck())
    assert vm.remove([broken.id]) == Removal(removed=[broken.id])
    vm.gc()
    assert len(ids(vm)) == 2
    for record in vm.revisions():
        image = vm.open_disk(record, "disk")
        assert image.read(0, image.size) == ONE
        image.close()
    assert vm.fsck() == []


@pytest.mark.parametrize("suffix", [".json", ".state"])
def test_a_record_that_names_another_one_as_a_disk_s_file(tmp_path: Path, suffix: str) -> None:
    """Removing it would take the other revision away."""
    vm = make_vm(tmp_path, "vm", ONE, OTHER)
    other, lying = vm.revisions()
    rewritten(vm, lying, dict(lying.disks["disk"].files) | {f"{other.id}{suffix}": ""})
    assert "impossible files" in str(vm.unreadable()[lying.id])
    assert vm.remove([lying.id]) == Removal(removed=[lying.id])
    assert ids(vm) == [other.id]
