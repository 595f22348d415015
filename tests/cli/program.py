"""Runs the real program as a process and holds what it said against the rules for all commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = str(Path(sys.executable).with_name("backyfs"))
TIMEOUT_S = 60


@dataclass(frozen=True)
class Done:
    """How a run ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON value on stdout."""
        (line,) = self.out.splitlines()
        return json.loads(line)

    @property
    def json_lines(self) -> list[Any]:
        """The JSON value of each line on stdout."""
        return [json.loads(line) for line in self.out.splitlines()]


def environment(**more: str) -> Mapping[str, str]:
    return os.environ | {"TZ": "UTC", "LC_ALL": "C.UTF-8", "COLUMNS": "100", **more}


def backyfs(*arguments: str | Path, code: int | None = 0, **env: str) -> Done:
    """Run the program without a terminal; `code` is the exit code that is expected."""
    done = subprocess.run(
        [PROGRAM, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment(**env),
        check=False,
    )
    result = Done(done.returncode, done.stdout, done.stderr)
    assert code is None or result.code == code, f"{arguments}: {result}"
    assert "Traceback" not in result.err, result.err
    return result


def refused(*arguments: str | Path, code: int, **env: str) -> str:
    """Run something that must fail with `code`: one line and perhaps a hint. Returns the line."""
    result = backyfs(*arguments, code=code, **env)
    first, *more = result.err.rstrip("\n").split("\n")
    assert first.startswith("backyfs: "), result.err
    assert len(more) <= 1, result.err
    assert all(line.startswith("  ") for line in more), result.err
    assert result.out == ""
    return first.removeprefix("backyfs: ")
