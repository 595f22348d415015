"""Repositories of each format for the engine's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from backyfs.store.repository import Repository

Stores = Callable[[str], Repository]


@pytest.fixture
def stores(tmp_path: Path, request: pytest.FixtureRequest) -> Stores:
    """Makes a repository of a format: "packs" anywhere, "cow" where the file system reflinks."""
    made: list[Repository] = []

    def make(store: str) -> Repository:
        where: Path = tmp_path if store == "packs" else request.getfixturevalue("btrfs_dir")
        made.append(Repository.create(where / f"vm{len(made)}", store))
        return made[-1]

    return make


@pytest.fixture(params=["packs", "cow"])
def repository(request: pytest.FixtureRequest, stores: Stores) -> Repository:
    """An empty repository, once of each format."""
    return stores(request.param)


@pytest.fixture
def packs(stores: Stores) -> Repository:
    """An empty packs repository."""
    return stores("packs")
