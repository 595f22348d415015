"""The check of all jobs: every finding, its severity, and nothing where all is well."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backyfs.config import DAILY, HOURLY, Job
from backyfs.config.site import Settings, Site, SiteJob
from backyfs.engine.check import Check, check
from backyfs.engine.health import Severity
from backyfs.engine.scrub_position import Position, save
from backyfs.errors import BackyfsError
from backyfs.model import Consistency, Trust
from backyfs.store import lock
from backyfs.store.ledger import Ledger
from backyfs.store.quarantine import Bad
from backyfs.store.record import Draft, Record, sealed, unsealed
from backyfs.store.repository import Repository
from tests.filesystems import mounted

NOW = datetime.now(UTC).replace(microsecond=0)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


class Base:
    """A base directory with jobs, and the check over it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path.parent / "backy.conf"
        self.config.write_text("")
        os.utime(self.config, times=((NOW - 30 * DAY).timestamp(),) * 2)
        self.jobs: dict[str, SiteJob] = {}

    def job(self, name: str, *ages: timedelta, hourly: bool = False) -> Repository:
        """A job with revisions of these ages."""
        schedule = HOURLY if hourly else DAILY
        self.jobs[name] = SiteJob(name, Job("file", {"filename": "/x"}, schedule))
        repository = Repository.create(self.path / name, "packs")
        for age in ages:
            revise(repository, age)
        return repository

    def check(self, *ignore: str, now: datetime = NOW) -> Check:
        site = Site(self.config, Settings(base_dir=self.path), jobs=self.jobs)
        return check(site, ignore=ignore, now=now)

    def kinds(self, *ignore: str, now: datetime = NOW) -> list[tuple[str, str]]:
        found = self.check(*ignore, now=now).findings
        return [(f.severity.name, f.kind) for f in found if f.kind != "disk"]


def revise(
    repository: Repository,
    age: timedelta,
    consistency: Consistency = Consistency.CRASH,
    tags: tuple[str, ...] = ("daily",),
) -> Record:
    records = repository.revisions()
    with (
        repository.writing() as intent,
        repository.begin(intent, records[-1] if records else None, time=NOW - age) as staging,
    ):
        staging.disk("disk", 70_000).write(0, os.urandom(70_000))
        return staging.commit(Draft(consistency, tags=tags))


@pytest.fixture
def base(tmp_path: Path) -> Base:
    (tmp_path / "srv").mkdir()
    return Base(tmp_path / "srv")


def test_all_is_well(base: Base) -> None:
    base.job("web01", 30 * HOUR, 2 * HOUR)
    base.job("db01", 1 * HOUR, hourly=True)
    result = base.check("disk")
    assert result.findings == []
    assert result.severity is Severity.OK
    assert [job.late for job in result.jobs] == [False, False]


def test_late_is_older_than_one_and_a_half_intervals(base: Base) -> None:
    base.job("web01", 36 * HOUR)
    base.job("db01", 90 * timedelta(minutes=1), hourly=True)
    assert base.kinds() == []
    assert base.kinds(now=NOW + timedelta(seconds=1)) == [("CRITICAL", "late")] * 2


def test_what_is_ignored_is_no_finding_and_still_true(base: Base) -> None:
    base.job("web01", 30 * HOUR)
    base.job("db01", 40 * HOUR)
    found = base.check("late")
    assert not any(finding.kind == "late" for finding in found.findings)
    assert {job.name: job.late for job in found.jobs} == {"web01": False, "db01": True}


def test_what_was_never_backed_up_is_late_after_its_first_slot(base: Base) -> None:
    base.job("web01")
    assert base.kinds() == []
    assert base.kinds(now=NOW + 37 * HOUR) == [("CRITICAL", "late")]


def test_a_job_without_a_repository(base: Base) -> None:
    base.job("web01")
    shutil.rmtree(base.path / "web01")
    assert base.kinds() == [("CRITICAL", "late")], "the configuration is 30 days old"
    os.utime(base.config)
    assert base.kinds() == []


def test_a_job_first_seen_in_the_future(base: Base) -> None:
    """The clock was wrong then; the configuration tells since when it should have backups."""
    path = base.job("web01").layout.identity
    value = unsealed(path.read_bytes(), "it")
    path.chmod(0o600)
    path.write_bytes(sealed(value | {"created": "2094-01-01T00:00:00Z"}))
    row = '[{"job": "web01", "first_seen": "%s"}]'
    status = base.path / "status"
    for year in (2020, 2094):
        status.write_text(row % f"{year}-01-01T00:00:00Z")
        assert base.kinds("status", "clock") == [("CRITICAL", "late")]
    os.utime(base.config)
    assert base.kinds("status", "clock") == []


