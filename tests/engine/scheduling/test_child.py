"""Programs that the scheduler runs: what they say, and how they end, or do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from backyfs.engine.scheduling import child
from tests.engine.scheduling.daemons import eventually
from tests.filesystems import MIB, mounted, run
from tests.parts import require


async def test_what_they_say() -> None:
    said = await child.finished(
        ["sh", "-c", "cat >&2; echo 'backyfs: no room' >&2; exit 14"], b"x\n"
    )
    assert (said.code, said.reason) == (14, "no room")
    assert await child.output(["sh", "-c", "echo told; exit 3"]) == b"told\n"
    with pytest.raises(FileNotFoundError):
        await child.finished(["/nowhere/program"])


async def test_what_one_left_behind_is_not_waited_for(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with trio.fail_after(60):
        said = await child.finished(["sh", "-c", f"sleep 1000 & echo $! > {pid}; echo last >&2"])
    assert said.reason == "last"
    os.kill(int(pid.read_text()), signal.SIGTERM)


async def test_one_that_ignores_sigterm_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(child, "GRACE_S", 0.2)
    pid = tmp_path / "pid"
    script = f"trap '' TERM; echo $$ > {pid}.new; mv {pid}.new {pid}; while :; do sleep 0.1; done"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.finished, ["sh", "-c", script])
        await trio.to_thread.run_sync(eventually, pid.exists)
        nursery.cancel_scope.cancel()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


_STOPS = """
import logging, sys, trio
from backyfs.engine.scheduling import child

async def main():
    with trio.move_on_after(1):
        await child.finished(["touch", sys.argv[1]])

child.GRACE_S = child.LEAVE_S = 0.2
logging.basicConfig()
trio.run(main)
"""


def test_one_that_cannot_be_killed_keeps_nobody_from_ending(tmp_path: Path) -> None:
    """As one that waits for a disk that does not answer; here, for a frozen file system."""
    require("fsfreeze", "has a process wait that no signal reaches")
    with mounted("ext4", tmp_path, 16 * MIB) as disk:
        run("fsfreeze", "--freeze", disk)
        try:
            done = subprocess.run(
                [sys.executable, "-c", _STOPS, disk / "file"],
                stderr=subprocess.PIPE,
                text=True,
                check=True,
                timeout=60,
            )
        finally:
            run("fsfreeze", "--unfreeze", disk)
    assert "cannot be killed" in done.stderr
