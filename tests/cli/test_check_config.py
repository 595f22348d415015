"""backyfs check-config: every problem with its place, as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.program import backyfs

GOOD = "jobs: {web01: {source: {type: file, filename: /a}}}\n"
BAD = "jobs: {web01: {source: {type: fiel}}}\nglbal: {}\n"


def test_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "backy.conf"
    path.write_text(GOOD)
    done = backyfs("check-config", "-c", path)
    assert done.out == f"{path}: 1 job, base directory /srv/backy: no problems\n"
    assert backyfs("-c", path, "check-config").out == done.out
    value = backyfs("check-config", "--json", "-c", path).json
    assert (value["message_type"], value["jobs"], value["file"]) == ("summary", 1, str(path))


def test_a_section_without_meaning_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "backy.conf"
    path.write_text(GOOD + "peers: {}\n")
    assert f"warning: {path}:2:8: 'peers' is not used" in backyfs("-c", path, "check-config").err


def test_a_bad_file(tmp_path: Path) -> None:
    path = tmp_path / "backy.conf"
    path.write_text(BAD)
    done = backyfs("-c", path, "check-config", code=2)
    assert [line.strip().split(": ")[0] for line in done.err.splitlines()] == [
        "backyfs", "1:24", "2:1",
    ]  # fmt: skip
    done = backyfs("-c", path, "check-config", "--json", code=2)
    assert [(v["message_type"], v["line"], v["column"]) for v in done.json_lines] == [
        ("problem", 1, 24),
        ("problem", 2, 1),
    ]
    assert json.loads(done.err)["code"] == 2


def test_a_missing_file(tmp_path: Path) -> None:
    assert "is missing" in backyfs("-c", tmp_path / "no", "check-config", code=2).err


def test_the_schema(tmp_path: Path) -> None:
    schema = json.loads(backyfs("check-config", "--schema").out)
    assert "jobs" in schema["properties"]
