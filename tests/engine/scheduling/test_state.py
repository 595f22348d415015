"""The scheduler's own files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backyfs.config.job import Job as JobFile
from backyfs.config.schedule import DAILY
from backyfs.config.site import SiteJob
from backyfs.engine.scheduling import state
from backyfs.engine.scheduling.jobs import Job
from backyfs.engine.scheduling.memory import Memory
from backyfs.engine.scheduling.processes import SystemClocks


def test_a_status_file_among_others_does_not_lead_elsewhere(tmp_path: Path) -> None:
    """In a directory of all, anybody may put a link where the unfinished file will be."""
    outside = tmp_path / "outside"
    outside.write_text("theirs\n")
    (tmp_path / f".status.{os.getpid()}.tmp").symlink_to(outside)
    with pytest.raises(OSError, match="symbolic links"):
        state.write_status(tmp_path / "status", [])
    assert outside.read_text() == "theirs\n"
    state.write_status(tmp_path / "status", [])
    assert (tmp_path / "status").read_text() == "[]\n"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "1", "[" * 100_000, '[{"job": []}, "x"]'],
)
def test_a_status_of_anything(tmp_path: Path, text: str) -> None:
    (tmp_path / "status").write_text(text)
    assert state.read_status(tmp_path / "status") == (0.0, {})


def test_a_status_that_would_have_us_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "status")
    assert state.read_status(tmp_path / "status") == (0.0, {})


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"jobs": ' + "[" * 100_000, '{"jobs": {"a": 1}}', "1" * 5000]
)
def test_a_memory_of_anything(tmp_path: Path, text: str) -> None:
    (tmp_path / ".scheduler.json").write_text(text)
    assert state.read_memories(tmp_path) == {}


@pytest.mark.parametrize("time", ["NaN", "1e12", "-1", "Infinity", "9" * 400, "true", '"now"'])
def test_what_is_no_time_is_not_remembered(tmp_path: Path, time: str) -> None:
    """A scheduler and `jobs` ended with a traceback each time they read it."""
    (tmp_path / ".scheduler.json").write_text(
        f'{{"jobs": {{"a": {{"first_seen": {time}, "retry_at": {time}, "attempted": {time},'
        f' "verified": {time}, "failures": 3}}}}}}'
    )
    memory = state.read_memories(tmp_path)["a"]
    assert memory == Memory(failures=3)
    job = Job(SiteJob("a", JobFile("x", {}, DAILY)), memory, SystemClocks(), retry_longest_s=60)
    assert state.row(job)["failures"] == 3
