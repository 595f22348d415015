"""The operator's commands: what they are told, what they print, and how long they may take."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import pytest

from backyfs.source.quiescing.commands import Commands
from backyfs.source.quiescing.contract import NotFrozen

TOLD = {"BACKYFS_VM": "web01"}


def shell(freeze: str, thaw: str = "true", timeout_s: float = 30.0) -> Commands:
    return Commands(["sh", "-c", freeze], ["sh", "-c", thaw], TOLD, timeout_s)


def test_what_they_print_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    commands = shell("echo one; echo two >&2; echo $BACKYFS_ACTION $BACKYFS_VM")
    assert commands.freeze() == "freeze-command"
    (record,) = caplog.records
    assert record.args == {"action": "freeze", "code": 0, "output": "one | two | freeze web01"}
    assert commands.thaw() == ""


def test_a_flood_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    shell("head -c 3000000 /dev/zero | tr '\\0' x; printf the-end").freeze()
    (record,) = caplog.records
    assert isinstance(record.args, dict)
    output = str(record.args["output"])
    assert len(output) <= 4096
    assert output.endswith("the-end")


def test_a_failure_says_what_was_said_last() -> None:
    commands = shell("echo no such domain >&2; exit 3")
    with pytest.raises(NotFrozen, match="^the freeze-command exited 3: no such domain$"):
        commands.freeze()
    assert commands.thaw() == "the freeze-command failed"


def test_what_a_guest_has_them_say_drives_no_terminal() -> None:
    with pytest.raises(NotFrozen, match=r"exited 3: \\x1b\[2J$"):
        shell("printf '\\033[2J'; exit 3").freeze()


def test_killed_by_somebody() -> None:
    with pytest.raises(NotFrozen, match="was killed by signal 9"):
        shell("kill -9 $$").freeze()


def test_no_such_program() -> None:
    for one, other in (("/nowhere/x", "true"), ("true", "/nowhere/x")):
        with pytest.raises(NotFrozen, match="^cannot run /nowhere/x: no such program"):
            Commands([one], [other], {}, 5).prepare()
    with pytest.raises(NotFrozen, match="No such file"):
        Commands(["/nowhere/x"], ["true"], {}, 5).freeze()
    with pytest.raises(NotFrozen, match="null byte"):
        Commands(["true", "\0"], ["true"], {}, 5).freeze()


def test_too_long_and_all_it_started_is_killed(tmp_path: Path) -> None:
    late = tmp_path / "late"
    with pytest.raises(NotFrozen, match="the thaw-command ran longer than 1 s"):
        shell("true", f"(sleep 2; touch {late}) & sleep 600", timeout_s=1).thaw()
    time.sleep(1.5)
    assert not late.exists()


def test_a_daemon_it_leaves_behind_is_not_waited_for(tmp_path: Path) -> None:
    begun = time.monotonic()
    left = tmp_path / "left"
    commands = shell(f"sleep 60 & echo $! > {left}", f"kill $(cat {left})")
    commands.freeze()
    commands.thaw()
    assert time.monotonic() - begun < 30


def test_one_that_closes_its_output() -> None:
    assert shell("exec >&- 2>&-; sleep 0.3").freeze() == "freeze-command"


def test_stopped(tmp_path: Path) -> None:
    readable, writable = os.pipe()
    late = tmp_path / "late"
    threading.Timer(0.3, os.write, (writable, b"x")).start()
    with pytest.raises(NotFrozen, match="stopped while the freeze-command ran"):
        shell(f"sleep 1; touch {late}").freeze([readable])
    time.sleep(1)
    assert not late.exists()
    os.close(readable)
    os.close(writable)


def test_there_is_no_shell(tmp_path: Path) -> None:
    Commands(["touch", f"{tmp_path}/$HOME;x"], ["true"], {}, 5).freeze()
    assert os.listdir(tmp_path) == ["$HOME;x"]
