"""The meter: readings over months, counters that go on, lines cut off, processes at once."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backyfs.store.meter import DIRECTORY, Meter, Reading
from tests.reader.stores import add_revision, make_vm

START = datetime(2026, 10, 30, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def reading(day: float, stored: int, read: int = 0) -> Reading:
    return Reading(START + day * DAY, "backup", stored, 1000, read, 0, f"r{day}")


@pytest.fixture
def meter(tmp_path: Path) -> Meter:
    found = Meter(tmp_path)
    for day in range(60):
        found.note(reading(day, 100 + day, read=10))
    return found


def test_months_and_counters(meter: Meter, tmp_path: Path) -> None:
    names = sorted(path.name for path in (tmp_path / DIRECTORY).iterdir())
    assert names == ["2026-10.jsonl", "2026-11.jsonl", "2026-12.jsonl"]
    last = meter.last()
    assert last is not None
    assert (last.stored, last.read) == (159, 600)


def test_a_window_begins_with_what_was_there(meter: Meter) -> None:
    found = meter.readings(START + 5.5 * DAY, START + 8 * DAY)
    assert [r.stored for r in found] == [105, 106, 107]
    assert [r.stored for r in meter.readings(START - DAY, START + DAY)] == [100]
    assert meter.readings(START - 2 * DAY, START - DAY) == []
    after = meter.readings(START + 400 * DAY, START + 401 * DAY)
    assert [r.stored for r in after] == [159]


def test_a_line_cut_off_costs_that_line(meter: Meter, tmp_path: Path) -> None:
    path = tmp_path / DIRECTORY / "2026-12.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    meter.note(reading(60, 7, read=10))
    last = meter.last()
    assert last is not None
    assert (last.stored, last.read) == (7, 600), "the reading that was lost is not counted"
    found = meter.readings(START + 55 * DAY, START + 61 * DAY)
    assert [r.stored for r in found] == [154, 155, 156, 157, 158, 7]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"time": "0001-01-01T00:00:00+14:00"}'])
def test_a_line_that_makes_no_sense_costs_that_line(
    meter: Meter, tmp_path: Path, line: str
) -> None:
    before = meter.last()
    with open(max((tmp_path / DIRECTORY).iterdir()), "a") as stream:
        stream.write(line + "\n")
    assert meter.last() == before


def test_lines_stay_in_the_order_of_writing_when_the_clock_is_set_back(tmp_path: Path) -> None:
    meter = Meter(tmp_path)
    for number, day in enumerate((0, 40, 5, 6)):
        meter.note(reading(day, number, read=10))
    names = sorted(path.name for path in (tmp_path / DIRECTORY).iterdir())
    assert names == ["2026-10.jsonl", "2026-12.jsonl"]
    last = meter.last()
    assert last is not None
    assert (last.stored, last.read) == (3, 40)
    assert [r.stored for r in meter.readings(START + 4 * DAY, START + 30 * DAY)] == [0, 2, 3]


def test_a_reading_has_what_its_own_event_moved(meter: Meter) -> None:
    found = meter.readings(START - DAY, START + 3 * DAY)
    assert [r.read for r in found] == [10, 10, 10]
    assert [r.read for r in meter.readings(START + 30 * DAY, START + 31.5 * DAY)] == [10, 10, 10]


def test_no_change_is_no_line(tmp_path: Path) -> None:
    meter = Meter(tmp_path)
    for day in range(5):
        meter.note(Reading(START + day * DAY, "gc", 5, 5))
    assert len((tmp_path / DIRECTORY / "2026-10.jsonl").read_text().splitlines()) == 1


def test_it_never_stops_anything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / DIRECTORY).write_text("no directory")
    meter = Meter(tmp_path)
    meter.note(reading(0, 1))
    assert "usage is not noted" in caplog.text
    assert meter.last() is None


def test_many_processes(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, datetime as d; from backyfs.store.meter import Meter, Reading\n"
        "m = Meter(pathlib.Path(sys.argv[1])); t = d.datetime(2026, 11, 1, tzinfo=d.UTC)\n"
        "for n in range(50): m.note(Reading(t, 'backup', n, 1, 1, 2, f'{sys.argv[2]}-{n}'))\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)]) for n in range(3)
    ]
    assert [process.wait() for process in running] == [0, 0, 0]
    last = Meter(tmp_path).last()
    assert last is not None
    assert (last.read, last.written) == (150, 300)


def test_a_repository_reads_its_meter(tmp_path: Path) -> None:
    repository = make_vm(tmp_path, "web01", b"1" * 70_000)
    repository.note_usage("backup", repository.revisions()[-1])
    record = add_revision(repository, b"2" * 70_000)
    repository.note_usage("backup", record)
    repository.remove([repository.revisions()[0].id])
    repository.gc()
    found = repository.meter.readings(datetime.now(UTC), datetime.now(UTC) + DAY)
    assert found[-1].stored == repository.occupied() > 0
    assert found[-1].logical == 70_000
