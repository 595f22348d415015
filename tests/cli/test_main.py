"""The program as a whole: help, misuse, signals, pipes, JSON errors."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backyfs import __version__
from backyfs.cli.commands import COMMANDS
from backyfs.cli.failure import Failure, Interrupted, explain
from backyfs.errors import BackyfsError, Busy, NoSpace
from backyfs.model import FRAME
from tests import images
from tests.cli.conftest import Vm
from tests.cli.program import PROGRAM, TIMEOUT_S, backyfs, environment, refused
from tests.parts import require
from tests.reader.stores import add_revision, content, make_vm

MIB = 1024 * 1024


def test_version() -> None:
    assert backyfs("--version").out == f"backyfs {__version__}\n"


def test_the_overview_names_every_command() -> None:
    out = backyfs("--help").out
    for name, text in COMMANDS.items():
        assert f"\n  {name} " in out
        assert text in out
    assert backyfs("help").out.split("Options:")[1] == out.split("Options:")[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    help_text = backyfs(name, "--help").out
    assert help_text.startswith(f"Usage: backyfs {name} ")
    assert backyfs("help", name).out == help_text


def test_no_command_shows_the_overview() -> None:
    result = backyfs(code=2)
    assert result.out == ""
    assert "Commands:" in result.err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["-r", "/srv/backy", "status"], "did you mean -b/--backup-dir?"),
        (["--repo=/srv/backy", "status"], "did you mean -b/--backup-dir?"),
        (["snapshots"], "did you mean: backyfs status"),
        (["log"], "did you mean: backyfs status"),
        (["prune"], "did you mean: backyfs purge"),
        (["compact"], "did you mean: backyfs gc"),
        (["delete", "x"], "did you mean: backyfs forget"),
        (["extract"], "did you mean: backyfs restore"),
        (["protect"], "did you mean: backyfs tags add"),
        (["resotre"], "did you mean: backyfs restore"),
        (["unlock"], "nothing to unlock"),
        (["help", "stats"], "did you mean: backyfs usage"),
        (["nonsense"], "backyfs --help"),
        (["status", "--jsn"], "--json"),
        (["restore"], "backyfs restore --help"),
        (["backup", "--wait", "-1"], "backyfs backup --help"),
        (["find", "etc/passwd"], "backyfs find -r"),
    ],
)
def test_misuse_gets_a_hint(arguments: list[str], hint: str) -> None:
    refused(*arguments, code=2)
    assert hint in backyfs(*arguments, code=2).err


def test_a_current_directory_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && exec {PROGRAM} status"
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "backyfs: the current directory is gone\n" in done.stderr


def test_one_form_of_output(vm: Vm) -> None:
    for command in (["status", "--yaml"], ["usage", "--csv"]):
        done = backyfs("-b", vm.directory, *command, "--json", code=2)
        assert done.out == ""
        assert "exclude each other" in json.loads(done.err)["message"]


def test_other_names_of_commands(vm: Vm) -> None:
    assert backyfs("-b", vm.directory, "list").out == backyfs("-b", vm.directory, "status").out
    assert backyfs("tag", "--help").out.startswith("Usage: backyfs tag")


def test_the_directory_from_the_environment(vm: Vm) -> None:
    assert "web01" in backyfs("status", "--json", BACKYFS_BACKUP_DIR=str(vm.directory)).out


def test_errors_as_json(vm: Vm) -> None:
    result = backyfs("-b", vm.directory, "find", "-r", "nope", "--json", code=11)
    assert result.out == ""
    error = json.loads(result.err)
    assert error == {
        "message_type": "exit_error",
        "code": 11,
        "message": "no revision 'nope', and no tag of that name",
        "hint": "see them with: backyfs status",
    }
    assert json.loads(backyfs("statsu", "--json", code=2).err)["code"] == 2


def test_topics() -> None:
    assert "75  busy" in backyfs("help", "exit-codes").out
    assert "tag:NAME" in backyfs("help", "spec").out
    assert "nothing to unlock" in backyfs("help", "unlock").out


def test_more_packs_than_a_shell_allows_open_files(tmp_path: Path) -> None:
    """`ulimit -n` says how many a command begins with, not how many it may have."""
    data = bytearray(content(90, seed=1))
    vm = make_vm(tmp_path, "vm", bytes(data))
    for frame in range(90):
        data[frame * FRAME : frame * FRAME + 8] = b"changed!"
        add_revision(vm, bytes(data))
    few = ["sh", "-c", 'ulimit -Sn 64; exec "$0" "$@"', str(PROGRAM), "-b", str(vm.path)]
    for words in ("status", f"restore -r latest {tmp_path}/out", "gc"):
        argv = [*few, *words.split()]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert (done.returncode, done.stderr) == (0, ""), words
    assert (tmp_path / "out").read_bytes() == data


def test_doctor(tmp_path: Path) -> None:
    out = backyfs("-b", tmp_path, "doctor").out
    for name in ("backyfs", "directory", "reflink", "fuse", "loop", "rbd", "open files"):
        assert f"  {name} " in out
    found = backyfs("-b", tmp_path / "missing", "doctor", "--json", code=1).json
    assert [item["name"] for item in found if item["state"] == "missing"] == ["directory"]
    assert all(item["remedy"] for item in found if item["state"] == "missing")


def test_doctor_where_a_mountpoint_has_another_charset(tmp_path: Path) -> None:
    require("root", "mounts a file system")
    point = tmp_path / os.fsdecode("ü\\ ".encode() + b"\xe9")
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", point], check=True)
    try:
        found = {item["name"]: item for item in backyfs("-b", point, "doctor", "--json").json}
    finally:
        subprocess.run(["umount", point], check=True)
    assert "tmpfs" in found["directory"]["text"]


# ---- completion --------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    script = backyfs("completion", shell).out
    assert "_BACKYFS_COMPLETE" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_completion_knows_commands_and_revisions(vm: Vm) -> None:
    def completed(words: str, count: int) -> list[str]:
        out = backyfs(
            _BACKYFS_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=str(count)
        ).out
        return [line.partition(",")[2] for line in out.splitlines()]

    assert completed("backyfs ver", 1) == ["verify"]
    words = f"backyfs -b {vm.directory} restore -r 20"
    assert completed(words, 5) == sorted(vm.ids, reverse=True)
    assert completed("backyfs --backup", 1) == ["--backup-dir"]
    assert completed("backyfs ", 1) == list(COMMANDS)


# ---- pipes and signals -------------------------------------------------------------------------


def test_a_reader_that_goes_away_is_no_noise(vm: Vm) -> None:
    for arguments in (["restore", "-"], ["status"], ["find", "-r", "all"]):
        read_end, write_end = os.pipe()
        os.close(read_end)
        done = subprocess.run(
            [PROGRAM, "-q", "-b", vm.directory, *arguments],
            stdout=write_end,
            stderr=subprocess.PIPE,
            timeout=TIMEOUT_S,
            check=False,
        )
        os.close(write_end)
        assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("verify 0<&-", 0),
        ("backup 0<&- 2>&-", 0),
        ("forget -r first 0<&-", 2),
        ("verify 2>&-", 0),
        ("restore -r nope - 2>&-", 11),
        ("restore - >&-", 1),
        ("status >&-", 1),
        ("status --json 0<&- >&- 2>&-", 1),
        ("--help >&-", 1),
        ("-c none check >&-", 3),
    ],
)
def test_closed_standard_streams(vm: Vm, command: str, code: int) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f"{PROGRAM} -b {vm.directory} {command}"], capture_output=True, text=True
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert ("Bad file descriptor" in done.stderr) == (">&-" in command and "2>&-" not in command)
    backyfs("-b", vm.directory, "verify")


LOCALES = ("utf-8:strict", "latin-1:strict", "ascii:strict")


@pytest.mark.parametrize("encoding", LOCALES)
def test_letters_that_the_locale_has_not(vm: Vm, tmp_path: Path, encoding: str) -> None:
    """Names that are no text, and letters that cannot be printed, make no error."""
    for command in ("help spec", "doctor"):
        done = raw(encoding, "-b", vm.directory, *command.split())
        assert b"Traceback" not in done.stderr
        assert done.stdout
    target = os.fsencode(tmp_path) + b"/\xff\xc3\xbc.img"
    done = raw(encoding, "-b", vm.directory, "restore", "--json", target)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["target"] == os.fsdecode(target)
    done = raw(encoding, "-b", vm.directory, "restore", target, "--json")
    assert done.returncode == 2
    assert os.fsdecode(target) in json.loads(done.stderr)["message"]


def test_a_path_is_printed_as_it_is(vm: Vm) -> None:
    odd = os.fsencode(vm.directory.parent) + b"/\xff"
    os.rename(vm.directory, odd)
    found = raw("utf-8:strict", "-b", odd, "find").stdout.rstrip(b"\n")
    assert found.startswith(odd)
    assert os.path.exists(found)


def raw(encoding: str, *arguments: bytes | str | Path) -> subprocess.CompletedProcess[bytes]:
    """Run the program with standard streams of this encoding."""
    return subprocess.run(
        [PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=TIMEOUT_S,
        env=environment(PYTHONIOENCODING=encoding),
        check=False,
    )


def on_full(directory: Path, *arguments: str) -> tuple[int, str]:
    """Run the program with a stdout that is full; its exit code and what it said on stderr."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [PROGRAM, "-b", directory, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "status",
        "status --help",
        "--version",
        "find -r all",
        "usage --csv",
        "verify",
        "backup manual:x",
        "completion bash",
    ],
)
def test_a_full_stdout_is_named(vm: Vm, command: str) -> None:
    said = "cannot write to standard output: No space left on device"
    assert on_full(vm.directory, *command.split()) == (1, f"backyfs: {said}\n")
    if "backup" in command:
        assert len(vm.ids) == 4


