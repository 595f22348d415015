"""The configuration of all jobs: Backy's files as they are, every problem with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backyfs.config import DAILY, HOURLY, Rule
from backyfs.config.editor import json_schema
from backyfs.config.site import GLOBAL, JOB_KEYS, MAINTENANCE, SECTIONS, Site, read_site
from backyfs.errors import BackyfsError, ConfigError
from backyfs.source import registry

BACKY = """\
global:
    base-dir: /my/backy
    worker-limit: 3
    status-interval: 5
    telnet-port: 1234
    telnet-addrs: ::1, 127.0.0.1
    backup-completed-callback: /usr/local/bin/tell
schedules:
    default:
        daily: {interval: 1d, keep: 9}
        weekly:
            interval: 7d
            keep: 5
    fast:
        minutely: {interval: 90, keep: 3}
jobs:
    test01:
        source:
            type: file
            filename: /images/test01.img
        schedule: default
    foo00:
        source: {type: file, filename: /images/foo00.img, cow: true, backend: chunked}
        schedule: fast
api: {addrs: "127.0.0.1", port: 6023, tokens: {a: b}}
peers: {other: {url: "http://x", token: y}}
"""


def site(tmp_path: Path, text: str, *, sources: bool = False) -> Site:
    (tmp_path / "backy.conf").write_text(text)
    return read_site(tmp_path / "backy.conf", check_source=registry.make if sources else None)


def complaint(tmp_path: Path, text: str) -> str:
    """What the error says, without the directory."""
    with pytest.raises(ConfigError) as caught:
        site(tmp_path, text, sources=True)
    return caught.value.message.replace(f"{tmp_path}/", "")


def test_a_file_of_backy_works_as_it_is(tmp_path: Path) -> None:
    found = site(tmp_path, BACKY, sources=True)
    settings = found.settings
    assert settings.base_dir == Path("/my/backy")
    assert (settings.worker_limit, settings.status_interval_s, settings.telnet_port) == (3, 5, 1234)
    assert settings.telnet_addrs == ("::1", "127.0.0.1")
    assert settings.backup_completed_callback == "/usr/local/bin/tell"
    assert settings.status_path == Path("/my/backy/status")
    assert found.jobs["test01"].schedule == {
        "daily": Rule(86_400, 9),
        "weekly": Rule(604_800, 5),
    }
    assert found.jobs["foo00"].schedule == {"minutely": Rule(90, 3)}
    assert found.jobs["foo00"].job.settings == {"filename": "/images/foo00.img", "cow": True}
    assert found.directory("foo00") == Path("/my/backy/foo00")
    assert [w.text for w in found.warnings] == [
        "'api' is not used here",
        "'peers' is not used here",
    ]


def test_the_least_that_works(tmp_path: Path) -> None:
    found = site(tmp_path, "jobs:\n")
    assert found.jobs == {}
    assert found.settings.base_dir == Path("/srv/backy")
    text = (
        "jobs: {a: {source: {type: file, filename: /a}}, b: {source: {type: f}, schedule: hourly}}"
    )
    found = site(tmp_path, text)
    assert found.jobs["a"].schedule == DAILY
    assert found.jobs["b"].schedule == HOURLY
    assert found.jobs["b"].schedule_name == "hourly"


def test_what_a_job_may_say_of_itself(tmp_path: Path) -> None:
    text = """\
jobs:
  db01:
    source: {type: file, disks: {root: /dev/vg/root, data: /dev/vg/data}}
    schedule: {nightly: {interval: 1d12h, keep: 3}}
    store: cow
    tenant: ACME Ltd
    rate-limit: 50MiB
    sample-share: 2.5%
    sample-budget: 10m
