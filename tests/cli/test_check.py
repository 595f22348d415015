"""`backyfs check` as a monitoring plug-in: one line, performance data, exit codes, metrics."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from backyfs.store.repository import Repository
from tests.cli.conftest import Vm
from tests.cli.program import PROGRAM, Done, backyfs, environment
from tests.parts import require

# 'label'=value[UOM];[warn];[crit];[min];[max], as the guidelines for plug-ins have it
PERFORMANCE = re.compile(
    r"(?:'[^'=]+'|[^\s'=]+)=-?[0-9.]+(?:s|ms|us|%|[KMGT]?B|c)?"
    r"(?:;[0-9.:~@-]*){0,2}(?:;-?[0-9.]*){0,2}"
)


def held_to_the_guidelines(done: Done) -> str:
    """The text of the first line, of which everything else is checked."""
    first, *more = done.out.splitlines()
    text, _, performance = first.partition(" | ")
    status = text.partition(":")[0]
    assert {"OK": 0, "WARNING": 1, "CRITICAL": 2, "UNKNOWN": 3}[status] == done.code
    labels = []
    for item in performance.split():
        assert PERFORMANCE.fullmatch(item), item
        labels.append(item.partition("=")[0][:19])
    assert len(set(labels)) == len(labels)
    assert not any("|" in line for line in more)
    assert len(done.out) < 8192
    return text


@pytest.fixture
def config(vm: Vm, tmp_path: Path) -> Path:
    path = tmp_path / "backy.conf"
    path.write_text(
        f"global: {{base-dir: {vm.directory.parent}}}\n"
        "jobs:\n"
        f"  web01: {{tenant: acme, source: {{type: file, filename: {vm.image}}}}}\n"
    )
    return path


def check(config: Path, *more: str | Path, code: int | None = 0) -> Done:
    return backyfs("-c", config, "check", "--ignore", "disk", *more, code=code)


def test_all_is_well(config: Path) -> None:
    done = check(config)
    text = held_to_the_guidelines(done)
    assert text.startswith("OK: 1 job within SLA, newest ")
    assert done.out.count("\n") == 1
    assert done.err == ""
    assert check(config, "-c", config).code == 0, "also where Backy has its -c"


def test_late(config: Path, tmp_path: Path) -> None:
    with open(config, "a") as stream:
        for number in range(30):
            stream.write(f"  vm{number:02}: {{source: {{type: file, filename: /x}}}}\n")
    os.utime(config, times=(1_600_000_000,) * 2)
    done = check(config, code=2)
    text = held_to_the_guidelines(done)
    assert text.startswith("CRITICAL: 30 of 31 jobs not within SLA")
    assert "late=30;0;0;0" in done.out
    assert "CRITICAL vm00: has never had a good backup" in done.out
    assert done.out.splitlines()[-1] == "and 10 more: backyfs check --json has all"
    value = check(config, "--json", code=2).json
    assert len(value["findings"]) == 30
    assert [job["sla"] for job in value["jobs"]].count("TOO OLD") == 30
    assert value["jobs"][0]["tenant"] == "acme"


def test_a_warning(config: Path, vm: Vm) -> None:
    backyfs("-b", vm.directory, "distrust", "-r", "first", "--why", "no | pipe")
    done = check(config, code=1)
    assert "distrusted" in held_to_the_guidelines(done)
    assert check(config, "--ignore", "distrusted").code == 0


@pytest.mark.parametrize("reads", ["scrub", "verify"])
def test_what_was_found_by_reading_is_told(config: Path, vm: Vm, reads: str) -> None:
    """Of a damaged map no quarantine knows, and the check opens none."""
    (path,) = (vm.directory / "revisions").glob(f"{vm.ids[0]}.*.map")
    whole = path.read_bytes()
    path.chmod(0o640)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    backyfs("-b", vm.directory, reads, code=12)
    assert "1 revision is damaged" in check(config, code=1).out
    path.write_bytes(whole)
    backyfs("-b", vm.directory, reads)
    assert check(config).out.startswith("OK")


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "--nonsense"],
        ["check", "--ignore", "nonsense"],
        ["check", "--data"],
        ["--nonsense", "check"],
        ["-c", "/nonexistent.conf", "check"],
    ],
)
def test_its_own_failures_are_unknown(arguments: list[str], tmp_path: Path) -> None:
    done = backyfs("-b", tmp_path, *arguments, code=3)
    assert held_to_the_guidelines(done).startswith("UNKNOWN: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is missing"),
        ("", "empty"),
        ("jobs: [", "backy.conf:"),
        ("jobs: \udcff", "backy.conf"),
        ("jbos: {}\nglobl: {}\n", "problems"),
    ],
)
def test_its_own_failures_as_json(config: Path, text: str | None, said: str) -> None:
    good = check(config, "--json").json
    config.unlink()
    if text is not None:
        config.write_bytes(text.encode("utf-8", "surrogateescape"))
    done = backyfs("-c", config, "-b", "/nope", "check", "--json", code=3)
    value = done.json
    assert done.err == ""
    assert value.keys() == {*good, "message", "hint"}
    assert (value["message_type"], value["status"], value["code"]) == ("check", "UNKNOWN", 3)
    assert [value[key] for key in ("findings", "jobs", "unmanaged", "disk")] == [[], [], [], None]
    assert said in value["message"]


@pytest.mark.parametrize("command", ["check --json --what", "--what check --json"])
def test_wrong_options_as_json(command: str) -> None:
    value = backyfs(*command.split(), code=3).json
    assert (value["status"], value["code"]) == ("UNKNOWN", 3)
    assert "--what" in value["message"]


@pytest.mark.parametrize("where", [">&-", ">/dev/full"])
@pytest.mark.parametrize(
    "command",
    ["check", "check --json", "check --help", "check --what", "--what check", "-c none check"],
)
def test_without_a_stdout_it_is_unknown(config: Path, where: str, command: str) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f"{PROGRAM} -c {config} {command} {where}"],
        capture_output=True,
        text=True,
        cwd=config.parent,
        env=environment(),
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("\n") == 1
    assert "cannot write to standard output: " in done.stderr


def test_a_reader_that_goes_away_is_no_answer(config: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [PROGRAM, "-c", config, "check"], stdout=write_end, stderr=subprocess.PIPE, check=False
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_broken_configuration_is_unknown(config: Path) -> None:
    config.write_text(config.read_text() + "jbos: {}\n")
    done = check(config, code=3)
    assert "did you mean 'jobs'" in held_to_the_guidelines(done)


def test_a_crash_is_unknown(config: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import backyfs.engine.check as c\ndef broken(*a, **k): raise RuntimeError('odd')\n"
        "c.check = broken\n"
    )
    done = subprocess.run(
        [PROGRAM, "-c", config, "check"],
        env=environment(PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stdout.startswith("UNKNOWN: a bug: RuntimeError: odd")
    assert "Traceback" in done.stderr


def test_without_a_configuration_of_all(vm: Vm) -> None:
    for directory in (vm.directory, vm.directory.parent):
        done = backyfs("-b", directory, "check", "--ignore", "disk")
        assert done.out.startswith("OK: 1 job within SLA")


def test_a_configuration_that_was_named_is_not_replaced(vm: Vm, tmp_path: Path) -> None:
    done = backyfs("-c", tmp_path / "typo.conf", "-b", vm.directory.parent, "check", code=3)
    assert held_to_the_guidelines(done).startswith("UNKNOWN: ")
    assert "typo.conf is missing" in done.out


def test_a_broken_config_of_one_vm_hides_no_other(vm: Vm) -> None:
    base = vm.directory.parent
    shutil.copytree(vm.directory, base / "web02")
    (base / "web02" / "config").write_text("source: [")
    arguments = ("-b", base, "check")
    found = backyfs(*arguments, "--json", code=3).json
    assert [job["job"] for job in found["jobs"]] == ["web01", "web02"]
    assert [(f["status"], f["kind"], f["job"]) for f in found["findings"]] == [
        ("UNKNOWN", "repository", "web02")
    ]
    text = backyfs(*arguments, code=3).out
    assert text.startswith("UNKNOWN: 1 of 2 jobs within SLA, newest ")
    assert "web02: no schedule known: " in text
    (vm.directory / "repository.json").write_text("{")
    found = backyfs(*arguments, "--json", code=2).json
    assert [job["sla"] for job in found["jobs"]] == ["UNKNOWN", "UNKNOWN"]
    text = backyfs(*arguments, code=2).out
    assert text.startswith("CRITICAL: 0 of 2 jobs within SLA")


def test_no_data_is_opened_and_nothing_locked(tmp_path: Path, vm: Vm) -> None:
    """So it takes little time however much is stored, and is in nobody's way."""
    strace = require("strace", "sees which files are opened")
    trace = tmp_path / "trace"
    command = [strace, "-f", "-qq", "-e", "trace=openat,flock", "-o", trace, PROGRAM]
    command += ["-b", vm.directory, "check"]
    subprocess.run(list(map(str, command)), check=False, capture_output=True, env=environment())
    lines = trace.read_text()
    assert ".json" in lines
    assert ".map" not in lines
    assert ".pack" not in lines
    assert "flock(" not in lines


