"""Usage: exact where the meter was read, an estimate before, sums by tenant."""

from __future__ import annotations

import json
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


def test_what_was_moved_outlives_a_wrong_clock(repository: Repository) -> None:
    """Ahead by ten days, into the next month, then right; then behind by years, then right."""
    note = repository.meter.note
    for number, day in enumerate((20, 36, 26, 27, -2000, 28)):
        note(Reading(START + day * DAY, "backup", GB, 5, read=10 + number, revision=str(number)))
    november = usage_of(repository, START, START + 29 * DAY)
    assert (november.read, november.backups) == (10 + 12 + 13 + 15, 4)
    december = usage_of(repository, START + 30 * DAY, START + 61 * DAY)
    assert (december.read, december.backups) == (11, 1)
    long_ago = usage_of(repository, START - 2001 * DAY, START - 1999 * DAY)
    assert (long_ago.read, long_ago.backups) == (14, 1)
    assert usage_of(repository, START - 3000 * DAY, START + 61 * DAY).read == sum(range(10, 16))


def test_counters_that_went_back_bill_nothing_below_zero(repository: Repository) -> None:
    """As versions that kept each month's readings in its own file have written them."""
    directory = repository.path / "usage"
    directory.mkdir(exist_ok=True)
    for month, day, read in (("12", "06", 300), ("11", "20", 200), ("11", "26", 350)):
        with open(directory / f"2026-{month}.jsonl", "a") as stream:
            time = f"2026-{month}-{day}T00:00:00Z"
            line = {"time": time, "event": "gc", "stored": 1, "logical": 1, "read": read}
            stream.write(json.dumps(line | {"written": 0}) + "\n")
    usages = [usage_of(repository, START + d * DAY, START + (d + 1) * DAY) for d in range(40)]
    assert [usage.read for usage in usages if usage.read] == [200, 150]


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