@pytest.mark.parametrize(
    ("consistency", "trust", "kind"),
    [
        (Consistency.TORN, Trust.TRUSTED, "torn"),
        (Consistency.CRASH, Trust.DISTRUSTED, "distrusted"),
    ],
)
def test_a_bad_revision_is_no_backup(
    base: Base, consistency: Consistency, trust: Trust, kind: str
) -> None:
    repository = base.job("web01", 30 * HOUR)
    record = revise(repository, 1 * HOUR, consistency)
    repository.update_state(record.id, lambda state: replace(state, trust=trust))
    assert base.kinds() == [("WARNING", kind)]
    assert base.kinds(now=NOW + 8 * HOUR) == [("CRITICAL", "late"), ("WARNING", kind)]
    assert base.kinds(kind) == []


def test_torn_ones_before_a_good_one_do_not_count(base: Base) -> None:
    repository = base.job("web01", 50 * HOUR)
    revise(repository, 30 * HOUR, Consistency.TORN)
    revise(repository, 1 * HOUR)
    assert base.kinds() == []


def test_quarantine_and_files_that_are_gone(base: Base) -> None:
    repository = base.job("web01", 30 * HOUR, 1 * HOUR)
    newest = repository.revisions()[-1]
    bad = Bad(f"{newest.id}-0", 0)
    repository.quarantine.add(bad, "test")
    assert ("WARNING", "damaged") in base.kinds()
    assert base.check().jobs[0].good == repository.revisions()[0]
    repository.quarantine.clear(bad)
    assert base.kinds() == []
    (repository.layout.revisions / f"{newest.id}.disk.map").unlink()
    assert base.kinds() == [("WARNING", "damaged")]
    assert base.check().jobs[0].good == repository.revisions()[0]


def test_a_state_that_cannot_be_read(base: Base) -> None:
    repository = base.job("web01", 30 * HOUR, 1 * HOUR)
    newest = repository.revisions()[-1]
    repository.update_state(newest.id, lambda state: replace(state, trust=Trust.VERIFIED))
    assert base.kinds() == []
    os.truncate(repository.layout.state(newest.id), 100)
    assert base.kinds() == [("WARNING", "distrusted"), ("WARNING", "damaged")]
    assert base.check().jobs[0].good == repository.revisions()[0]


def test_an_unreadable_record(base: Base) -> None:
    repository = base.job("web01", 30 * HOUR, 1 * HOUR)
    path = repository.layout.record(repository.revisions()[0].id)
    path.chmod(0o600)
    path.write_text("{}")
    assert base.kinds() == [("WARNING", "unreadable")]


