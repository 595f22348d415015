"""Imports point only along the flow of data; this table is the one of docs/design.md."""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import backyfs

ROOT = Path(backyfs.__file__).parent

BASE = "base"
ALLOWED: dict[str, set[str]] = {
    BASE: set(),
    "source": {BASE},
    "store": {BASE},
    "engine": {"source", "store", BASE},
    "reader": {"store", BASE},
    "hanging": {BASE},
    "mount": {"hanging", "reader", "store", BASE},
    "nbd": {"hanging", "reader", "store", BASE},
    "restore": {"reader", "store", BASE},
    "testing": {"source", BASE},
}
EVERYTHING = {"cli", "__main__"}
BASE_MODULES = {
    "allocator",
    "cancelling",
    "ceph",
    "descriptors",
    "errors",
    "extents",
    "interpreter",
    "model",
    "config",
    "log",
    "notify",
    "partition",
    "signals",
}

# No trio below the engine's and the adapters' level: the waists are synchronous.
WITHOUT_TRIO = {BASE, "source", "store", "reader", "testing"}


def _modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def _layer(parts: tuple[str, ...]) -> str:
    """The layer of a module, given the parts of its name below `backyfs`."""
    first = parts[0] if parts else "__init__"
    return BASE if first in BASE_MODULES or first == "__init__" else first


def _layer_of_file(path: Path) -> str:
    return _layer(path.relative_to(ROOT).with_suffix("").parts)


@functools.cache
def _imported(path: Path) -> tuple[str, ...]:
    """Full names of all modules a file imports, wherever in it."""
    return tuple(_imports_of(ast.parse(path.read_text())))


def _imports_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide layers"
            # `from backyfs import model` names a module; `from backyfs.model import FRAME` a value
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in _files() else node.module or ""


@functools.cache
def _files() -> dict[str, Path]:
    """The modules of backyfs by full name."""
    names = {path: path.relative_to(ROOT.parent).with_suffix("").parts for path in _modules()}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in names.items()}


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path: Path) -> None:
    layer = _layer_of_file(path)
    if layer in EVERYTHING:
        return
    assert layer in ALLOWED, f"{path} belongs to no layer of the table"
    for name in _imported(path):
        parts = name.split(".")
        if parts[0] == "backyfs":
            target = _layer(tuple(parts[1:]))
            assert target == layer or target in ALLOWED[layer], f"{layer} must not import {name}"


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_waists_know_no_trio(path: Path) -> None:
    if _layer_of_file(path) in WITHOUT_TRIO:
        assert not {"trio", "pyfuse3"} & {name.split(".")[0] for name in _imported(path)}


def test_the_program_needs_no_tests() -> None:
    for path in _modules():
        if _layer_of_file(path) != "testing":
            assert not any(
                name.startswith(("backyfs.testing", "pytest")) for name in _imported(path)
            )


def test_base_modules_exist() -> None:
    here = {path.stem for path in ROOT.glob("*.py")} - {"__init__"} - EVERYTHING
    assert here <= BASE_MODULES | ALLOWED.keys()


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Nor late, inside of a function."""
    files = _files()
    graph = {name: files.keys() & set(_imported(path)) for name, path in files.items()}
    graphlib.TopologicalSorter(graph).prepare()