def test_a_full_stdout_as_json(vm: Vm) -> None:
    code, err = on_full(vm.directory, "status", "--json")
    assert (code, json.loads(err)["code"]) == (1, 1)


@pytest.mark.parametrize(
    ("command", "code"),
    [("restore -", 0), ("export-diff 1 0", 0), ("restore nowhere/disk.img", 1), ("check", 3)],
)
def test_a_full_stderr_changes_no_code(vm: Vm, tmp_path: Path, command: str, code: int) -> None:
    line = f"{PROGRAM} -c none -b {vm.directory} {command} 2>/dev/full >{tmp_path}/out"
    done = subprocess.run(["/bin/sh", "-c", line], timeout=TIMEOUT_S, check=False)
    assert done.returncode == code


def test_a_reader_of_stderr_that_goes_away_changes_nothing(vm: Vm, tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with (tmp_path / "disk.img").open("wb") as out:
        done = subprocess.run(
            [PROGRAM, "-b", vm.directory, "restore", "-"],
            stdout=out,
            stderr=write_end,
            timeout=TIMEOUT_S,
            check=False,
        )
    os.close(write_end)
    assert done.returncode == 0


def test_a_full_target_of_a_restore_is_no_space_wherever_it_is(vm: Vm) -> None:
    code, err = on_full(vm.directory, "restore", "-")
    assert code == 14
    assert err.startswith("backyfs: no space left while restoring to stdout\n")


def interrupted(command: list[str | Path], directory: Path, pattern: str, number: int) -> str:
    """Send a signal once a file of this pattern is in the directory; what was said on stderr.

    A run may be over before the signal comes; then another one is started.
    """
    for _ in range(40):
        process = subprocess.Popen([PROGRAM, *command], stderr=subprocess.PIPE, text=True)
        while not list(directory.glob(pattern)) and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(number)
        _, err = process.communicate(timeout=TIMEOUT_S)
        if process.returncode:
            assert process.returncode == 128 + number, err
            return err
        (directory / "disk.img").unlink(missing_ok=True)
    raise AssertionError("it was always over before it could be interrupted")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_backup_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    image = images.random_image(tmp_path / "big.img", 192 * MIB)
    directory = tmp_path / "vm"
    backyfs("-b", directory, "init", "file", image, "--store", "packs")
    err = interrupted(["-b", directory, "backup"], directory / "packs", "*.tmp", number)
    assert err == f"backyfs: stopped by {number.name}\n"
    left = backyfs("-b", directory, "status", "--json").json["revisions"]
    files = [path for name in ("packs", "revisions") for path in (directory / name).iterdir()]
    assert all(any(path.name.startswith(r["id"]) for r in left) for path in files)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_restore_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    image = images.random_image(tmp_path / "big.img", 192 * MIB)
    directory, out = tmp_path / "vm", tmp_path / "out"
    out.mkdir()
    backyfs("-b", directory, "init", "file", image, "--store", "packs")
    backyfs("-b", directory, "backup", "--no-verify")
    command: list[str | Path] = ["-b", directory, "restore", out / "disk.img"]
    err = interrupted(command, out, ".disk.img.*.partial", number)
    assert err == f"backyfs: stopped by {number.name}\n"
    assert not list(out.glob(".*"))


_DROPPED = """
import os, signal, sys
from backyfs.cli import main, session

class Forgotten:
    def __del__(self):  # what is raised in here is dropped
        os.kill(os.getpid(), signal.Signals[sys.argv[1]])

def repository(*arguments, went_on=session.Session.repository):
    Forgotten()
    return went_on(*arguments)

session.Session.repository = repository
sys.exit(main.main(sys.argv[2:]))
"""


_TWICE = """
import os, signal, sys
from backyfs.cli import failure, main

def report(*arguments, went_on=failure.explain):
    os.kill(os.getpid(), signal.Signals[sys.argv.pop()])
    return went_on(*arguments)

failure.explain = report
main.main(["-b", "/nowhere", "status"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_it_says_why_it_ended(number: signal.Signals) -> None:
    command = [sys.executable, "-c", _TWICE, number.name]
    run = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT_S)
    assert (run.returncode, run.stderr) == (-number, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("arguments", [["backup"], ["forget", "-y", "-r", "latest"]])
def test_a_signal_that_python_drops_ends_the_run_all_the_same(
    arguments: list[str], number: signal.Signals, vm: Vm
) -> None:
    before = backyfs("-b", vm.directory, "status", "--json").json["revisions"]
    run = subprocess.run(
        [sys.executable, "-c", _DROPPED, number.name, "-b", vm.directory, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert (run.returncode, run.stderr) == (128 + number, f"backyfs: stopped by {number.name}\n")
    assert backyfs("-b", vm.directory, "status", "--json").json["revisions"] == before


def test_what_nohup_started_outlives_its_terminal(vm: Vm, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command: list[str | Path] = ["nohup", PROGRAM, "-b", vm.directory, "restore", pipe]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        with pipe.open("rb") as stream:
            begin = stream.read(10)
            process.send_signal(signal.SIGHUP)
            assert begin + stream.read() == vm.image.read_bytes()
        assert process.wait(timeout=TIMEOUT_S) == 0


def test_a_signal_ends_a_restore_whose_reader_sleeps(vm: Vm) -> None:
    process = subprocess.Popen(
        [PROGRAM, "-b", vm.directory, "restore", "-"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(10)
    time.sleep(0.2)
    process.terminate()
    assert process.wait(timeout=TIMEOUT_S) == 143
    process.communicate()


# ---- a terminal --------------------------------------------------------------------------------


def on_terminal(*arguments: str | Path, answer: str) -> tuple[int, str]:
    """Run the program on a terminal and type `answer`; its exit code and all it showed."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [PROGRAM, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(TERM="xterm"),
    )
    os.close(theirs)
    os.write(ours, answer.encode())
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # EIO: the program has gone
            break
        shown += piece
    os.close(ours)
    return process.wait(timeout=TIMEOUT_S), shown.decode()


