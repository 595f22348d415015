"""Backup and guard, two processes of which one, the other, or both may die: the guest is thawed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backyfs.config.quiesce import Quiesce
from backyfs.errors import Busy, ConfigError, SourceUnavailable
from backyfs.source.cancelling import checking
from backyfs.source.quiescing import freeze as freezing
from backyfs.source.quiescing import leftover, note
from backyfs.source.quiescing.freeze import Freeze
from backyfs.source.quiescing.plan import Plan
from tests.parts import require
from tests.source.quiescing.fake import FakeAgent

PATIENCE_S = 60.0
FREEZE, THAW = "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeAgent]:
    with FakeAgent(tmp_path / "agent") as agent:
        yield agent


@pytest.fixture
def plan(fake: FakeAgent, tmp_path: Path) -> Plan:
    """A plan with the patience of a test, but of a busy machine."""
    directory = tmp_path / "web01"
    directory.mkdir()
    quiesce = Quiesce(agent=fake.path, freeze_timeout_s=5, frozen_limit_s=30)
    return Plan("web01", directory, quiesce, "20261121T220112Z-7f3a", thaw_s=5.0, answer_s=2.0)


def with_commands(plan: Plan, freeze: str, thaw: str, *, limit_s: int = 5) -> Plan:
    quiesce = Quiesce(
        freeze_command=("sh", "-c", freeze),
        thaw_command=("sh", "-c", thaw),
        freeze_timeout_s=limit_s,
        frozen_limit_s=30,
    )
    return Plan(plan.vm, plan.directory, quiesce, plan.revision, thaw_s=1.0)


def until(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    """Wait until it is true."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def guards() -> set[int]:
    """The guards that this process has started, and that run now."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {
        int(pid)
        for pid in " ".join(path.read_text() for path in children).split()
        if b"quiescing.guard" in Path(f"/proc/{pid}/cmdline").read_bytes()
    }


# ---- as it should be


def test_frozen_while_inside(plan: Plan, fake: FakeAgent) -> None:
    with Freeze(plan) as freeze:
        assert freeze.failure == ""
        assert freeze.what == "2 file systems"
        assert fake.frozen == 2
        assert note.place(plan.directory).exists()
    assert fake.frozen == 0
    assert (freeze.failure, freeze.stuck) == ("", "")
    assert 0 < freeze.seconds < PATIENCE_S
    assert not note.place(plan.directory).exists()


def test_commands_around_the_agent(plan: Plan, fake: FakeAgent, tmp_path: Path) -> None:
    told = tmp_path / "told"
    line = f'echo "$BACKYFS_ACTION $BACKYFS_VM $BACKYFS_REVISION" >> {told}'
    commands = with_commands(plan, line, line).quiesce
    quiesce = Quiesce(
        agent=fake.path,
        freeze_command=commands.freeze_command,
        thaw_command=commands.thaw_command,
    )
    with Freeze(Plan(plan.vm, plan.directory, quiesce, plan.revision)) as freeze:
        assert freeze.what == "freeze-command, 2 file systems"
        assert told.read_text() == f"freeze web01 {plan.revision}\n"
    assert freeze.failure == ""
    assert told.read_text().splitlines()[1:] == [f"thaw web01 {plan.revision}"]
    assert fake.frozen == 0


def test_an_absent_agent_costs_no_command(plan: Plan, tmp_path: Path) -> None:
    told = tmp_path / "told"
    commands = with_commands(plan, f"touch {told}", f"touch {told}").quiesce
    quiesce = Quiesce(
        agent=tmp_path / "missing",
        freeze_command=commands.freeze_command,
        thaw_command=commands.thaw_command,
    )
    with Freeze(Plan(plan.vm, plan.directory, quiesce)) as freeze:
        assert "cannot reach the guest agent" in freeze.failure
    assert not told.exists()
    assert not note.place(plan.directory).exists()


# ---- it cannot be frozen


def test_what_is_refused_is_thawed_all_the_same(plan: Plan, fake: FakeAgent) -> None:
    fake.faults[FREEZE] = ["lose"]
    quiesce = Quiesce(agent=fake.path, freeze_timeout_s=1)
    with Freeze(Plan("web01", plan.directory, quiesce, thaw_s=5.0, answer_s=2.0)) as freeze:
        assert freeze.failure == f"the guest agent ({FREEZE}): no answer within 1 s"
        assert fake.frozen == 0
    assert freeze.stuck == ""
    assert not note.place(plan.directory).exists()


def test_a_directory_that_cannot_be_written(plan: Plan, fake: FakeAgent, tmp_path: Path) -> None:
    missing = Plan("web01", tmp_path / "missing", plan.quiesce)
    with Freeze(missing) as freeze:
        assert freeze.failure == (
            f"cannot note in {missing.directory} that the guest gets frozen: "
            "No such file or directory"
        )
    assert FREEZE not in fake.calls


def test_a_guard_that_cannot_be_started(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with Freeze(plan) as freeze:
        assert freeze.failure.startswith("cannot start the guard")
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with Freeze(plan) as freeze:
        assert freeze.failure == "the guard of the frozen guest died"
    monkeypatch.setattr(sys, "executable", "/bin/echo")
    with Freeze(plan) as freeze:
        assert "cannot be understood" in freeze.failure


def test_a_backup_that_is_cancelled_does_not_wait_for_it(plan: Plan, fake: FakeAgent) -> None:
    fake.faults[FREEZE] = ["lose"]
    quiesce = Quiesce(agent=fake.path, freeze_timeout_s=600)

    def cancelled() -> None:
        if fake.frozen:
            raise ZeroDivisionError

    with checking(cancelled), pytest.raises(ZeroDivisionError):
        Freeze(Plan("web01", plan.directory, quiesce)).__enter__()
    assert fake.frozen == 0
    assert not note.place(plan.directory).exists()


# ---- thawing has its troubles


def test_thawing_is_tried_until_it_works(plan: Plan, fake: FakeAgent) -> None:
    with Freeze(plan) as freeze:
        fake.faults[THAW] = ["refuse", "close"]
    assert fake.frozen == 0
    assert fake.calls.count(THAW) == 3
    assert freeze.stuck == ""
    assert freeze.failure != ""  # somewhere in between the connection was lost


def test_a_guest_that_cannot_be_thawed_is_noted(plan: Plan, fake: FakeAgent) -> None:
    short = Plan("web01", plan.directory, plan.quiesce, thaw_s=0.1, answer_s=0.2)
    with Freeze(short) as freeze:
        fake.stop()
    assert "cannot reach the guest agent" in freeze.stuck
    assert note.place(plan.directory).exists()
    with pytest.raises(SourceUnavailable, match="may be frozen since"):
        leftover.thaw_leftover(plan.directory)
    assert note.place(plan.directory).exists()
    with FakeAgent(fake.path) as back:
        back.frozen = 2
        assert leftover.thaw_leftover(plan.directory)
        assert back.frozen == 0
    assert not note.place(plan.directory).exists()


def test_the_time_is_up(plan: Plan, fake: FakeAgent) -> None:
    quiesce = Quiesce(agent=fake.path, frozen_limit_s=1)
    with Freeze(Plan("web01", plan.directory, quiesce)) as freeze:
        assert fake.frozen == 2
        until(lambda: fake.frozen == 0)  # while the snapshot still takes its time
    assert freeze.failure == "the snapshots took longer than 1 s (frozen-limit)"
    assert freeze.stuck == ""


# ---- the guard fails


def the_guard() -> int:
    (pid,) = guards()
    return pid


def test_a_guard_that_is_told_to_end_thaws_at_once(plan: Plan, fake: FakeAgent) -> None:
    with Freeze(plan) as freeze:
        os.kill(the_guard(), signal.SIGTERM)
        until(lambda: fake.frozen == 0)
    assert "told to end" in freeze.failure
    assert not note.place(plan.directory).exists()


def test_a_guard_that_is_killed(plan: Plan, fake: FakeAgent) -> None:
    with Freeze(plan) as freeze:
        os.kill(the_guard(), signal.SIGKILL)
    assert fake.frozen == 0
    assert (freeze.failure, freeze.stuck) == ("the guard of the frozen guest died", "")
    assert not note.place(plan.directory).exists()


def test_a_guard_that_hangs(plan: Plan, fake: FakeAgent, monkeypatch: pytest.MonkeyPatch) -> None:
    with Freeze(plan) as freeze:
        os.kill(the_guard(), signal.SIGSTOP)
        monkeypatch.setattr(freezing, "PROMPT_S", 0.5)
    assert fake.frozen == 0
    assert "is silent" in freeze.failure
    assert freeze.stuck == ""
    assert not note.place(plan.directory).exists()
    assert not guards()


def test_a_command_does_not_outlive_its_guard(plan: Plan, tmp_path: Path) -> None:
    """A freeze-command that goes on would freeze after we thawed."""
    begun, frozen, thawed = tmp_path / "begun", tmp_path / "frozen", tmp_path / "thawed"
    slow = with_commands(
        plan, f"touch {begun}; sleep 2; touch {frozen}", f"touch {thawed}", limit_s=60
    )

    def kill() -> None:
        until(begun.exists)
        os.kill(the_guard(), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with Freeze(slow) as freeze:
        killer.join()
        assert freeze.failure == "the guard of the frozen guest died"
        assert thawed.exists()
    time.sleep(2)
    assert not frozen.exists()


# ---- the backup fails


BACKUP = """
import sys, time
from pathlib import Path
from backyfs.source.quiescing.freeze import Freeze
from backyfs.source.quiescing.plan import Plan

