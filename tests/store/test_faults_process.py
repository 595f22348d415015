"""The real program, killed and failed at real system calls by strace.

The tests beside this one walk through every operation in process; this one shows that nothing
between the program and the kernel goes past them.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backyfs.model import FRAME
from backyfs.store.repository import Repository
from tests.cli.program import PROGRAM, backyfs, environment
from tests.parts import require
from tests.store import faults
from tests.store.faults import Contents, History


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    """A VM made by the program, with three revisions, and its image changed since."""
    with faults.scratch(tmp_path) as directory:
        image = directory / "disk.img"
        content = faults.frames(*range(1, 41)) + b"the end"
        image.write_bytes(content)
        path = directory / "vm"
        backyfs("-b", path, "init", "file", image)
        history = History(path)
        for seed in range(3):
            content = faults.patched(content, seed, seed)
            image.write_bytes(content)
            backyfs("-b", path, "backup", "manual:x")
            newest = Repository.open(path).revisions()[-1].id
            history.contents[newest] = {"disk": content}
        content = content[: 4 * FRAME] + faults.frames(*range(60, 90)) + content[34 * FRAME :]
        image.write_bytes(content)
        yield history


def now(history: History) -> dict[str, bytes]:
    """What a backup made now would hold."""
    return {"disk": history.path.with_name("disk.img").read_bytes()}


def traced(history: History, inject: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run the program under strace with a fault injected: CALL:FAULT[@NAME], on NAME only."""
    fault, _, name = inject.partition("@")
    only = ["-P", str((history.path / name).resolve())] if name else []
    call = fault.partition(":")[0]
    return subprocess.run(
        [
            *[require("strace"), "-f", "-qq", "-o", os.devnull, *only],
            *["-e", f"trace={call}", "-e", f"inject={fault}"],
            *[PROGRAM, "-b", str(history.path), *command],
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        check=False,
    )


def but_the_log(path: Path) -> dict[str, bytes]:
    """The repository's files, without what the program says of itself."""
    found = faults.listing(path)
    del found["backy.log"]
    return found


def survived(history: History, new: dict[str, bytes]) -> set[str]:
    """The store is sound, old revisions read, new ones are complete; work goes on.

    Returns the new ids.
    """
    repository = Repository.open(history.path)
    listed = {record.id for record in repository.revisions()}
    possible: Contents = dict.fromkeys(listed - history.contents.keys(), new)
    faults.check(history.path, history.contents, possible)
    backyfs("-b", history.path, "backup", "manual:y")
    backyfs("-b", history.path, "gc")
    after = {record.id for record in repository.revisions()} - listed
    assert len(after) == 1
    faults.check(history.path, history.contents, {**possible, after.pop(): new})
    assert faults.strays(history.path) == []
    return set(possible)


KILLS = [
    "ftruncate:signal=SIGKILL:when=1@lock",
    "pwrite64:signal=SIGKILL:when=1@lock",
    "fdatasync:signal=SIGKILL:when=1@lock",
    "fsync:signal=SIGKILL:when=1@packs",
    "fsync:signal=SIGKILL:when=1@revisions",
    "rename:signal=SIGKILL:when=1",
]


@pytest.mark.parametrize("inject", KILLS)
def test_killed_at_a_system_call(history: History, inject: str) -> None:
    done = traced(history, inject, "backup", "manual:z")
    assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    survived(history, now(history))


FAILURES = {
    "flock:error=EIO@lock": 1,
    "ftruncate:error=EROFS:when=1@lock": 1,
    "pwrite64:error=ENOSPC@lock": 14,
    "pwrite64:error=EDQUOT@lock": 14,
    "fdatasync:error=EIO@lock": 1,
    "fsync:error=EIO@packs": 1,
    "fsync:error=EIO:when=1@revisions": 1,
    "rename:error=EIO:when=1": 1,
    "rename:error=ENOSPC": 14,
    "fsync:error=EIO:when=1@../disk.img": 13,
}


@pytest.mark.parametrize("inject", FAILURES)
def test_a_failing_system_call(history: History, inject: str) -> None:
    before = but_the_log(history.path)
    done = traced(history, inject, "backup", "manual:z")
    assert "Traceback" not in done.stderr
    assert done.returncode == FAILURES[inject], done.stderr
    line, *hint = done.stderr.splitlines()
    assert line.startswith("backyfs: ")
    assert len(hint) <= 1
    assert but_the_log(history.path) == before
    assert survived(history, now(history)) == set()


@pytest.mark.parametrize(
    ("fault", "files", "command"),
    [
        ("read:error=EIO", "usage/*.jsonl", "usage"),
        ("newfstatat:error=EACCES", "revisions/*.map", "status"),
        ("newfstatat:error=EACCES", "repository.json", "status"),
    ],
)
def test_an_error_names_its_file(history: History, fault: str, files: str, command: str) -> None:
    path = max(history.path.glob(files))
    done = traced(history, f"{fault}@{path.relative_to(history.path)}", command)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"backyfs: {path}: ")


