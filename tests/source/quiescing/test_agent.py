"""The client of the guest agent: against qemu-ga itself, and against one that misbehaves."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backyfs.source.quiescing.agent import GuestAgent
from backyfs.source.quiescing.contract import NotFrozen
from tests.filesystems import run
from tests.source.quiescing import guest
from tests.source.quiescing.fake import FakeAgent
from tests.source.quiescing.guest import Guest

FREEZE, THAW = "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"
STATUS, SYNC, INFO = "guest-fsfreeze-status", "guest-sync-delimited", "guest-info"
ANSWER_S = 0.5


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Guest]:
    with guest.running(tmp_path) as running:
        yield running


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeAgent]:
    with FakeAgent(tmp_path / "agent") as agent:
        yield agent


def client(fake: FakeAgent, *mountpoints: str) -> GuestAgent:
    return GuestAgent(fake.path, mountpoints, freeze_timeout_s=ANSWER_S, answer_s=ANSWER_S)


# ---- the real one


@pytest.mark.parametrize("mountpoints", [[], [guest.MOUNTPOINT]])
def test_a_real_guest_is_frozen_and_thawed(real: Guest, mountpoints: list[str]) -> None:
    agent = GuestAgent(real.agent, mountpoints)
    agent.prepare()
    assert agent.freeze() == "1 file system"
    assert real.is_frozen()
    assert agent.thaw() == ""
    assert not real.is_frozen()
    assert agent.thaw() != ""  # it was not frozen any more
    agent.close()
    assert real.hook_log[:2] == ["freeze", "thaw"]


def test_half_a_command_of_a_dead_client(real: Guest) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.connect(str(real.agent))
        dead.sendall(b'{"execute": "guest-')
    agent = GuestAgent(real.agent)
    agent.prepare()
    agent.close()


def test_a_real_guest_that_is_frozen_already(real: Guest) -> None:
    other, agent = GuestAgent(real.agent), GuestAgent(real.agent)
    other.prepare()
    other.freeze()
    other.close()  # without thawing
    with pytest.raises(NotFrozen, match="frozen already"):
        agent.prepare()
    assert "not known" in agent.thaw()  # nothing this one froze
    assert not real.is_frozen()
    agent.close()


def test_somebody_in_the_guest_thaws_too_early(real: Guest) -> None:
    agent = GuestAgent(real.agent)
    agent.prepare()
    agent.freeze()
    run("fsfreeze", "-u", real.data)
    assert agent.thaw() == "of 1 file systems only 0 were still frozen"
    agent.close()


def test_a_mountpoint_that_is_none(real: Guest) -> None:
    agent = GuestAgent(real.agent, ["/nowhere"])
    agent.prepare()
    with pytest.raises(NotFrozen, match="no file system"):
        agent.freeze()
    agent.thaw()
    assert not real.is_frozen()
    agent.close()


def test_a_guest_that_forbids_freezing(tmp_path: Path) -> None:
    with guest.running(tmp_path, "-b", FREEZE) as running:
        agent = GuestAgent(running.agent)
        with pytest.raises(NotFrozen, match=f"does not allow {FREEZE}"):
            agent.prepare()
        agent.close()
        listing = GuestAgent(running.agent, [guest.MOUNTPOINT])
        listing.prepare()
        listing.close()


# ---- the fake is like the real one where it behaves


def test_the_fake_is_frozen_and_thawed(fake: FakeAgent) -> None:
    agent = client(fake)
    agent.prepare()
    assert agent.freeze() == "2 file systems"
    assert fake.frozen == 2
    assert agent.thaw() == ""
    assert fake.frozen == 0
    assert agent.thaw() != ""
    agent.close()
    one = client(fake, "/var")
    one.prepare()
    assert one.freeze() == "1 file system"
    assert one.thaw() == ""
    one.close()
    assert fake.calls.count("guest-fsfreeze-freeze-list") == 1


# ---- no agent


def test_nobody_there(tmp_path: Path) -> None:
    agent = GuestAgent(tmp_path / "missing")
    with pytest.raises(NotFrozen, match="missing: No such file"):
        agent.prepare()
    agent.close()


def test_a_socket_nobody_listens_at(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    agent = GuestAgent(tmp_path / "dead")
    with pytest.raises(NotFrozen, match="does the VM run"):
        agent.prepare()
    agent.close()


def test_a_path_too_long_for_a_socket(tmp_path: Path) -> None:
    agent = GuestAgent(tmp_path / ("x" * 120))
    with pytest.raises(NotFrozen, match="too long"):
        agent.prepare()
    agent.close()


def test_accepted_and_never_answered(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen(1)
        agent = GuestAgent(tmp_path / "silent", answer_s=0.2)
        with pytest.raises(NotFrozen, match=r"is the VM paused.*no answer within 0\.2 s"):
            agent.prepare()
        agent.close()


def test_a_peer_that_never_stops_sending(tmp_path: Path) -> None:
    """Data that keeps coming must not outlast the limit."""
    stop = threading.Event()

    def babble() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "babbler"))
            listener.listen(1)
            listening.set()
            with listener.accept()[0] as peer:
                peer.settimeout(1)
                while not stop.is_set():
                    try:
                        peer.sendall(b'\xff{"return": 1}\n' * 1000)
                    except OSError:
                        return

    listening = threading.Event()
    thread = threading.Thread(target=babble)
    thread.start()
    listening.wait(10)
    agent = GuestAgent(tmp_path / "babbler", answer_s=0.5)
    with pytest.raises(NotFrozen, match="no answer within"):
        agent.prepare()
    agent.close()
    stop.set()
    thread.join()


# ---- one that misbehaves


@pytest.mark.parametrize("fault", ["ignore", "drop", "garbage", "half", "huge", "wrong", "late"])
@pytest.mark.parametrize("command", [SYNC, STATUS])
def test_a_fault_before_freezing_changes_nothing(fake: FakeAgent, command: str, fault: str) -> None:
    agent = client(fake)
    fake.faults[command] = [fault]
    with pytest.raises(NotFrozen):
        agent.prepare()
    agent.close()
    assert FREEZE not in fake.calls
    again = client(fake)
    fake.faults.clear()
    for _ in range(40):  # the fake may still be busy with the first client
        try:
            again.prepare()
            break
        except NotFrozen:
            again.close()
    again.close()


@pytest.mark.parametrize(
    "fault",
    ["ignore", "lose", "close", "drop", "refuse", "garbage", "nonsense", "half", "huge", "wrong"],
)
def test_whatever_becomes_of_freezing_it_is_thawed(fake: FakeAgent, fault: str) -> None:
    agent = client(fake)
    agent.prepare()
    fake.faults[FREEZE] = [fault]
    with pytest.raises(NotFrozen):
        agent.freeze()
    assert agent.thaw() != ""
    assert fake.frozen == 0
    agent.close()


def test_an_error_is_told_on_one_line(fake: FakeAgent) -> None:
    agent = client(fake)
    agent.prepare()
    fake.faults[FREEZE] = ["refuse"]
    with pytest.raises(NotFrozen, match="the guest agent says: refused for a test$"):
        agent.freeze()
    agent.close()


def test_an_error_drives_no_terminal_and_can_be_written_down(fake: FakeAgent) -> None:
    agent = client(fake)
    agent.prepare()
    fake.faults[FREEZE] = ["hostile"]
    with pytest.raises(NotFrozen) as caught:
        agent.freeze()
    assert str(caught.value) == r"the guest agent says: \ud800 \x1b[2J"
    agent.close()


def test_no_guest_has_so_many_file_systems(fake: FakeAgent) -> None:
    agent = client(fake)
    agent.prepare()
    fake.faults[FREEZE] = ["many"]
    with pytest.raises(NotFrozen, match="answers 9+ to guest-fsfreeze-freeze"):
        agent.freeze()
    agent.thaw()
    agent.close()


def test_a_late_answer_is_no_answer_to_the_next_question(fake: FakeAgent) -> None:
    agent = client(fake)
    agent.prepare()
    fake.faults[FREEZE] = ["late"]
    with pytest.raises(NotFrozen, match="no answer"):
        agent.freeze()
    deadline = time.monotonic() + 30
    while True:
        try:
            assert agent.thaw() != ""
            break
        except NotFrozen:  # it is still at it
            assert time.monotonic() < deadline
    assert fake.frozen == 0
    agent.close()


@pytest.mark.parametrize("fault", ["ignore", "drop", "lose", "close", "garbage", "half"])
def test_thawing_is_to_be_tried_again(fake: FakeAgent, fault: str) -> None:
    agent = client(fake)
    agent.prepare()
    agent.freeze()
    fake.faults[THAW] = [fault]
    with pytest.raises(NotFrozen):
        agent.thaw()
    assert agent.thaw() != ""  # the connection was lost: nobody knows
    assert fake.frozen == 0
    agent.close()


def test_a_guest_that_gave_up_by_itself(fake: FakeAgent) -> None:
    """VSS on Windows holds writes for 10 s; the agent says so only when it is to thaw."""
    agent = client(fake)
    agent.prepare()
    agent.freeze()
    fake.faults[THAW] = ["lapse"]
    assert agent.thaw() == "thawing: the guest agent says: refused for a test"
    agent.close()


def test_a_refused_thaw_that_left_it_frozen(fake: FakeAgent) -> None:
    agent = client(fake)
    agent.prepare()
    agent.freeze()
    fake.faults[THAW] = ["refuse"]
    with pytest.raises(NotFrozen, match="'frozen' after thawing"):
        agent.thaw()
    assert agent.thaw() == ""
    agent.close()


def test_stopped_while_freezing(fake: FakeAgent) -> None:
    readable, writable = os.pipe()
    agent = GuestAgent(fake.path, freeze_timeout_s=60)
    agent.prepare([readable])
    fake.faults[FREEZE] = ["lose"]
    threading.Timer(0.2, os.write, (writable, b"x")).start()
    with pytest.raises(NotFrozen, match="stopped"):
        agent.freeze([readable])
    assert agent.thaw() != ""
    assert fake.frozen == 0
    agent.close()
    os.close(readable)
    os.close(writable)


# ---- one client at a time


def test_our_own_processes_wait_for_each_other(fake: FakeAgent) -> None:
    one, other = client(fake), client(fake)
    one.prepare()
    one.freeze()

    def later() -> None:
        time.sleep(1.0)
        assert one.thaw() == ""
        one.close()

    done = threading.Thread(target=later)
    done.start()
    other.prepare()  # longer than the agent may take to answer
    assert other.freeze() == "2 file systems"
    assert other.thaw() == ""
    other.close()
    done.join()
    assert fake.calls.count(FREEZE) == 2


def test_a_name_that_somebody_squats_does_not_stop_us(
    fake: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backyfs.source.quiescing.agent.QUEUE_S", 0.2)
    squatter, agent = client(fake), client(fake)
    squatter._stand_in_line(())
    agent.prepare()
    agent.close()
    squatter.close()
