"""`backyfs usage`: tables, JSON and CSV of what is stored and moved."""

from __future__ import annotations

import csv
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.cli.conftest import SIZE, Vm
from tests.cli.program import backyfs, refused


@pytest.fixture
def base(vm: Vm) -> Path:
    shutil.copytree(vm.directory, vm.directory.parent / "db01")
    return vm.directory.parent


def test_one_vm(vm: Vm) -> None:
    done = backyfs("-b", vm.directory, "usage", "--json").json
    assert done["logical"] == SIZE
    assert done["read"] > 0
    assert done["backups"] == 3
    assert done["gb_hours"] >= 0
    assert not done["estimated"]
    du = sum(
        path.stat().st_blocks * 512
        for path in [*vm.directory.glob("packs/*"), *vm.directory.glob("revisions/*.map")]
    )
    assert done["stored"] == du


def test_exclusive_by_revision(vm: Vm) -> None:
    lines = backyfs("-b", vm.directory, "usage", "--exclusive", "--json").json_lines
    revisions = [line for line in lines if line["kind"] == "revision"]
    assert [line["id"] for line in revisions] == vm.ids
    (total,) = (line for line in lines if line["kind"] == "vm")
    assert total["exclusive"] == sum(line["exclusive"] for line in revisions) > 0
    table = backyfs("-b", vm.directory, "usage", "--exclusive").out
    assert all(revision in table for revision in vm.ids)


def test_tenants_of_a_base_directory(base: Path, tmp_path: Path) -> None:
    config = tmp_path / "backy.conf"
    config.write_text(
        f"global: {{base-dir: {base}}}\n"
        "jobs:\n"
        "  web01: {tenant: acme, source: {type: file, filename: /x}}\n"
        "  db01: {tenant: acme, source: {type: file, filename: /x}}\n"
    )
    lines = backyfs("-c", config, "-b", base, "usage", "--json").json_lines
    assert [(line["kind"], line["vm"], line["tenant"]) for line in lines] == [
        ("vm", "db01", "acme"),
        ("vm", "web01", "acme"),
        ("tenant", None, "acme"),
    ]
    assert lines[2]["stored"] == lines[0]["stored"] + lines[1]["stored"]
    nowhere = tmp_path / "empty"
    nowhere.mkdir()
    found = backyfs("-c", config, "-b", nowhere, "usage", "--csv").out
    rows = list(csv.DictReader(found.splitlines()))
    assert [row["vm"] for row in rows] == ["db01", "web01", ""]
    assert rows[2]["logical"] == str(2 * SIZE)
    table = backyfs("-c", config, "-b", base, "usage").out
    assert "(all)  acme" in table


def test_a_configuration_that_was_named_is_there(base: Path, tmp_path: Path) -> None:
    """Without it every VM would be nobody's."""
    missing = tmp_path / "missing.conf"
    assert refused("-b", base, "usage", "-c", missing, code=2) == f"{missing} is missing"


def test_a_span(vm: Vm) -> None:
    past = backyfs("-b", vm.directory, "usage", "--until", "2020-01-01", "--since=2019-01-01")
    assert "0 bytes" in past.out
    yesterday = (datetime.now(UTC) - timedelta(days=1)).isoformat(timespec="minutes")
    value = backyfs("-b", vm.directory, "usage", "--since", yesterday, "--json").json
    assert value["backups"] == 3
    assert "no date" in refused("-b", vm.directory, "usage", "--since", "soon", code=2)
    assert "ends" in refused(
        "-b", vm.directory, "usage", "--since", "2026-02-01", "--until", "2026-01-01", code=2
    )
    for until in ([], ["--until", "2999-02-01"]):
        said = refused("-b", vm.directory, "usage", "--since", "2999-01-01", *until, code=2)
        assert said == "the span begins in the future (2999-01-01T00:00:00.000000Z)"
    assert "exclude" in backyfs("-b", vm.directory, "usage", "--csv", "--json", code=2).err


def test_a_span_by_name(vm: Vm) -> None:
    first = datetime.now().astimezone().replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    before = (first - timedelta(days=1)).replace(day=1, tzinfo=None).astimezone()
    for options, since, until in (
        ((), first, None),
        (("--since", "this-month"), first, None),
        (("--since", "last-month", "--until", "this-month"), before, first),
        (("--since", f"{before:%Y-%m}", "--until", f"{first:%Y-%m}"), before, first),
        (("--since", f"{before:%Y%m%d}"), before, None),
    ):
        value = backyfs("-b", vm.directory, "usage", *options, "--json").json
        assert datetime.fromisoformat(value["since"]) == since
        assert until is None or datetime.fromisoformat(value["until"]) == until


def test_a_vm_that_cannot_be_read_hides_no_other(base: Path) -> None:
    identity = base / "db01" / "repository.json"
    identity.chmod(0o600)
    identity.write_text("{}")
    done = backyfs("-b", base, "usage", "--csv", code=1)
    assert "warning: db01:" in done.err
    assert "web01" in done.out