def test_forget_asks_on_a_terminal(vm: Vm) -> None:
    first, second, _ = ids = vm.ids
    code, shown = on_terminal("-b", vm.directory, "forget", "-r", "first,1", answer="n\n")
    assert code == 1
    assert first in shown
    assert second in shown
    assert "Remove 2 revisions of web01 for good?" in shown
    assert "nothing was changed" in shown
    assert vm.ids == ids
    assert on_terminal("-b", vm.directory, "forget", "-r", "first,1", answer="y\n")[0] == 0
    assert vm.ids == ids[2:]


def test_restore_asks_before_it_overwrites(vm: Vm, tmp_path: Path) -> None:
    target = tmp_path / "old.img"
    target.write_bytes(b"precious")
    arguments = ("-b", vm.directory, "restore", target)
    code, shown = on_terminal(*arguments, answer="n\n")
    assert (code, target.read_bytes()) == (1, b"precious")
    assert f"Overwrite {target}" in shown.replace("\r\n", "")
    assert on_terminal(*arguments, answer="y\n")[0] == 0
    assert target.read_bytes() == vm.contents[-1]


def test_a_bar_on_a_terminal_only(vm: Vm) -> None:
    code, shown = on_terminal("-b", vm.directory, "backup", answer="")
    assert code == 0
    assert "backing up" in shown
    assert "backing up" not in backyfs("-b", vm.directory, "backup").err
    code, shown = on_terminal("-q", "-b", vm.directory, "backup", answer="")
    assert (code, shown) == (0, "")


