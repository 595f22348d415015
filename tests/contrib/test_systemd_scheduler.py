"""The unit of the scheduler: systemd has nothing to say against it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.parts import require

UNIT = Path(__file__).parents[2] / "contrib/systemd/backyfs-scheduler.service"


def test_systemd_understands_it(tmp_path: Path) -> None:
    analyze = require("systemd-analyze", "verifies the unit")
    # The program must be where the unit says; here it is the one of this environment.
    program = Path(sys.executable).with_name("backyfs")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/usr/local/bin/backyfs", str(program)))
    done = subprocess.run(
        [analyze, "verify", "--man=no", "--recursive-errors=no", copy],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
