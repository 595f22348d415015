"""Dependencies: pinned with hashes, naming no registry, and each used by somebody."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = ["requirements-build.txt", "requirements.txt", "requirements-dev.txt"]
MODULES = {"prometheus-client": "prometheus_client", "pyyaml": "yaml"}


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9_.-]", text)[0].lower() for text in requirements}


def _pins(name: str) -> list[str]:
    """Each pin with its options, on one line."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_pins_have_hashes_and_name_no_registry(name: str) -> None:
    for pin in _pins(name):
        assert re.match(r"[a-z0-9-]+==[0-9][^ ]* ", pin), pin
        assert "--hash=sha256:" in pin, pin
        assert "://" not in pin
        assert "index" not in pin


def test_what_the_project_needs_is_pinned() -> None:
    pinned = _names(_pins("requirements.txt"))
    assert _names(PROJECT["dependencies"]) <= pinned
    assert pinned <= _names(_pins("requirements-dev.txt"))


def test_every_dependency_is_used() -> None:
    imported = set()
    for path in (ROOT / "backyfs").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    needed = {MODULES.get(name, name) for name in _names(PROJECT["dependencies"])}
    assert needed <= imported


def test_the_list_of_system_packages_is_sorted() -> None:
    sections = re.split(r"^\[.*\]$", (ROOT / "packages.apt").read_text(), flags=re.MULTILINE)[1:]
    assert len(sections) == 4
    for section in sections:
        assert section.split() == sorted(set(section.split()))


@pytest.mark.parametrize("path", sorted((ROOT / "contrib").glob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_programs_their_shell_can_parse(path: Path) -> None:
    shell = path.read_text().splitlines()[0].removeprefix("#!")
    assert path.stat().st_mode & 0o111
    subprocess.run([shell, "-n", path], check=True)
