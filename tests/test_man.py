"""Manual pages: one per command with all its sections, and no formatter complains."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from backyfs.cli.commands import COMMANDS
from backyfs.cli.manual import EXAMPLES, EXIT_CODES, exit_codes
from tests.parts import require

ROOT = Path(__file__).parent.parent
PAGES = sorted(["backyfs.1", "backy.conf.5", *(f"backyfs-{name}.1" for name in COMMANDS)])
SECTIONS = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXAMPLES", "EXIT STATUS", "SEE ALSO"]


@pytest.fixture(scope="module")
def man(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, ROOT / "contrib/manpages.py", directory], check=True)
    return directory


def test_a_page_for_every_command(man: Path) -> None:
    assert sorted(path.name for path in man.iterdir()) == PAGES
    assert set(EXAMPLES) >= {"", *COMMANDS}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_all_sections_and_no_faults(name: str, man: Path) -> None:
    require("man", "renders the pages")
    done = subprocess.run(
        ["man", "--warnings", "--local-file", "--pager=cat", str(man / name)],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", "MANWIDTH": "100", "LC_ALL": "C.UTF-8"},
    )
    assert not done.stderr
    heads = [line for line in done.stdout.splitlines() if line and not line.startswith(" ")]
    wanted = [s for s in SECTIONS if s != "OPTIONS" or not name.endswith(".5")]
    assert [head for head in heads if head in wanted] == wanted


def test_mandoc_has_nothing_to_say(man: Path) -> None:
    mandoc = require("mandoc", "reads the pages as other systems do")
    done = subprocess.run(
        [mandoc, "-T", "lint", "-W", "warning", *sorted(man.iterdir())],
        capture_output=True,
        text=True,
        check=False,
    )
    # mandoc wants a date, groff takes none as a reason to print today's.
    said = [line for line in done.stdout.splitlines() if "missing date" not in line]
    assert said == []


def test_exit_codes() -> None:
    assert set(exit_codes("check")) == {0, 1, 2, 3}
    assert exit_codes("") == EXIT_CODES
    assert {0, 2, 13, 75} <= set(exit_codes("backup"))
    rows = (ROOT / "docs/cli.md").read_text()
    assert all(f"\n| {code} | " in rows for code in EXIT_CODES)


def test_installing(tmp_path: Path) -> None:
    subprocess.run(
        ["make", "-s", "install-docs", f"DESTDIR={tmp_path}", "PREFIX=/usr"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"MAKEFLAGS": ""},
    )
    share = tmp_path / "usr/share"
    assert (share / "man/man1/backyfs-check.1").is_file()
    assert (share / "man/man5/backy.conf.5").is_file()
    assert "_BACKYFS_COMPLETE" in (share / "zsh/site-functions/_backyfs").read_text()


def test_manual_pages_need_no_test_tools() -> None:
    """Whose services (Prometheus) would start on the backup host."""
    done = subprocess.run(
        ["make", "-n", "man"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert "contrib/setup.sh run\n" in done.stdout


def test_installing_in_a_fresh_clone_makes_the_environment_first(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    setup = tmp_path / "contrib/setup.sh"
    setup.parent.mkdir()
    setup.write_text("#!/bin/sh\necho setup $*; exit 3\n")
    setup.chmod(0o755)
    done = subprocess.run(
        ["make", "install-docs"], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "setup run" in done.stdout.splitlines()  # a make in a make says more