# ---- errors out of nurseries -------------------------------------------------------------------


def test_the_error_in_a_group_is_found() -> None:
    group = ExceptionGroup("", [ExceptionGroup("", [OSError(5, "x"), Busy("busy", hint="wait")])])
    assert explain(group) == Failure(75, "busy", "wait")
    assert explain(BaseExceptionGroup("", [Interrupted(15), NoSpace("full")])) == Failure(
        143, "stopped by SIGTERM"
    )
    assert explain(ExceptionGroup("", [BackyfsError("expected"), ZeroDivisionError()])) is None
    assert explain(OSError(28, "No space left on device", "/srv/x")) == Failure(
        14, "/srv/x: No space left on device"
    )


def test_a_bug_is_reported_as_one(vm: Vm) -> None:
    code = (
        "import sys; import backyfs.cli.status as s; from backyfs.cli.main import main\n"
        "s._show_vm = lambda *_: 1 / 0; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [Path(PROGRAM).with_name("python"), "-c", code, "-b", vm.directory, "status"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "a bug: ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted(signal.SIGTERM)])
def test_a_signal_while_a_class_is_made_is_no_bug(error: BaseException) -> None:
    """Python 3.11 makes another error of it."""

    class Interrupting:
        def __set_name__(self, owner: type, name: str) -> None:
            raise error

    with pytest.raises(BaseException) as caught:  # noqa: PT011 - which one, Python decides
        type("Made", (), {"field": Interrupting()})
    assert explain(caught.value) == explain(error)
    assert explain(error) is not None
    assert explain(RuntimeError("of ours")) is None


def test_an_error_raised_from_itself_has_an_end() -> None:
    error = PermissionError(13, "Permission denied", "/srv/x")
    error.__cause__ = error
    assert explain(error) == Failure(1, "/srv/x: Permission denied")
