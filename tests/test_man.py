"""Manual pages: one per command, and roff has nothing to say against them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from backyfs.cli.main import COMMANDS
from tests.parts import require

ROOT = Path(__file__).parent.parent


def test_a_page_for_every_command(tmp_path: Path) -> None:
    require("man", "renders the pages")
    subprocess.run([sys.executable, ROOT / "contrib/manpages.py", tmp_path], check=True)
    pages = sorted(tmp_path.iterdir())
    assert [page.name for page in pages] == sorted(
        ["backyfs.1", *(f"backyfs-{name}.1" for name in COMMANDS)]
    )
    for page in pages:
        done = subprocess.run(
            ["man", "--warnings", "--local-file", "--pager=cat", str(page)],
            capture_output=True,
            text=True,
            check=True,
            env={"PATH": "/usr/bin:/bin", "MANWIDTH": "100", "LC_ALL": "C.UTF-8"},
        )
        assert not done.stderr, f"{page.name}: {done.stderr}"
        assert "SYNOPSIS" in done.stdout