def newest_record(history: History) -> str:
    return f"revisions/{Repository.open(history.path).revisions()[-1].id}.json"


# An error that passes (a busy NFS server): one look at the records differs from the next.


@pytest.mark.parametrize("look", range(1, 9))
def test_gc_frees_nothing_while_a_record_cannot_be_looked_at(history: History, look: int) -> None:
    fault = f"newfstatat:error=EIO:when={look}@{newest_record(history)}"
    done = traced(history, fault, "gc")
    assert done.returncode in (0, 12), done.stderr
    assert survived(history, now(history)) == set()


@pytest.mark.parametrize("look", [1, 2, 3, 4])
def test_a_change_list_is_of_the_newest_revision_alone(history: History, look: int) -> None:
    (newest,) = list(history.contents.values())[-1].values()
    history.path.with_name("disk.img").write_bytes(newest)
    nothing = history.path.with_name("changes.json")
    nothing.write_text("[]")
    fault = f"newfstatat:error=EIO:when={look}@{newest_record(history)}"
    command = ("backup", "--no-verify", "--changes", str(nothing), "manual:z")
    done = traced(history, fault, *command)
    assert done.returncode == 0, done.stderr
    survived(history, now(history))


def test_a_copy_says_what_it_did_not_see(history: History) -> None:
    fault = f"read:error=EIO:when=1@{newest_record(history)}"
    target = history.path.with_name("copy")
    done = traced(history, fault, "copy", str(history.path), str(target))
    assert len(Repository.open(target).revisions()) == 2
    assert done.returncode == 12, done.stderr
    assert "1 of 3 revisions are not in the copy" in done.stderr


def test_a_selection_says_what_it_did_not_see(history: History) -> None:
    done = traced(history, f"read:error=EIO:when=1@{newest_record(history)}", "find", "-r", "all")
    assert len(done.stdout.splitlines()) == 3 or "left out" in done.stderr


@pytest.mark.parametrize("command", ["restore", "backup"])
def test_a_map_that_may_not_be_opened(history: History, command: str) -> None:
    name = next(iter(Repository.open(history.path).revisions()[-1].disks["disk"].files))
    target = str(history.path.with_name("out.img"))
    arguments = ("restore", "-r", "latest", target) if command == "restore" else ("backup",)
    done = traced(history, f"openat:error=EACCES@revisions/{name}", *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == f"backyfs: {history.path}/revisions/{name}: Permission denied"
    assert survived(history, now(history)) == set()


def test_killed_at_any_moment(history: History) -> None:
    rng = random.Random(1)
    started = time.monotonic()
    backyfs("-b", history.path, "backup", "manual:z")
    history.contents[Repository.open(history.path).revisions()[-1].id] = now(history)
    usual = time.monotonic() - started
    for number in range(6):
        copy = history.copy(history.path.with_name(f"copy{number}"))
        image = copy.path.with_name("disk.img")
        image.write_bytes(faults.patched(image.read_bytes(), number, number))
        running = subprocess.Popen(
            [PROGRAM, "-b", str(copy.path), "backup", "manual:z"], env=environment()
        )
        time.sleep(usual * rng.uniform(0.3, 1.0))
        running.kill()
        running.wait()
        survived(copy, now(copy))
        shutil.rmtree(copy.path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(history: History, number: signal.Signals) -> None:
    """Ends in order: one line, nothing left behind."""
    before = but_the_log(history.path)
    said, says = os.pipe()
    running = subprocess.Popen(
        [
            *[require("strace"), "-f", "-qq", "-o", f"/dev/fd/{says}", "-e", "trace=fdatasync"],
            *["-e", "inject=fdatasync:delay_enter=1000000:when=1"],
            *[PROGRAM, "-b", str(history.path), "backup", "manual:z"],
        ],
        env=environment(),
        pass_fds=[says],
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(says)
    line = os.read(said, 100)  # the intent is being written
    os.kill(int(line.split()[0]), number)
    _, errors = running.communicate(timeout=60)
    os.close(said)
    assert "Traceback" not in errors
    assert running.returncode in (128 + number, -number), errors
    assert but_the_log(history.path) == before
    survived(history, now(history))
