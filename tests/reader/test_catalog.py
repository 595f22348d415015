from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backyfs.errors import Corrupt, NoRepository, Unsupported
from backyfs.model import Trust
from backyfs.reader.catalog import Catalog
from backyfs.store.quarantine import Bad
from backyfs.store.record import Record, State, sealed, unsealed
from tests.reader.stores import add_revision, content, make_vm

SMALL = content(2, seed=1)


class Clock:
    """A clock that goes on when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ids(catalog: Catalog, vm: str) -> list[str]:
    return list(catalog.vm(vm).revisions)


def test_names_of_repositories_only(tmp_path: Path) -> None:
    for name in ("web01", "db", "A+b_c.d-e"):
        make_vm(tmp_path, name)
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".snapshot").mkdir()
    (tmp_path / "a file").write_text("x")
    shutil.copytree(tmp_path / "db", tmp_path / "-no")
    shutil.copytree(tmp_path / "db", tmp_path / ("x" * 65))
    assert list(Catalog(tmp_path).names()) == ["A+b_c.d-e", "db", "web01"]


def test_one_vms_directory_shows_that_vm(tmp_path: Path) -> None:
    repository = make_vm(tmp_path, "web01", SMALL)
    catalog = Catalog(tmp_path / "web01")
    assert list(catalog.names()) == ["web01"]
    assert ids(catalog, "web01") == [r.id for r in repository.revisions()]
    with pytest.raises(NoRepository):
        catalog.vm("other")


def test_a_missing_base_is_an_error_an_empty_one_is_not(tmp_path: Path) -> None:
    assert not Catalog(tmp_path).names()
    with pytest.raises(NoRepository):
        Catalog(tmp_path / "none")


def test_what_an_unmounted_disk_bares_is_no_empty_base(tmp_path: Path, clock: Clock) -> None:
    """The directory below it is another one, and has nothing in it."""
    base, away = tmp_path / "base", tmp_path / "away"
    base.mkdir()
    make_vm(base, "web01", SMALL)
    catalog = Catalog(base, clock=clock)
    assert list(catalog.names()) == ["web01"]
    base.rename(away)
    base.mkdir()
    clock.now += 1
    for ask in (catalog.names, lambda: catalog.changed_ns("web01"), lambda: catalog.vm("web01")):
        with pytest.raises(OSError, match="is its file system mounted"):
            ask()
    base.rmdir()
    away.rename(base)
    assert list(catalog.names()) == ["web01"]
    assert len(ids(catalog, "web01")) == 1


def test_a_base_that_was_emptied_or_filled_anew_is_what_it_is(tmp_path: Path, clock: Clock) -> None:
    base = tmp_path / "base"
    base.mkdir()
    make_vm(base, "web01", SMALL)
    catalog = Catalog(base, clock=clock)
    base.rename(tmp_path / "away")
    base.mkdir()
    make_vm(base, "db", SMALL)
    with pytest.raises(NoRepository):
        catalog.changed_ns("web01")
    assert list(catalog.names()) == ["db"]
    shutil.rmtree(base / "db")
    clock.now += 1
    assert not catalog.names()
    with pytest.raises(NoRepository):
        catalog.vm("db")


@pytest.mark.parametrize(
    "name", ["none", "../web01", ".", "..", "", "web01/", "web01\n", "lost+found"]
)
def test_what_is_no_vm(tmp_path: Path, name: str) -> None:
    make_vm(tmp_path, "web01", SMALL)
    (tmp_path / "lost+found").mkdir()
    with pytest.raises(NoRepository):
        Catalog(tmp_path).vm(name)


def test_latest_is_the_highest_seq_not_the_latest_time(tmp_path: Path) -> None:
    repository = make_vm(tmp_path, "vm")
    now = datetime.now(UTC)
    add_revision(repository, SMALL, time=now)
    second = add_revision(repository, SMALL, time=now - timedelta(days=1))
    latest = Catalog(tmp_path).vm("vm").latest
    assert latest is not None
    assert latest.record == second


def test_revisions_come_and_go(tmp_path: Path, clock: Clock) -> None:
    repository = make_vm(tmp_path, "vm", SMALL)
    catalog = Catalog(tmp_path, clock=clock)
    [first] = ids(catalog, "vm")
    second = add_revision(repository, SMALL).id
    assert ids(catalog, "vm") == [first], "not looked at again so soon"
    clock.now += 0.6
    assert ids(catalog, "vm") == [first, second]
    repository.remove([first])
    clock.now += 0.6
    assert ids(catalog, "vm") == [second]


def test_a_settled_directory_is_not_read_again(tmp_path: Path, clock: Clock) -> None:
    repository = make_vm(tmp_path, "vm", SMALL)
    for directory in (repository.layout.revisions, repository.layout.quarantine):
        os.utime(directory, (1e9, 1e9))
    catalog = Catalog(tmp_path, clock=clock)
    view = catalog.vm("vm")
    clock.now += 100
    assert catalog.vm("vm") is view
    os.utime(repository.layout.revisions)
    clock.now += 100
    assert catalog.vm("vm") is not view


def test_a_directory_whose_time_never_changes(tmp_path: Path, clock: Clock) -> None:
    """As rclone and others have it."""
    repository = make_vm(tmp_path, "vm", SMALL)
    directories = (repository.layout.revisions, repository.layout.quarantine)
    for directory in directories:
        os.utime(directory, (1e9, 1e9))
    catalog = Catalog(tmp_path, clock=clock)
    [first] = ids(catalog, "vm")
    second = add_revision(repository, SMALL).id
    repository.quarantine.add(Bad("unit", 1), "wrong content")
    for directory in directories:
        os.utime(directory, (1e9, 1e9))
    clock.now += 1
    assert ids(catalog, "vm") == [first, second]
    assert catalog.vm("vm").quarantine_ns


def test_vms_come_and_go(tmp_path: Path, clock: Clock) -> None:
    make_vm(tmp_path, "a", SMALL)
    catalog = Catalog(tmp_path, clock=clock)
    catalog.vm("a")
    make_vm(tmp_path, "b", SMALL)
    clock.now += 1
    assert list(catalog.names()) == ["a", "b"]
    shutil.rmtree(tmp_path / "a")
    clock.now += 1
    assert list(catalog.names()) == ["b"]
    with pytest.raises(NoRepository):
        catalog.vm("a")


@pytest.mark.parametrize("known", [False, True])
def test_a_vm_whose_identity_was_lost_is_damaged_not_gone(
    tmp_path: Path, clock: Clock, known: bool
) -> None:
    repository = make_vm(tmp_path, "vm", SMALL)
    catalog = Catalog(tmp_path, clock=clock)
    if known:
        catalog.vm("vm")
    repository.layout.identity.unlink()
    clock.now += 1
    assert list(catalog.names()) == ["vm"]
    with pytest.raises(Corrupt, match=r"vm has revisions, but no repository\.json"):
        catalog.vm("vm")
    (tmp_path / "begun" / "revisions").mkdir(parents=True)
    clock.now += 1
    assert list(catalog.names()) == ["vm"], "where nothing was made yet, nothing was lost"


@pytest.mark.parametrize("known", [False, True])
def test_a_vm_without_its_revisions_is_damaged_not_gone(
    tmp_path: Path, clock: Clock, known: bool
) -> None:
    repository = make_vm(tmp_path, "vm", SMALL)
    catalog = Catalog(tmp_path, clock=clock)
    if known:
        catalog.vm("vm")
    away = repository.layout.revisions.rename(tmp_path / "away")
    clock.now += 1
    assert list(catalog.names()) == ["vm"]
    for _ in range(2):
        with pytest.raises(Corrupt, match="vm: the directory revisions/ is missing"):
            catalog.vm("vm")
    away.rename(repository.layout.revisions)
    assert len(ids(catalog, "vm")) == 1


def test_another_repository_in_the_same_place(tmp_path: Path, clock: Clock) -> None:
    make_vm(tmp_path, "vm", SMALL)
    catalog = Catalog(tmp_path, clock=clock)
    old = catalog.vm("vm")
    shutil.rmtree(tmp_path / "vm")
    new = make_vm(tmp_path, "vm", SMALL)
    clock.now += 1
    view = catalog.vm("vm")
    assert view.repository.uuid == new.uuid != old.repository.uuid
    assert ids(catalog, "vm") == [r.id for r in new.revisions()]


def test_states_are_followed(tmp_path: Path, clock: Clock) -> None:
    repository = make_vm(tmp_path, "vm", SMALL)
    catalog = Catalog(tmp_path, clock=clock)
    [revision] = catalog.vm("vm").revisions.values()
    assert revision.state.trust is Trust.TRUSTED
    assert revision.state_ns == 0
    repository.update_state(
        revision.record.id, lambda state: State(("manual:keep",), Trust.DISTRUSTED)
    )
    clock.now += 1
    [revision] = catalog.vm("vm").revisions.values()
    assert revision.state == State(("manual:keep",), Trust.DISTRUSTED)
    assert revision.state_ns > 0


def test_a_damaged_record_is_left_out_and_said_once(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    repository = make_vm(tmp_path, "vm", SMALL, SMALL)
    bad, good = (r.id for r in repository.revisions())
    path = repository.layout.record(bad)
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b'"seq": 1', b'"seq": 9'))
    catalog = Catalog(tmp_path, clock=clock)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert ids(catalog, "vm") == [good]
            clock.now += 1
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
    path.write_bytes(sound)
    clock.now += 1
    assert ids(catalog, "vm") == [bad, good]


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    repository = make_vm(tmp_path, "vm")
    path = repository.layout.identity
    shutil.copytree(tmp_path / "vm", tmp_path / "other")
    path.write_bytes(sealed({**unsealed(path.read_bytes(), ""), "format": 99}))
    catalog = Catalog(tmp_path)
    assert list(catalog.names()) == ["other", "vm"]
    catalog.vm("other")
    with pytest.raises(Unsupported):
        catalog.vm("vm")


def test_without_waiting_nothing_is_read(tmp_path: Path, clock: Clock) -> None:
    make_vm(tmp_path, "vm", SMALL)
    catalog = Catalog(tmp_path, clock=clock)
    with pytest.raises(BlockingIOError):
        catalog.names(wait=False)
    with pytest.raises(BlockingIOError):
        catalog.vm("vm", wait=False)
    names, view = catalog.names(), catalog.vm("vm")
    assert catalog.names(wait=False) is names
    assert catalog.vm("vm", wait=False) is view
    clock.now += 1
    with pytest.raises(BlockingIOError):
        catalog.vm("vm", wait=False)
    assert catalog.vm("vm", wait=False, any_age=True) is view


def test_the_number_of_records_kept_is_bounded(tmp_path: Path) -> None:
    for name in "abcd":
        make_vm(tmp_path, name, SMALL, SMALL)
    catalog = Catalog(tmp_path, revisions_max=4, refresh_s=3600)
    for name in "abcd":
        catalog.vm(name)
    for name in "cd":
        catalog.vm(name, wait=False)
    for name in "ab":
        with pytest.raises(BlockingIOError):
            catalog.vm(name, wait=False)


def test_damage_is_known_per_revision(tmp_path: Path, clock: Clock) -> None:
    repository = make_vm(tmp_path, "vm", content(4, seed=3), b"\1" * 65536)
    first, second = repository.revisions()
    catalog = Catalog(tmp_path, clock=clock)
    view = catalog.vm("vm")
    assert view.damage(first, wait=False) == ()
    repository.quarantine.add(Bad(f"{second.id}-0", 0), "a test")
    clock.now += 1
    view = catalog.vm("vm")
    assert view.quarantine_ns
    with pytest.raises(BlockingIOError):
        view.damage(second, wait=False)
    found = {r.id: view.damage(r) for r in (first, second)}
    assert found == {r.id: tuple(repository.damage_of(r)) for r in (first, second)}
    view.damage(second, wait=False)


# ---- size ----------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path) -> Iterator[Path]:
    """1000 VMs with 50 revisions each; the records are real, shared by hard links."""
    template = make_vm(tmp_path, "template", SMALL)
    [record] = template.revisions()
    base = tmp_path / "base"
    base.mkdir()
    records = tmp_path / "records"
    records.mkdir()
    for number in range(50):
        _write(records, record, number)
    names = os.listdir(records)
    for number in range(1000):
        directory = base / f"vm{number:04}" / "revisions"
        directory.mkdir(parents=True)
        os.link(template.layout.identity, directory.parent / "repository.json")
        for name in names:
            os.link(records / name, directory / name)
    yield base
    shutil.rmtree(base)


def _write(directory: Path, record: Record, number: int) -> None:
    time_ = record.time + timedelta(hours=number)
    revision = f"{time_:%Y%m%dT%H%M%SZ}-{number:04}"
    data = replace(record, seq=number + 1, id=revision, time=time_).encode()
    (directory / f"{revision}.json").write_bytes(data)


def test_a_thousand_vms_are_listed_without_a_look_into_them(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    decode = Record.decode

    def counted(data: bytes, what: str) -> Record:
        decoded.append(what)
        return decode(data, what)

    monkeypatch.setattr(Record, "decode", counted)
    catalog = Catalog(many)
    assert len(catalog.names()) == 1000
    assert decoded == []
    assert len(catalog.vm("vm0500").revisions) == 50
    assert len(decoded) == 50


def test_a_walk_over_all_of_them_is_bounded_in_memory(many: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WALK, many], capture_output=True, text=True, check=True, timeout=60
    )
    before, after = map(int, done.stdout.split())
    assert after - before < 96 * 1024  # KiB


_WALK = """
import resource, sys
from pathlib import Path
from backyfs.reader.catalog import Catalog
catalog = Catalog(Path(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
assert sum(len(catalog.vm(name).revisions) for name in catalog.names()) == 50_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