"""
    job = site(tmp_path, text, sources=True).jobs["db01"]
    assert job.schedule == {"nightly": Rule(36 * 3600, 3)}
    assert (job.schedule_name, job.store, job.tenant) == ("", "cow", "ACME Ltd")
    assert job.job.rate_limit == 50 << 20
    assert (job.job.sample_percent, job.job.sample_budget_s) == (2.5, 600)
    assert job.job.settings["disks"] == {"root": "/dev/vg/root", "data": "/dev/vg/data"}


def test_a_built_in_schedule_can_be_defined_anew(tmp_path: Path) -> None:
    text = "schedules: {daily: {daily: {interval: 1d, keep: 1}}}\njobs: {a: {source: {type: f}}}\n"
    assert site(tmp_path, text + "").schedules["daily"] == {"daily": Rule(86_400, 1)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("job: {}\n", ":1:1: unknown key 'job', did you mean 'jobs'?"),
        ("global: {base-dri: /x}\n", ":1:10: unknown key 'base-dri', did you mean 'base-dir'?"),
        ("global: {base-dir: srv}\n", ":1:20: 'srv' is a relative path (write it from / on)"),
        ("global: {worker-limit: 0}\n", ":1:24: worker-limit must be a whole number from 1 on"),
        ("global: {worker-limit: no}\n", ":1:24: 'no' is true or false to YAML"),
        ("global: {status-interval: soon}\n", ":1:27: 'soon' is no interval"),
        ("global: {telnet-port: 70000}\n", ":1:23: 70000 is no port"),
        ("global: {telnet-addrs: localhost}\n", ":1:24: 'localhost' is no list of IP addresses"),
        ("maintenance: {scrub-interval: never, scrub-budget: never}\n", ":1:52: 'never' is no int"),
        ("schedules: {a: daily}\n", ":1:16: the schedule 'a' must be a mapping of tags"),
        ("schedules: {a: {}}\n", ":1:16: the schedule has no tags"),
        ("jobs: {a: {}}\n", ":1:11: the key 'source' is missing"),
        ("jobs: {a/b: {source: {type: file}}}\n", ":1:13: 'a/b' is no VM name"),
        ("jobs: {..: {source: {type: file}}}\n", ":1:12: '..' is no VM name"),
        ("jobs: {a: {source: {type: fiel}}}\n", ":1:20: unknown source type 'fiel' (did you mean"),
        ("jobs: {a: {source: {type: file, fliename: /a}}}\n", ":1:20: source file: unknown key"),
        ("jobs: {a: {source: {type: file, filename: /a}, schedule: dayly}}\n", "mean 'daily'?"),
        ("jobs: {a: {source: {type: file, filename: /a}, store: zfs}}\n", "none of: auto, packs,"),
        ("jobs: {a: {source: {type: file, filename: /a}, rate-limit: 5X}}\n", "no number of bytes"),
        ("jobs: {a: {source: {type: file, filename: /a}, sample-share: 1}}\n", ":1:62: 1 is no sh"),
        ("jobs: {a: {source: {type: file, filename: /a}, sample-budget: 0}}\n", "0 is no interval"),
        ("jobs: {a: {source: {type: file, filename: /a}, tennant: x}}\n", "mean 'tenant'?"),
        ("include: nothere.conf\n", ":1:10: "),
        ("include: {a: b}\n", ":1:10: include must be text"),
        ("jobs: {a: {source: [\n", ":2:1: this is not YAML"),
    ],
)
def test_a_problem_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    assert message in complaint(tmp_path, text)


def test_all_problems_of_all_files_come_at_once(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/1.conf").write_text("jobs: {a: {source: {type: file, filename: /a}}}\n")
    (tmp_path / "d/2.conf").write_text("jobs: {a: {source: {type: file, filename: /a}}, b: 1}\n")
    (tmp_path / "d/3.conf").write_text("jobs: [\n")
    (tmp_path / "d/4.conf").write_text("global: {}\n")
    text = "include: d/*.conf\nglobal: {x: 1}\njobs: {c: {source: {type: file}}}\n"
    with pytest.raises(ConfigError) as caught:
        site(tmp_path, text, sources=True)
    places = [
        (Path(p.file).name, p.line, p.column, p.text.split(",")[0].split(";")[0])
        for p in sorted(caught.value.problems)
    ]
    assert [place[:3] for place in places] == [
        ("backy.conf", 2, 10),
        ("backy.conf", 3, 20),
        ("2.conf", 1, 11),
        ("2.conf", 1, 52),
        ("3.conf", 2, 1),
        ("4.conf", 1, 1),
    ]
    assert places[2][3] == "the job 'a' is here a second time"
    assert f"first at {tmp_path}/d/1.conf:1:11" in str(caught.value)
    assert "d/2.conf:1:11: the job 'a'" in caught.value.message


def test_included_files_add_jobs_and_schedules_in_any_order(tmp_path: Path) -> None:
    (tmp_path / "z.conf").write_text("schedules: {s: {t: {interval: 1h, keep: 2}}}\n")
    (tmp_path / "d").mkdir()
    text = "include: [z.conf, 'd/*.conf']\njobs: {a: {source: {type: f}, schedule: s}}\n"
    assert site(tmp_path, text).jobs["a"].schedule == {"t": Rule(3600, 2)}
    (tmp_path / "d/a.conf").write_text("jobs: {b: {source: {type: f}, schedule: s}}\n")
    assert list(site(tmp_path, text).jobs) == ["a", "b"]


@given(st.text(max_size=120) | st.sampled_from(SECTIONS).map(lambda name: f"{name}: {name}"))
def test_no_text_whatever_is_more_than_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.conf"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        read_site(path, check_source=registry.make)
    except BackyfsError as exc:
        assert str(path) in exc.message


def test_the_schema_for_editors_is_the_one_of_the_program() -> None:
    path = Path(__file__).parents[2] / "contrib/backy.schema.json"
    schema = json.loads(path.read_text())
    assert schema == json_schema(), "run: backyfs check-config --schema > contrib/backy.schema.json"
    assert set(schema["properties"]) == set(SECTIONS)
    assert set(schema["properties"]["global"]["properties"]) == set(GLOBAL)
    assert set(schema["properties"]["maintenance"]["properties"]) == set(MAINTENANCE)
    assert set(schema["definitions"]["job"]["properties"]) == set(JOB_KEYS)


def test_two_thousand_jobs(tmp_path: Path) -> None:
    jobs = "\n".join(
        f"  vm{n}: {{source: {{type: file, filename: /img/{n}}}, schedule: hourly}}"
        for n in range(2000)
    )
    assert len(site(tmp_path, f"jobs:\n{jobs}\n", sources=True).jobs) == 2000


def test_the_example_of_the_documentation_is_a_configuration(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/scheduling.md").read_text().split("## 1.")[1]
    lines = [line[4:] for line in text.split("| key")[0].splitlines() if line.startswith("    ")]
    found = site(tmp_path, "\n".join(lines) + "\n", sources=True)
    assert list(found.jobs) == ["web01", "db01"]
    assert found.jobs["db01"].job.rate_limit == 50 << 20


def test_no_job_may_have_the_place_of_the_status_file(tmp_path: Path) -> None:
    job = "{source: {type: file, filename: /a}}"
    text = f"global: {{base-dir: /srv/backy}}\njobs:\n  status: {job}\n"
    assert complaint(tmp_path, text) == (
        "backy.conf:3:11: the directory of the job 'status' has the name of the status file:"
        " rename the job, or give global `status-file`"
    )
    elsewhere = text.replace("backy}", "backy, status-file: /run/backy.status}")
    assert list(site(tmp_path, elsewhere).jobs) == ["status"]
