"""Completion in real shells: commands, options, VMs, revisions, tags."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Vm
from tests.cli.program import backyfs, environment, refused
from tests.parts import require

BIN = str(Path(sys.executable).parent)


def env() -> dict[str, str]:
    return {**environment(), "PATH": f"{BIN}:/usr/bin:/bin", "TERM": "dumb"}


def script(shell: str, directory: Path) -> Path:
    path = directory / f"backyfs.{shell}"
    path.write_text(backyfs("completion", shell).out)
    return path


def in_bash(path: Path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    bash = require("bash", "completes")
    quoted = " ".join(f"'{word}'" for word in words)
    program = (
        f"source {path}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; "
        "_backyfs_completion backyfs; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(
        [bash, "--norc", "-c", program], capture_output=True, text=True, env=env(), check=True
    )
    assert done.stderr == ""
    return [line for line in done.stdout.split("\n") if line]


def in_fish(path: Path, *words: str) -> list[str]:
    fish = require("fish", "completes")
    line = " ".join(words)
    done = subprocess.run(
        [fish, "--no-config", "-c", f"source {path}; complete -C '{line}'"],
        capture_output=True,
        text=True,
        env={**env(), "HOME": str(path.parent)},
        check=True,
    )
    return [line.split("\t")[0] for line in done.stdout.splitlines()]


def in_zsh(path: Path, line: str, expected: str) -> str:
    """What a person sees who types a line and TAB, until `expected` is on the screen."""
    zsh = require("zsh", "completes")
    setup = f"autoload -Uz compinit; compinit -u -D; source {path}; PS1="
    return typed([zsh, "-f", "-i"], path.parent, setup, line, expected)


def typed_in_bash(path: Path, line: str, expected: str) -> str:
    bash = require("bash", "completes")
    setup = f"source {path}; bind 'set enable-bracketed-paste off'; PS1="
    return typed([bash, "--norc", "-i"], path.parent, setup, line, expected)


def typed(shell: list[str], home: Path, setup: str, line: str, expected: str) -> str:
    """What is on the screen when a line and TAB were typed into an interactive shell."""
    process, terminal = pty.fork()
    if process == 0:
        os.execve(shell[0], shell, {**env(), "HOME": str(home)})
    seen = ""
    try:
        termios.tcsetwinsize(terminal, (24, 1000))  # or what does not fit into a line is moved
        os.write(terminal, f"{setup}; echo re''ady\n".encode())
        seen = _until(terminal, "ready\r\n", seen)
        os.write(terminal, f"{line}\t".encode())
        return _until(terminal, expected, "")
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)
        os.close(terminal)


def _until(terminal: int, expected: str, seen: str) -> str:
    deadline = time.monotonic() + 60
    while expected not in seen:
        ready, _, _ = select.select([terminal], [], [], deadline - time.monotonic())
        assert ready, seen
        seen += os.read(terminal, 4096).decode(errors="replace")
    return seen


SHELLS = {"bash": in_bash, "fish": in_fish}


@pytest.mark.parametrize("shell", SHELLS)
def test_what_is_offered(shell: str, vm: Vm, tmp_path: Path) -> None:
    path, offered = script(shell, tmp_path), SHELLS[shell]
    vms = vm.directory.parent
    assert {"status", "scrub", "simulate"} <= {
        w.rpartition(",")[2] for w in offered(path, "backyfs", "s")
    }
    options = offered(path, "backyfs", "restore", "--sal")
    assert any("--salvage" in word for word in options)
    assert offered(path, "backyfs", "-b", f"{vms}/w") == [str(vm.directory)]
    ids = offered(path, "backyfs", "-b", str(vm.directory), "restore", "-r", "20")
    assert sorted(ids) == sorted(vm.ids)
    specs = offered(path, "backyfs", "-b", str(vm.directory), "verify", "-r", "la")
    assert set(specs) == {"latest", "last-week", "last("}
    assert "daily" in offered(path, "backyfs", "-b", str(vm.directory), "backup", "d")
    assert "disk" in offered(path, "backyfs", "-b", str(vm.directory), "restore", "--disk", "d")
    assert offered(path, "backyfs", "help", "exit") == ["exit-codes"]
    assert offered(path, "backyfs", "-b", "/nonexistent/x", "restore", "-r", "20") == []


def test_bash_by_pieces_of_a_tag(vm: Vm, tmp_path: Path) -> None:
    found = in_bash(
        script("bash", tmp_path), "backyfs", "-b", str(vm.directory), "find", "-r", "tag"
    )
    assert "tag:daily" in found


def test_zsh(vm: Vm, tmp_path: Path) -> None:
    path = script("zsh", tmp_path)
    in_zsh(path, "backyfs usa", "usage")
    in_zsh(path, f"backyfs -b {vm.directory.parent}/w", "web01")
    in_zsh(path, f"backyfs -b {vm.directory} restore -r {vm.ids[-1][:-1]}", f"{vm.ids[-1]} ")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_words_with_colons(shell: str, vm: Vm, tmp_path: Path) -> None:
    """Bash takes the colon for the end of a word; who typed `tag:` goes on all the same."""
    path, type_in = script(shell, tmp_path), {"bash": typed_in_bash, "zsh": in_zsh}[shell]
    find = f"backyfs -b {vm.directory} find -r"
    type_in(path, f"{find} tag:da", "tag:daily ")
    type_in(path, f"{find} trust:d", "trust:distrusted ")
    type_in(path, f"{find} 'tag:we", "'tag:weekly' ")
    type_in(path, f"{find} tag:da\t-", "tag:daily -")
    type_in(path, f"backyfs --backup-dir={vm.directory.parent}/w", "web01 ")


def test_jobs(tmp_path: Path) -> None:
    config = tmp_path / "backy.conf"
    config.write_text("jobs: {web01: {source: {type: file, filename: /x}}}")
    path = script("bash", tmp_path)
    assert in_bash(path, "backyfs", "-c", str(config), "jobs", "w") == ["web01"]


def test_an_unknown_shell() -> None:
    assert "tcsh" in refused("completion", "tcsh", code=2)
