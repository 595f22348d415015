"""What the program imports: each command pays only for what it uses."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Vm
from tests.cli.program import PROGRAM, environment

HEAVY = {"rich", "pydantic", "structlog", "pyfuse3", "yaml", "trio", "rbd", "importlib.metadata"}


def imported(*arguments: str | Path) -> set[str]:
    """Every module the program imports in a run."""
    code = "import sys; from backyfs.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


@pytest.mark.parametrize(
    "arguments",
    [
        ("--version",),
        ("--help",),
        ("status",),
        ("status", "--json"),
        ("restore", "/dev/null"),
        ("find",),
        ("forget", "-n", "-r", "first"),
        ("tags", "remove", "-n", "-r", "first", "daily"),
        ("gc", "-n"),
        ("completion", "bash"),
    ],
)
def test_nothing_heavy(arguments: tuple[str, ...], vm: Vm) -> None:
    assert not HEAVY & imported("-b", vm.directory, *arguments)


@pytest.mark.parametrize("arguments", [("backup",), ("verify",), ("scrub",)])
def test_a_backup_needs_trio_and_yaml_only(arguments: tuple[str, ...], vm: Vm) -> None:
    assert not (HEAVY - {"trio", "yaml"}) & imported("-b", vm.directory, *arguments)


OF_OTHERS = {
    "backyfs.store.cow",
    "backyfs.store.packs.gc",
    "backyfs.store.packs.fsck",
    "backyfs.engine.readback",
    "backyfs.engine.retention",
}


def test_a_backup_imports_nothing_of_other_commands(vm: Vm) -> None:
    assert not OF_OTHERS & imported("-b", vm.directory, "backup", "--no-verify")


def test_who_only_reads_imports_no_writer(vm: Vm) -> None:
    names = imported("-b", vm.directory, "restore", "/dev/null")
    assert not {*OF_OTHERS, "backyfs.store.packs.writer"} & names


@pytest.mark.parametrize("arguments", [("--version",), ("--help",)])
def test_the_overview_imports_no_command(arguments: tuple[str, ...]) -> None:
    names = imported(*arguments)
    assert not {"backyfs.cli.status", "backyfs.cli.backup", "backyfs.store"} & names


def test_an_interrupt_while_it_starts_is_quiet(vm: Vm) -> None:
    for milliseconds in range(0, 80, 4):
        process = subprocess.Popen(
            [PROGRAM, "-b", vm.directory, "status"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        # Before our first line runs, only the interpreter can answer.
        assert "backyfs/cli" not in err, err


def test_an_interrupt_waits_for_the_import_of_a_command() -> None:
    """In a callback of the import system Python would only tell of it, and go on."""
    program = """
import importlib, os, signal
import click
from backyfs.cli import main

load = importlib.import_module

def interrupted(name):
    os.kill(os.getpid(), signal.SIGINT)
    print(name, flush=True)
    return load(name)

importlib.import_module = interrupted
try:
    main.program.get_command(click.Context(main.program), "status")
except KeyboardInterrupt:
    print("interrupted")
"""
    command = [sys.executable, "-c", program]  # of one thread, as the program is then
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["backyfs.cli.status", "interrupted"]
