"""backyfs jobs, simulate and status --yaml: what people and scripts read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from backyfs.store.repository import Repository
from tests.cli.conftest import Vm
from tests.cli.program import backyfs, refused


def configured(vm: Vm) -> Path:
    """A configuration with the VM, and one that has no repository yet."""
    path = vm.directory.parent.parent / "backy.conf"
    path.write_text(
        f"global: {{base-dir: {vm.directory.parent}}}\n"
        "schedules: {rare: {yearly: {interval: 365d, keep: 2}}}\n"
        f"jobs:\n  web01: {{source: {{type: file, filename: {vm.image}}}, tenant: acme}}\n"
        f"  web02: {{source: {{type: file, filename: {vm.image}}}, schedule: rare}}\n"
    )
    return path


def test_jobs_without_a_scheduler(vm: Vm) -> None:
    config = configured(vm)
    table = backyfs("jobs", "-c", config).out.splitlines()
    assert re.match(r"\| Job +\| SLA +\| SLA overdue \| Status +\| Last Backup \(UTC\) ", table[0])
    assert re.match(r"\| web01 \| OK  \| - +\| not scheduled \| 20.* \| daily ", table[1])
    assert re.match(r"\| web02 \| OK  \| - +\| not scheduled \| - ", table[2])
    assert table[3] == "2 jobs shown"
    rows = backyfs("-c", config, "jobs", "web01", "--json").json
    assert (rows["job"], rows["revisions"], rows["tenant"]) == ("web01", 3, "acme")
    assert rows["manual_tags"] == "manual:before upgrade"
    assert rows["last_tags"] == "daily"
    assert rows["next_tags"].startswith("daily")


def test_a_memory_that_cannot_be_read_is_a_warning(vm: Vm) -> None:
    config = configured(vm)
    (vm.directory.parent / ".scheduler.json").write_text("{")
    text = "memory of the last scheduler is lost reason="
    assert backyfs("jobs", "-c", config).err.startswith(f"backyfs: warning: {text}")
    warning = json.loads(backyfs("jobs", "-c", config, "--json").err)
    assert warning["message_type"] == "warning"
    assert warning["message"].startswith(text)


def test_a_repository_that_cannot_be_read_is_told(vm: Vm) -> None:
    config = configured(vm)
    (vm.directory / "repository.json").write_text("{")
    row = backyfs("-c", config, "jobs", "web01", "--json").json
    assert row["status"] == "unreadable"
    assert "repository.json" in row["last_reason"]


def test_simulate(vm: Vm) -> None:
    shown = backyfs("simulate").out
    assert shown.startswith("daily: daily every 1d, keep 10, weekly every 1w, keep 5, monthly ")
    assert re.search(r"^365 +\d+ +0 +1[0-9] +10 +5 +4 +1[0-2]\d\.\d d$", shown, re.MULTILINE)
    assert "Day 365: " in shown
    assert "is missing" in refused("-c", "/nonexistent", "simulate", "daily", code=2)
    config = configured(vm)
    assert "yearly every 365d, keep 2" in backyfs("-c", config, "simulate", "web02").out
    assert "yearly" in backyfs("simulate", "-c", config, "--days", "30", "rare").out
    assert "no schedule or job 'nope'" in refused("-c", config, "simulate", "nope", code=2)


def test_simulate_with_missed_runs_never_keeps_less() -> None:
    plain = backyfs("simulate", "--days", "200", "--json").json_lines
    missing = backyfs("simulate", "--days", "200", "--miss", "40", "--json").json_lines
    assert len(plain) == 200
    assert sum(day["missed"] for day in missing) > 20
    for day in missing[100:]:
        assert sum("daily" in r["tags"] for r in day["kept"]) >= 10
    assert missing[-1]["kept"][0]["age_days"] >= plain[-1]["kept"][0]["age_days"] - 31


def test_status_as_backy_has_it(vm: Vm) -> None:
    values = yaml.safe_load(backyfs("-b", vm.directory, "status", "--yaml").out)
    assert [value["uuid"] for value in values] == vm.ids
    assert sorted(values[0]) == [
        "backend_type", "parent", "stats", "tags", "timestamp", "trust", "uuid",
    ]  # fmt: skip
    assert values[0]["tags"] == ["daily", "weekly"]
    assert values[0]["timestamp"].tzinfo is not None
    assert values[1]["parent"] == values[0]["uuid"]


def test_a_rate_limit(vm: Vm) -> None:
    config = vm.directory / "config"
    config.write_text(config.read_text() + "rate-limit: 100M\n")
    backyfs("-b", vm.directory, "backup", "daily")
    backyfs("-b", vm.directory, "backup", "--rate-limit", "1G", "daily")
    said = refused("-b", vm.directory, "backup", "--rate-limit", "fast", "daily", code=2)
    assert "'fast' is no number of bytes" in said


def test_a_secret_stays_in_the_configuration_of_all_jobs(vm: Vm, tmp_path: Path) -> None:
    """No built-in source has one yet: the source refuses a key it does not know, once it has it."""
    config = vm.directory / "config"
    config.write_text(config.read_text() + "secrets: [token]\n")
    site = tmp_path / "backy.conf"
    site.write_text("jobs: {other: {source: {type: file, filename: /x}}}\n")
    said = backyfs("-c", site, "-b", vm.directory, "backup", "daily", code=2).err
    assert "the job 'web01' has no 'token'" in said
    site.write_text(
        f"jobs: {{web01: {{source: {{type: file, filename: {vm.image}, token: x}}}}}}\n"
    )
    said = backyfs("-c", site, "-b", vm.directory, "backup", "daily", code=2).err
    assert "unknown key 'token'" in said


def test_a_dry_run_counts_what_expiring_revisions_keep_yet(vm: Vm) -> None:
    assert backyfs("-b", vm.directory, "purge", "--dry-run").out.splitlines()[-1].endswith(" left")
    repository = Repository.open(vm.directory)
    doomed = repository.revisions()[0]
    backyfs("-b", vm.directory, "tags", "set", "-r", doomed.id, "--force", "no-such-tag")
    last = backyfs("-b", vm.directory, "purge", "--dry-run").out.splitlines()[-1]
    assert last.endswith(" left, with the revisions to be removed")


def test_a_dry_run_says_of_each_revision_why(vm: Vm) -> None:
    lines = backyfs("-b", vm.directory, "purge", "--dry-run").out.splitlines()
    assert lines[0] == (
        f"keep {vm.ids[0]}: daily: one of the newest 10; weekly: one of the newest 5"
    )
    assert lines[1] == f"keep {vm.ids[1]}: manual:before upgrade never expires"
    assert lines[2].endswith("daily: one of the newest 10; kept as the newest good revision")
