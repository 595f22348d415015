"""The VM's own file: read strictly, every problem at once, written so that it reads back equal."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backyfs.config import DAILY, HOURLY, Job, Rule, read_job, write_job
from backyfs.errors import BackyfsError, ConfigError

BACKY = """\
schedule:
  daily: {interval: 1d, keep: 10}
  weekly:
    interval: 7d
    keep: 5
  fortnight: {interval: 1209600, keep: 1}
source:
  backend: chunked
  cow: true
  filename: /srv/images/web01.img
  type: file
path: /srv/backy/web01
"""


def read(tmp_path: Path, text: str) -> Job:
    (tmp_path / "config").write_text(text)
    return read_job(tmp_path / "config")


def complaint(tmp_path: Path, text: str) -> str:
    """What the error says, without the path."""
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert caught.value.message.startswith(str(tmp_path / "config"))
    return caught.value.message.removeprefix(str(tmp_path / "config"))


def test_a_file_that_backy_wrote_is_understood(tmp_path: Path) -> None:
    job = read(tmp_path, BACKY)
    assert job == Job(
        "file",
        {"cow": True, "filename": "/srv/images/web01.img"},
        {
            "daily": Rule(86_400, 10),
            "weekly": Rule(604_800, 5),
            "fortnight": Rule(1_209_600, 1),
        },
    )
    assert list(job.schedule) == ["daily", "weekly", "fortnight"]


def test_a_built_in_schedule_goes_by_name_and_daily_is_the_default(tmp_path: Path) -> None:
    assert read(tmp_path, "source: {type: file}\nschedule: hourly\n").schedule == HOURLY
    assert read(tmp_path, "source: {type: file}\n").schedule == DAILY


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", " is empty"),
        ("a: [\n", ":2:1: this is not YAML: did not find expected node content"),
        ("- source\n", ":1:1: the file must be a mapping (`key: value`)"),
        ("source: file\n", ":1:9: source must be a mapping (`key: value`)"),
        ("source: {}\n", ":1:9: the source has no 'type'"),
        ("source: {type: 5}\n", ":1:16: type must be text: put it in quotes"),
        ("source: {type: ''}\n", ":1:16: type must not be empty"),
        ("source: {type: no}\n", ":1:16: 'no' is true or false to YAML: put it in quotes"),
        ("source: {type: }\n", ":1:16: there is no value here"),
        ("source: {type: f, a: 022}\n", ":1:22: '022' is a number that YAML reads in its own"),
        ("source: {type: f, a: 1:30}\n", ":1:22: '1:30' is a number that YAML reads in its own"),
        ("source: {type: f, a: 1e3, b: 1_0}\n", ":1:30: '1_0' is a number that YAML reads"),
        ("source: {type: f, a: 2026-01-01}\n", ":1:22: '2026-01-01' is a date to YAML"),
        ("source: {type: f, a: ~}\n", ":1:22: '~' is nothing to YAML"),
        ("source: {type: f, a: 1, a: 2}\n", ":1:25: 'a' is here a second time, first in line 1"),
        ("source: &x {type: f, a: *x}\n", ":1:25: anchors and aliases are not supported"),
        ("source: {type: !x f}\n", ":1:16: the tag '!x' is not supported"),
        ("[" * 50_000, ":1:33: more than 32 levels inside each other"),
        ("a: 1\n---\nb: 2\n", ":2:1: this is not YAML: but found another document"),
        ("source: {type: f}\nschedul: daily\n", ":2:1: unknown key 'schedul', did you mean 'sch"),
        ("source: {type: f}\nxyz: 1\n", ":2:1: unknown key 'xyz'; known are: source, schedule"),
        ("source: {type: f}\nschedule: dayly\n", ":2:11: no schedule 'dayly', did you mean 'dai"),
        ("source: {type: f}\nschedule: {}\n", ":2:11: the schedule has no tags"),
        ("source: {type: f}\nschedule: {a: 1d}\n", ":2:15: a must be a mapping"),
        ("source: {type: f}\nschedule: {a: {keep: 1}}\n", ":2:15: a has no 'interval'"),
        ("source: {type: f}\nschedule: {a: {interval: 1x, keep: 1}}\n", ":2:26: '1x' is no int"),
        ("source: {type: f}\nschedule: {a: {interval: [], keep: 1}}\n", ":2:26: an interval is"),
        ("source: {type: f}\nschedule: {a: {interval: 1d, keep: 0}}\n", ":2:36: keep must be a"),
        ("source: {type: f}\nschedule: {a/b: {interval: 1d, keep: 1}}\n", ":2:17: 'a/b' is no tag"),
        (
            "source: {type: f}\nschedule: {'manual:a': {interval: 1d, keep: 1}}\n",
            ":2:24: 'manual:a'",
        ),
    ],
)
def test_a_problem_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    found = complaint(tmp_path, text)
    assert message.strip() in found


def test_all_problems_come_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = complaint(
        tmp_path,
        "schedule:\n  daily: {interval: 1:30, keep: no}\nsource: {filename: 022}\nsorce: 1\n",
    )
    assert [line.split(": ")[0].strip() for line in found.splitlines()] == [
        "", "2:21", "2:33", "3:9", "3:20", "4:1",
    ]  # fmt: skip
    assert found.startswith(": 5 problems\n")


def test_keys_are_texts_as_they_were_written(tmp_path: Path) -> None:
    job = read(tmp_path, "source: {type: file, disks: {no: /a, 022: /b, 1:30: /c}}\n")
    assert job.settings["disks"] == {"no": "/a", "022": "/b", "1:30": "/c"}


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is missing") as caught:
        read_job(tmp_path / "config")
    assert "nothing says what to back up" in caught.value.hint
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        read_job(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match=r"cannot read .*: it is not a file"):
        read_job(tmp_path / "fifo")
    (tmp_path / "config").write_bytes(b"source: \xff")
    with pytest.raises(ConfigError, match=r"is not UTF-8 text \(byte 8"):
        read_job(tmp_path / "config")
    (tmp_path / "config").write_bytes(b" " * (2 << 20))
    with pytest.raises(ConfigError, match="that is no job"):
        read_job(tmp_path / "config")


_settings = st.dictionaries(
    st.text(st.characters(codec="utf-8", categories=["L", "Nd"]), min_size=1, max_size=8),
    st.recursive(
        st.text(max_size=20) | st.booleans() | st.integers(-(10**17), 10**17),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
        max_leaves=6,
    ),
    max_size=4,
)
_traps = st.sampled_from(
    [
        "no",
        "on",
        "1:30",
        "022",
        "~",
        "",
        "2026-01-01",
        "0x1F",
        "1e3",
        "=",
        "<<",
        "# a",
        " a",
        "a: b",
    ]
)


@given(settings=_settings, trap=_traps)
def test_what_is_written_reads_back_equal_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, settings: Mapping[str, Any], trap: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"config-{os.getpid()}"
    job = Job("file", {**settings, "trap": trap}, HOURLY)
    job.settings.pop("type", None)  # type: ignore[attr-defined]
    job.settings.pop("backend", None)  # type: ignore[attr-defined]
    try:
        write_job(path, job)
    except ConfigError:
        assert not path.exists()
        return
    assert read_job(path) == job
    path.unlink()


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda data: data.decode("latin-1")))
def test_no_text_whatever_is_more_than_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"noise-{os.getpid()}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        read_job(path)
    except BackyfsError as exc:
        message = exc.message
    else:
        return
    assert str(path) in message


def test_the_file_is_not_for_everybody_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "config"
    old = os.umask(0o077)
    try:
        write_job(path, Job("file", {"filename": "/a"}))
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["config"]


@pytest.mark.parametrize("call", ["fsync", "fchmod", "replace"])
def test_a_failed_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "config"
    write_job(path, Job("file", {"filename": "/old"}))

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ConfigError, match=r"cannot write .*config: Input/output error"):
        write_job(path, Job("file", {"filename": "/new"}))
    assert read_job(path).settings == {"filename": "/old"}
    assert os.listdir(tmp_path) == ["config"]


@pytest.mark.parametrize("key", ["password", "consul_acl_token", "client-Secret", "credentials"])
def test_a_secret_is_not_written(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="would be a secret"):
        write_job(tmp_path / "config", Job("file", {"nested": {key: "hush"}}))
    write_job(tmp_path / "config", Job("file", {f"{key}-file": "/etc/hush"}))


def test_yaml_is_not_loaded_before_it_is_needed() -> None:
    code = "import sys, backyfs.config; sys.exit('yaml' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_secrets_can_be_left_out_by_name(tmp_path: Path) -> None:
    whole = Job("flyingcircus", {"pool": "rbd", "consul_acl_token": "hush"}, HOURLY)
    public = whole.without_secrets()
    assert public.settings == {"pool": "rbd"}
    assert public.secrets == ("consul_acl_token",)
    write_job(tmp_path / "config", public)
    assert "hush" not in (tmp_path / "config").read_text()
    assert read_job(tmp_path / "config") == public


def test_how_much_is_sampled_is_written_where_it_is_not_the_usual(tmp_path: Path) -> None:
    path = tmp_path / "config"
    usual = Job("file", {"filename": "/a"})
    write_job(path, usual)
    assert "sample" not in path.read_text()
    assert (read_job(path).sample_percent, read_job(path).sample_budget_s) == (1.0, 300)
    job = usual._replace(sample_percent=0.0, sample_budget_s=90, rate_limit=1 << 20)
    write_job(path, job)
    assert "sample-share: 0%\nsample-budget: 1m30s\n" in path.read_text()
    assert read_job(path) == job
