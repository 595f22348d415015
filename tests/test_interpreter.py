"""Modules run by themselves: nothing comes from the current directory, which may be anybody's."""

from __future__ import annotations

import subprocess
from pathlib import Path

from backyfs import interpreter

PACKAGE = Path(interpreter.__file__).parent


def test_the_current_directory_gives_no_modules(tmp_path: Path) -> None:
    for name in ("json", "logging", "backyfs"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not ours')\n")
    done = subprocess.run(
        [*interpreter.running("backyfs"), "--version"],
        cwd=tmp_path,
        env=interpreter.environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_there_is_one_way_to_run_a_module() -> None:
    others = PACKAGE.rglob("*.py")
    users = {path.name for path in others if "sys.executable" in path.read_text()}
    assert users == {"interpreter.py"}
