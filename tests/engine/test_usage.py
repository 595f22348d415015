"""Usage: exact where the meter was read, an estimate before, sums by tenant."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backyfs.engine.usage import GB, by_tenant, usage_of
from backyfs.model import Consistency
from backyfs.store.meter import Reading
from backyfs.store.record import Draft, Stats
from backyfs.store.repository import Repository

START = datetime(2026, 11, 1, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(tmp_path / "web01", "packs")


def revise(repository: Repository, day: int, *, noted: bool) -> None:
    records = repository.revisions()
    time = START + day * DAY
    with (
        repository.writing() as intent,
        repository.begin(intent, records[-1] if records else None, time=time) as staging,
    ):
        staging.disk("disk", 1 << 20).write(0, os.urandom(1 << 20))
        record = staging.commit(Draft(Consistency.CRASH, stats=Stats(read=1000)))
    if noted:
        repository.note_usage("backup", record, time=time + HOUR)


def test_the_meter_alone(repository: Repository) -> None:
    note = repository.meter.note
    note(Reading(START + 1 * DAY, "backup", GB, 5, read=7, written=3, revision="a"))
    note(Reading(START + 2 * DAY, "backup", 3 * GB, 6, read=10, written=1, revision="b"))
    note(Reading(START + 2 * DAY + 12 * HOUR, "gc", 2 * GB, 6))
    whole = usage_of(repository, START, START + 4 * DAY)
    assert whole.gb_hours == pytest.approx(24 + 12 * 3 + 36 * 2)
    assert (whole.read, whole.written, whole.backups) == (17, 4, 2)
    assert (whole.logical, whole.stored, whole.estimated) == (6, 2 * GB, False)
    half = usage_of(repository, START + 1.5 * DAY, START + 2 * DAY)
    assert half.gb_hours == pytest.approx(12)
    assert (half.read, half.backups) == (0, 0)
    parts = [usage_of(repository, START + d * DAY, START + (d + 1) * DAY) for d in range(4)]
    assert sum(part.gb_hours for part in parts) == pytest.approx(whole.gb_hours)
    assert sum(part.read for part in parts) == whole.read
    assert usage_of(repository, START - DAY, START).gb_hours == 0


def test_revisions_that_are_gone_are_billed(repository: Repository) -> None:
    for day in (1, 2, 3):
        revise(repository, day, noted=True)
    before = usage_of(repository, START, START + 5 * DAY)
    assert before.backups == 3
    assert before.read == 3000
    repository.remove([record.id for record in repository.revisions()[:2]])
    repository.gc()
    after = usage_of(repository, START, START + 5 * DAY)
    assert after.gb_hours == before.gb_hours
    assert after.read == 3000
    assert not after.estimated


def test_without_a_meter_revisions_stand_in(repository: Repository) -> None:
    for day in (1, 2):
        revise(repository, day, noted=False)
    revise(repository, 3, noted=True)
    stored = [record.stats.stored for record in repository.revisions()]
    usage = usage_of(repository, START, START + 3 * DAY)
    assert usage.estimated
    assert usage.byte_seconds == pytest.approx((2 * stored[0] + stored[1]) * 86400)
    assert (usage.backups, usage.read) == (2, 2000)
    later = usage_of(repository, START, START + 4 * DAY)
    assert (later.backups, later.read) == (3, 3000)
    assert not usage_of(repository, START + 3.5 * DAY, START + 4 * DAY).estimated


def test_tenants(tmp_path: Path) -> None:
    found = []
    for name, tenant in (("a", "x"), ("b", "y"), ("c", "x")):
        repository = Repository.create(tmp_path / name, "packs")
        revise(repository, 1, noted=True)
        found.append(usage_of(repository, START, START + 3 * DAY, tenant=tenant, exclusive=True))
    sums = by_tenant(found)
    assert [(total.tenant, total.logical) for total in sums] == [("x", 2 << 20), ("y", 1 << 20)]
    assert sums[0].byte_seconds == found[0].byte_seconds + found[2].byte_seconds
    assert (sums[0].exclusive or 0) >= 2 << 20
