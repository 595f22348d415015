"""The section `quiesce` of a job: read strictly, written so that it reads back equal."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backyfs.config import Job, read_job, write_job
from backyfs.config.keys import WAIT_MAX
from backyfs.config.quiesce import Policy, Quiesce
from backyfs.errors import ConfigError
from backyfs.model import Consistency
from backyfs.source.quiescing.plan import Plan

SOURCE = "source: {type: file, filename: /a}\n"


def read(directory: Path, text: str) -> Quiesce | None:
    (directory / "config").write_text(SOURCE + text)
    return read_job(directory / "config").quiesce


def test_nothing_is_frozen_unless_it_says_so(tmp_path: Path) -> None:
    assert read(tmp_path, "") is None


def test_all_it_can_say(tmp_path: Path) -> None:
    text = """\
quiesce:
  policy: require
  agent: /run/qemu/web01.agent
  mountpoints: [/, "C:\\\\"]
  freeze-command: [virsh, domfsfreeze, web01]
  thaw-command: virsh domfsthaw 'web 01'
  consistency: application
  freeze-timeout: 2m
  frozen-limit: 5
"""
    assert read(tmp_path, text) == Quiesce(
        Policy.REQUIRE,
        Path("/run/qemu/web01.agent"),
        ("/", "C:\\"),
        ("virsh", "domfsfreeze", "web01"),
        ("virsh", "domfsthaw", "web 01"),
        Consistency.APPLICATION,
        120,
        5,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quiesce: yes\n", ":2:10: quiesce must be a mapping"),
        ("quiesce: {}\n", ":2:10: quiesce has neither an agent nor commands"),
        ("quiesce: {polcy: never}\n", ":2:11: unknown key 'polcy', did you mean 'policy'?"),
        ("quiesce: {policy: maybe}\n", ":2:19: 'maybe' is none of: require, prefer, never"),
        ("quiesce: {agent: a.sock}\n", ":2:18: 'a.sock' is a relative path"),
        ("quiesce: {agent: /a, consistency: torn}\n", "none of: filesystem, application"),
        ("quiesce: {agent: /a, mountpoints: /}\n", ":2:35: mountpoints must be a list"),
        ("quiesce: {agent: /a, mountpoints: []}\n", ":2:35: mountpoints must not be empty"),
        ("quiesce: {agent: /a, mountpoints: [1]}\n", ":2:36: mountpoints must be text"),
        ("quiesce: {freeze-command: a}\n", "give both or none"),
        ("quiesce: {thaw-command: a}\n", "give both or none"),
        ('quiesce: {freeze-command: a, thaw-command: "it\'s"}\n', ':2:44: "it\'s" is no command'),
        ("quiesce: {freeze-command: [], thaw-command: b}\n", "must not be empty"),
        (
            "quiesce: {freeze-command: a, thaw-command: b, mountpoints: [/]}\n",
            "for the guest agent",
        ),
        ("quiesce: {agent: /a, frozen-limit: 0}\n", ":2:36: 0 is no interval"),
        ("quiesce: {agent: /a, freeze-timeout: never}\n", "'never' is no interval"),
        ("quiesce: {agent: /a, freeze-timeout: 86401}\n", ":2:38: 86401 is more than a day"),
        ("quiesce: {agent: /a, frozen-limit: 2d}\n", ":2:36: '2d' is more than a day"),
    ],
)
def test_a_problem_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert message in caught.value.message


words = st.text(string.printable + "äß€", min_size=1, max_size=12).filter(
    lambda text: "\0" not in text
)
lists = st.lists(words, min_size=1, max_size=3).map(tuple)
seconds = st.integers(1, WAIT_MAX)
quiesces = st.builds(
    Quiesce,
    policy=st.sampled_from(Policy),
    agent=st.sampled_from([Path("/run/a"), Path("/run/a b: c")]),
    mountpoints=st.just(()) | lists,
    consistency=st.sampled_from([Consistency.FILESYSTEM, Consistency.APPLICATION]),
    freeze_timeout_s=seconds,
    frozen_limit_s=seconds,
) | st.builds(Quiesce, freeze_command=lists, thaw_command=lists)


@settings(deadline=None, max_examples=50)
@given(quiesces)
def test_it_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, quiesce: Quiesce) -> None:
    path = tmp_path_factory.mktemp("job") / "config"
    job = Job("file", {"filename": "/a"}, quiesce=quiesce)
    try:
        write_job(path, job)
    except ConfigError as exc:
        assert "cannot be written as YAML" in exc.message
    else:
        assert read_job(path) == job
    plan = Plan("web01", Path("/srv/backy/web01"), quiesce, "r", 3.5)
    assert json.loads(plan.encode())["vm"] == "web01"
    assert Plan.decode(plan.encode()) == plan


def test_a_plan_nested_beyond_reason() -> None:
    with pytest.raises(ValueError, match="no plan"):
        Plan.decode(b"[" * 100_000)
