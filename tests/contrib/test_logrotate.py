"""contrib/logrotate with the real logrotate: no line is lost, none goes on into the old file."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.parts import require

ROOT = Path(__file__).parent.parent.parent
WRITER = (
    "import logging, sys, pathlib, time; from backyfs import log\n"
    "base = pathlib.Path(sys.argv[1])\n"
    "log.configure(logfile=base / 'var/log/backy.log')\n"
    "with log.about('web01', base / 'srv/backy/web01'):\n"
    "    for n in range(int(sys.argv[2])):\n"
    "        logging.getLogger('backyfs').info('line %d', n); time.sleep(0.001)\n"
)
LINES = 600


def rotate(config: Path, state: Path) -> None:
    logrotate = require("logrotate", "moves the logs")
    done = subprocess.run(
        [logrotate, "--force", "--state", state, config],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_rotation_while_somebody_logs(tmp_path: Path) -> None:
    require("logrotate", "moves the logs")
    for name in ("var/log", "srv/backy/web01"):
        (tmp_path / name).mkdir(parents=True)
    config = tmp_path / "backyfs"
    text = (ROOT / "contrib/logrotate/backyfs").read_text()
    text = text.replace("/var/", f"{tmp_path}/var/").replace("/srv/", f"{tmp_path}/srv/")
    config.write_text(text)
    config.chmod(0o644)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(LINES)])
    logs = [tmp_path / "var/log/backy.log", tmp_path / "srv/backy/web01/backy.log"]
    while not all(log.exists() for log in logs):
        time.sleep(0.01)
    rotate(config, tmp_path / "state")
    assert writer.wait() == 0
    for log in logs:
        old = log.with_name("backy.log.1").read_text().splitlines()
        new = log.read_text().splitlines()
        assert old
        assert new
        assert [line.split()[-1] for line in old + new] == [str(n) for n in range(LINES)]
    rotate(config, tmp_path / "state")
    assert (tmp_path / "var/log/backy.log.2.gz").exists()
    assert not logs[0].exists(), "the next line makes it"