def test_metrics(config: Path, vm: Vm, tmp_path: Path) -> None:
    promtool = require("promtool", "checks the metrics")
    Repository.create(vm.directory.parent / "old")
    path = tmp_path / "backyfs.prom"
    check(config, "--metrics", path, code=1)
    text = path.read_text()
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text, text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert 'backyfs_job_sla_seconds{job="web01",tenant="acme"} 129600.0' in text
    assert 'backyfs_job_revisions{job="web01",tenant="acme",trust="trusted"} 3.0' in text
    assert "backyfs_unmanaged_directories 1.0" in text
    assert re.search(r'backyfs_backup_read_bytes_total\{job="web01",tenant="acme"\} [1-9]', text)
    assert re.search(r'backyfs_job_stored_bytes\{job="web01",tenant="acme"\} [1-9]', text)
    assert all("2026" not in label for label in re.findall(r"\{(.*?)\}", text))


def test_metrics_that_cannot_be_written(config: Path, tmp_path: Path) -> None:
    done = check(config, "--metrics", tmp_path / "missing" / "x.prom", code=3)
    assert held_to_the_guidelines(done).startswith("UNKNOWN: cannot write metrics")


def test_metrics_want_a_name(config: Path) -> None:
    """An empty one is a variable that was not set."""
    done = check(config, "--metrics", "", code=3)
    assert held_to_the_guidelines(done).endswith("'--metrics': it is empty")


