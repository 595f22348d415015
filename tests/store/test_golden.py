"""Stores written by earlier versions of this program open for ever, and can be written to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from backyfs.store.repository import Repository
from tests.store.golden import make

HERE = Path(make.__file__).parent
VERSIONS = sorted(path.name for path in HERE.iterdir() if (path / "expected.json").exists())
STORES = [(version, store) for version in VERSIONS for store in ("packs", "cow")]


def expected(version: str, store: str) -> Any:
    return json.loads((HERE / version / "expected.json").read_text(encoding="utf-8"))[store]


@pytest.mark.parametrize(("version", "store"), STORES)
def test_it_reads_as_expected(version: str, store: str) -> None:
    repository = Repository.open(HERE / version / store)
    assert repository.store == store
    assert repository.unreadable() == {}
    assert repository.damage() == {}
    assert repository.fsck() == []
    assert make.described(repository) == expected(version, store)


@pytest.mark.parametrize(("version", "store"), STORES)
def test_work_goes_on_in_it(
    version: str, store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    where = tmp_path if store == "packs" else request.getfixturevalue("btrfs_dir")
    shutil.copytree(HERE / version / store, where / store)
    repository = Repository.open(where / store)
    disks = make.contents()[-1]
    disks["root"] = make.changed(disks["root"], 0, 99)
    record = make.back_up(repository, 100, disks)
    oldest = repository.revisions()[0]
    assert repository.remove([oldest.id]).removed == [oldest.id]
    repository.gc()
    assert repository.fsck() == []
    assert repository.damage() == {}
    left = expected(version, store)
    del left[oldest.id]
    found = make.described(repository)
    assert found.pop(record.id)["seq"] == len(make.contents()) + 1
    assert found == left


def test_the_recipe_still_makes_the_same(btrfs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is expected of a store made today; a change here is a change of the format."""
    monkeypatch.setattr("backyfs.store.packs.gc.FILES_BASE", 64)
    make.main(btrfs_dir)
    found = json.loads((btrfs_dir / "expected.json").read_text(encoding="utf-8"))
    assert found == {store: expected(VERSIONS[-1], store) for store in ("packs", "cow")}
    assert list((btrfs_dir / "packs" / "packs").glob("m-*.pack"))


def test_both_stores_agree() -> None:
    for version in VERSIONS:
        assert expected(version, "packs") == expected(version, "cow")


def test_they_are_small() -> None:
    for version, store in STORES:
        files = [path for path in (HERE / version / store).rglob("*") if path.is_file()]
        limit = 100_000 if store == "packs" else 4_000_000
        assert sum(path.stat().st_size for path in files) < limit
