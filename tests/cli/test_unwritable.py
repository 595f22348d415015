"""A store that is full or read-only: every verdict is told, though none can be recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from backyfs.store.repository import Repository
from tests import images
from tests.cli.program import Done, backyfs
from tests.conftest import SmallFs
from tests.engine.checks import damage_frame
from tests.filesystems import MIB, filled, read_only


@contextmanager
def full(mountpoint: Path) -> Iterator[None]:
    with filled(mountpoint, 0):
        yield


@dataclass(frozen=True)
class Store:
    """A VM's directory on a file system of its own, and what keeps that from being written."""

    directory: Path
    ids: list[str]
    unwritable: Callable[[], AbstractContextManager[None]]
    why: str

    def on(self, *command: str, code: int = 0) -> Done:
        return backyfs("-b", self.directory, *command, code=code)

    def damage(self, index: int, frame: int) -> None:
        repository = Repository.open(self.directory)
        damage_frame(repository, repository.record(self.ids[index]), frame)

    def warning(self, what: str) -> str:
        return f"backyfs: warning: {what} not recorded: {self.why}"


OBSTACLES = {
    "full": (full, "No space left on device"),
    "read-only": (read_only, "Read-only file system"),
}


@pytest.fixture(params=["packs", "cow"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=OBSTACLES)
def store(request: pytest.FixtureRequest, kind: str, small_fs: SmallFs, tmp_path: Path) -> Store:
    """Three revisions; the second changes frame 3 of the first, the third changes frame 5."""
    mountpoint = small_fs("xfs", 300 * MIB)
    directory = mountpoint / "web01"
    image = images.make_image(tmp_path / "web01.img", MIB, seed=5)
    backyfs("-b", directory, "init", "--store", kind, "file", image)
    for frame in (None, 3, 5):
        if frame is not None:
            with open(image, "r+b") as stream:
                stream.seek(frame * 65536)
                stream.write(b"changed")
        backyfs("-b", directory, "backup", "daily")
    found = backyfs("-b", directory, "status", "--json").json["revisions"]
    obstacle, why = OBSTACLES[request.param]
    return Store(directory, [r["id"] for r in found], lambda: obstacle(mountpoint), why)


def test_sound_revisions(store: Store) -> None:
    with store.unwritable():
        done = store.on("verify")
        assert done.out.splitlines() == [f"{i}: ok" for i in store.ids]
        assert done.err.splitlines() == [store.warning("3 of 3 results are")]
        warning = json.loads(store.on("verify", "--json").err)
        assert warning["message_type"] == "warning"
        assert store.on("verify", "--quick").err == ""
        done = store.on("scrub")
        assert "0 bad frames; all is read" in done.out
        assert done.err.splitlines() == [store.warning("what the scrub did is")]
    assert store.on("verify").err == store.on("scrub").err == ""


def test_damage(store: Store) -> None:
    store.damage(1, 3)
    with store.unwritable():
        done = store.on("verify", code=12)
        assert [line for line in done.out.splitlines() if not line.startswith(" ")] == [
            f"{store.ids[0]}: ok",
            f"{store.ids[1]}: damaged",
            f"{store.ids[2]}: {_third(store)}",
        ]
        assert done.err.splitlines() == [
            store.warning("3 of 3 results are"),
            f"backyfs: web01: damaged: {_count(store)} of 3 revisions",
        ]
        done = store.on("scrub", "--json", code=12)
        assert done.json["damaged"] == _damaged(store)
        warning, error = map(json.loads, done.err.splitlines())
        assert warning["message"] == store.warning("what the scrub did is").partition("ing: ")[2]
        assert error["code"] == 12
        assert "(see: backyfs verify)" in error["message"]
        assert store.on("verify", "-r", store.ids[1], code=12).err.splitlines()[0] == (
            store.warning("1 of 1 results are")
        )
    assert "not recorded" not in store.on("verify", code=12).err
    assert "not recorded" not in store.on("scrub", code=12).err


def test_damage_that_is_recorded_already(store: Store) -> None:
    store.damage(1, 3)
    store.on("verify", code=12)
    with store.unwritable():
        done = store.on("verify", "-r", store.ids[1], code=12)
        assert done.err.splitlines() == ["backyfs: web01: damaged: 1 of 1 revisions"]
        assert store.on("scrub", "--json", code=12).json["damaged"] == _damaged(store)


def _damaged(store: Store) -> list[str]:
    """A bad frame of packs is bad in every revision that shares it."""
    repository = Repository.open(store.directory)
    return sorted(store.ids[1:3] if repository.store == "packs" else store.ids[1:2])


def _count(store: Store) -> int:
    return len(_damaged(store))


def _third(store: Store) -> str:
    return "damaged" if store.ids[2] in _damaged(store) else "ok"