def test_metrics_take_nobodys_device(config: Path, tmp_path: Path) -> None:
    """Where they replaced /dev/null, or /dev/stdout, everybody would find a file there."""
    path = tmp_path / "x.prom"
    os.mkfifo(path)
    done = check(config, "--metrics", path, code=3)
    assert "no regular file" in held_to_the_guidelines(done)
    assert path.is_fifo()
    assert os.listdir(tmp_path).count("x.prom") == 1


def test_metrics_that_cannot_be_written_hide_no_finding(
    config: Path, vm: Vm, tmp_path: Path
) -> None:
    backyfs("-b", vm.directory, "distrust", "-r", "first", "--why", "a test")
    done = check(config, "--metrics", tmp_path / "missing" / "x.prom", code=1)
    assert held_to_the_guidelines(done).startswith("WARNING: ")
    assert "cannot write metrics" in done.err


def test_what_the_scheduler_says_goes_into_the_details(
    config: Path, vm: Vm, tmp_path: Path
) -> None:
    rows = [
        {"job": "web01", "next_time": "2026-11-22T01:00:00Z", "last_code": 13, "failures": 2},
        {"job": "new", "first_seen": "2020-01-01T00:00:00Z", "last_reason": "no | source"},
    ]
    (vm.directory.parent / "status").write_text(json.dumps(rows))
    with open(config, "a") as stream:
        stream.write("  new: {source: {type: file, filename: /x}}\n")
    path = tmp_path / "x.prom"
    done = check(config, "--metrics", path, code=2)
    held_to_the_guidelines(done)
    assert "the last attempt failed: no / source" in done.out
    assert (
        'backyfs_job_last_result{class="source",job="web01",tenant="acme"} 1.0' in path.read_text()
    )
    assert 'backyfs_job_failures{job="web01",tenant="acme"} 2.0' in path.read_text()
    assert "next_run_timestamp_seconds{job" in path.read_text()
    listed = backyfs("-c", config, "jobs", "--json").json_lines
    assert [row["status"] for row in listed] == ["not scheduled"] * 2, "which no row says"
    (vm.directory.parent / "status").write_text("[{")
    assert "never had a good backup" not in check(config, code=0).out, "known since just now"