def test_revisions_that_come_and_go_meanwhile(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = base.job("web01", 30 * HOUR, 29 * HOUR)
    real = Ledger.entries

    def entries(ledger: Ledger) -> dict[str, Record | BackyfsError]:
        monkeypatch.undo()
        made = revise(repository, 1 * HOUR)
        found = real(ledger)
        repository.remove([repository.revisions()[0].id])
        assert made.id in found
        return found

    monkeypatch.setattr(Ledger, "entries", entries)
    assert base.kinds() == []


def test_a_repository_that_cannot_be_read(base: Base) -> None:
    repository = base.job("web01", 1 * HOUR)
    repository.layout.identity.chmod(0o600)
    repository.layout.identity.write_text("{}")
    assert base.kinds() == [("CRITICAL", "repository")]


@pytest.mark.parametrize("created", [["never"], "9999-12-31T23:59:59-14:00"])
def test_a_repository_made_at_no_time(base: Base, created: object) -> None:
    path = base.job("web01", 1 * HOUR).layout.identity
    value = unsealed(path.read_bytes(), "it")
    path.chmod(0o600)
    path.write_bytes(sealed(value | {"created": created}))
    assert base.kinds() == []


def test_a_repository_without_its_revisions(base: Base) -> None:
    repository = base.job("web01", 1 * HOUR)
    shutil.rmtree(repository.layout.revisions)
    (text,) = [f.text for f in base.check("disk").findings]
    assert text == "cannot be read: damaged: web01: the directory revisions/ is missing"


def test_a_time_in_the_future_is_no_backup(base: Base) -> None:
    repository = base.job("web01", 40 * HOUR, -3 * DAY)
    assert base.kinds() == [("CRITICAL", "late"), ("WARNING", "clock")]
    revise(repository, 1 * HOUR)
    assert base.kinds() == [("WARNING", "clock")]


def test_a_clock_that_went_back(base: Base) -> None:
    base.job("web01", 1 * HOUR, 20 * HOUR)
    assert base.kinds() == [("WARNING", "clock")]


def test_data_nobody_looked_at(base: Base) -> None:
    repository = base.job("web01", 61 * DAY, 1 * HOUR)
    repository.update_state(
        repository.revisions()[0].id, lambda s: replace(s, tags=("manual:keep",))
    )
    assert base.kinds() == [("WARNING", "unverified")]
    save(repository, Position(finished=NOW - DAY))
    result = base.check("disk")
    assert result.findings == []
    assert result.jobs[0].checked == NOW - DAY


@contextmanager
def reading(path: Path) -> Iterator[None]:
    with open(path, "rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        yield


def test_readers_that_keep_what_expired(base: Base) -> None:
    repository = base.job("web01", *(age * DAY for age in range(40, 0, -1)))
    expired = repository.revisions()[0]
    repository.remove([r.id for r in repository.revisions()[1:20]])
    for kept in repository.revisions()[1:]:
        repository.update_state(kept.id, lambda s: replace(s, tags=("daily", "manual:x")))
    path = repository.format.lockable(expired.disks["disk"])
    assert path is not None
    now = NOW + 12 * HOUR
    assert base.kinds(now=now) == [("WARNING", "unpurged")]
    with reading(path):
        assert base.kinds(now=now) == [("WARNING", "readers")]
    repository.remove([expired.id])
    assert base.kinds(now=now) == []


def test_a_running_backup_is_seen_and_disturbed_by_nothing(base: Base) -> None:
    repository = base.job("web01", 40 * HOUR)
    with repository.writing() as intent:
        intent.write("20261121T220112Z-0001")
        assert base.kinds() == [("WARNING", "late")]
        assert base.check().jobs[0].running is not None
        assert base.kinds(now=NOW + 60 * HOUR) == [("CRITICAL", "late")], "it runs for too long"
    assert base.check().jobs[0].running is None


def test_the_status_of_a_daemon(base: Base) -> None:
    base.job("web01", 1 * HOUR)
    status = base.path / "status"
    status.write_text("[]")
    assert base.kinds(now=datetime.now(UTC)) == []
    os.utime(status, times=(time.time() - 400,) * 2)
    assert base.kinds(now=datetime.now(UTC)) == [("CRITICAL", "status")]
    os.utime(status, times=(time.time() + 4000,) * 2)
    assert base.kinds(now=datetime.now(UTC)) == [("WARNING", "clock")]


def test_a_scheduler_that_cannot_write_its_status(base: Base) -> None:
    base.job("web01", 1 * HOUR)
    status = base.path / "status"
    status.write_text("[]")
    os.utime(status, times=(time.time() - 400,) * 2)

    def told() -> str:
        [text] = [f.text for f in base.check(now=datetime.now(UTC)).findings if f.kind == "status"]
        return text

    assert told().endswith("the scheduler does not run")
    with lock.exclusive(base.path / ".lock", 0.0, "held"):
        assert told().endswith("the scheduler cannot write it, see its log")


def test_directories_without_a_job(base: Base) -> None:
    base.job("web01", 1 * HOUR)
    for name in ("old", "older"):
        Repository.create(base.path / name, "packs")
    (base.path / "lost+found").mkdir()
    result = base.check()
    assert list(result.unmanaged) == ["old", "older"]
    assert ("WARNING", "unmanaged") in base.kinds()


def test_a_full_disk(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    base.job("web01", 1 * HOUR)
    real = os.statvfs(base.path)
    for percent, severity in ((89, "OK"), (91, "WARNING"), (96, "CRITICAL")):
        free = real.f_blocks * (100 - percent) // 100
        values = list(real)
        values[4] = free
        monkeypatch.setattr(os, "statvfs", lambda path, v=tuple(values): os.statvfs_result(v))
        assert base.check().severity.name == severity


def test_a_dead_disk_hides_no_job(tmp_path: Path) -> None:
    """Every look at it fails: each job is told of, and the metrics are there."""
    with mounted("xfs", tmp_path, 0) as disk:
        base = Base(disk / "srv")
        base.path.mkdir()
        base.config = tmp_path / "backy.conf"
        base.config.write_text("")
        base.job("web01", 1 * HOUR)
        base.job("db01", 1 * HOUR)
        shut_down(disk)
        found = base.check()
    assert {f.job for f in found.findings if f.kind == "repository"} == {"web01", "db01"}
    assert len(found.jobs) == 2
    assert found.severity is Severity.CRITICAL


def shut_down(xfs: Path) -> None:
    """As after an error of its disk: it answers everything with "Input/output error"."""
    with opened(xfs) as fd:
        fcntl.ioctl(fd, 0x8004587D, struct.pack("I", 2))  # XFS_IOC_GOINGDOWN, without the log


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def test_no_base_directory(base: Base) -> None:
    base.job("web01")
    shutil.rmtree(base.path)
    assert {kind for _, kind in base.kinds()} == {"late"}
    assert any(f.kind == "disk" for f in base.check().findings)