with Freeze(Plan.decode(sys.argv[1].encode())) as freeze:
    print(freeze.failure or freeze._guard._process.pid, flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def backup(plan: Plan) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that keeps the guest frozen, and its guard."""
    process = subprocess.Popen(
        [sys.executable, "-c", BACKUP, plan.encode().decode()],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout:
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("group", [False, True])
def test_a_killed_backup_leaves_no_frozen_guest(plan: Plan, fake: FakeAgent, group: bool) -> None:
    with backup(plan) as (process, _):
        assert fake.frozen == 2
        (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        until(lambda: fake.frozen == 0)
        until(lambda: not note.place(plan.directory).exists())
    until(lambda: (plan.directory / "backy.log").exists())
    assert 'reason="the backup ended"' in (plan.directory / "backy.log").read_text()


def test_a_stopped_backup_is_thawed_by_the_clock(plan: Plan, fake: FakeAgent) -> None:
    quiesce = Quiesce(agent=fake.path, frozen_limit_s=1)
    with backup(Plan("web01", plan.directory, quiesce)) as (process, _):
        os.kill(process.pid, signal.SIGSTOP)
        until(lambda: fake.frozen == 0)


def test_killed_with_its_guard_the_next_one_thaws(plan: Plan, fake: FakeAgent) -> None:
    with backup(plan) as (process, guard):
        os.kill(guard, signal.SIGKILL)
        process.kill()
        process.wait()
    assert fake.frozen == 2
    assert leftover.thaw_leftover(plan.directory)
    assert fake.frozen == 0
    assert not leftover.thaw_leftover(plan.directory)


def test_who_comes_next_waits_for_a_guard_at_work(plan: Plan, fake: FakeAgent) -> None:
    with backup(plan) as (process, guard):
        os.kill(guard, signal.SIGSTOP)
        process.kill()
        with pytest.raises(Busy, match="just being frozen"):
            leftover.thaw_leftover(plan.directory, wait_s=0.2)
        with pytest.raises(Busy):
            leftover.forget(plan.directory)
        os.kill(guard, signal.SIGCONT)
        leftover.thaw_leftover(plan.directory, wait_s=PATIENCE_S)
        assert fake.frozen == 0


# ---- the note


def test_a_note_that_was_cut_off(plan: Plan, fake: FakeAgent) -> None:
    note.place(plan.directory).write_bytes(plan.encode()[:40])
    assert leftover.thaw_leftover(plan.directory)
    assert not note.place(plan.directory).exists()


@pytest.mark.parametrize(
    "damage", [(b'"policy"', b'"pol\xfccy"'), (b'"policy"', b'"polity"'), (b"{", b'{"later": 1, ')]
)
def test_a_note_that_was_damaged_or_is_a_later_version_s_stays(
    plan: Plan, fake: FakeAgent, damage: tuple[bytes, bytes]
) -> None:
    note.place(plan.directory).write_bytes(plan.encode().replace(*damage, 1))
    with pytest.raises(SourceUnavailable, match="the guest may be frozen, but") as caught:
        leftover.thaw_leftover(plan.directory)
    assert "thaw --forget" in caught.value.hint
    assert leftover.forget(plan.directory)


@pytest.mark.parametrize("length", range(0, 400, 60))
def test_any_cut_is_no_plan(plan: Plan, length: int) -> None:
    data = plan.encode()
    assert length < len(data) - 2
    with pytest.raises(ValueError, match="plan|JSON|Expecting|Unterminated|Extra|delimiter"):
        Plan.decode(data[:length])
    assert Plan.decode(data) == plan


def test_commands_in_a_note_of_somebody_else_are_not_run(plan: Plan, tmp_path: Path) -> None:
    run = tmp_path / "run"
    place = note.place(plan.directory)
    place.write_bytes(with_commands(plan, "true", f"touch {run}").encode())
    place.chmod(0o666)
    with pytest.raises(ConfigError, match="others than you"):
        leftover.thaw_leftover(plan.directory)
    assert not run.exists()
    place.chmod(0o640)
    assert leftover.thaw_leftover(plan.directory)
    assert run.exists()


def test_commands_of_another_user_are_not_run(plan: Plan, tmp_path: Path) -> None:
    require("root")
    run = tmp_path / "run"
    place = note.place(plan.directory)
    place.write_bytes(with_commands(plan, "true", f"touch {run}").encode())
    for path in (place, plan.directory):
        os.chown(path, 65534, -1)
        with pytest.raises(ConfigError, match="others than you"):
            leftover.thaw_leftover(plan.directory)
        os.chown(path, 0, -1)
    assert not run.exists()


def test_commands_in_a_directory_of_somebody_else_are_not_run(plan: Plan, tmp_path: Path) -> None:
    """He would put his own file in place of ours between two looks."""
    run = tmp_path / "run"
    note.place(plan.directory).write_bytes(with_commands(plan, "true", f"touch {run}").encode())
    mode = plan.directory.stat().st_mode
    plan.directory.chmod(mode | 0o002)
    with pytest.raises(ConfigError, match="others than you") as caught:
        leftover.thaw_leftover(plan.directory)
    assert f"chmod o-w {plan.directory}" in caught.value.hint
    assert not run.exists()
    plan.directory.chmod(mode)
    assert leftover.thaw_leftover(plan.directory)


def test_a_note_can_be_forgotten(plan: Plan, fake: FakeAgent) -> None:
    assert not leftover.forget(plan.directory)
    note.place(plan.directory).write_bytes(plan.encode())
    assert leftover.forget(plan.directory)
    assert THAW not in fake.calls
    assert not note.place(plan.directory).exists()


@pytest.mark.parametrize("key", ["thaw_s", "answer_s"])
@pytest.mark.parametrize("lie", ["x", -1, 1e300, float("nan"), True])
def test_a_note_does_not_say_how_long_we_hang(plan: Plan, key: str, lie: object) -> None:
    value = json.loads(plan.encode()) | {key: lie}
    note.place(plan.directory).write_text(json.dumps(value) + "\n")
    with pytest.raises(SourceUnavailable, match="cannot be understood: no plan"):
        leftover.thaw_leftover(plan.directory)
