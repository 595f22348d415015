"""Readers at work while the store changes under them: no error, no wrong byte, no growth."""

from __future__ import annotations

import os
import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from backyfs.model import FRAME
from backyfs.store.repository import Repository
from tests.mount.mounts import Mounted, eventually, mounted
from tests.reader.stores import add_revision, content, make_vm

SECONDS = 6.0
KEPT = 4


class Store:
    """A repository that gains and loses revisions, and what each of them must read as."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.contents: dict[str, bytes] = {}
        self.removed: set[str] = set()
        self._rng = random.Random(1)
        self._data = bytearray(content(48, seed=1))

    def grow(self) -> None:
        for _ in range(6):
            at = self._rng.randrange(len(self._data) - 5000)
            self._data[at : at + 5000] = self._rng.randbytes(5000)
        data = bytes(self._data)
        self.contents[add_revision(self.repository, data).id] = data

    def shrink(self) -> None:
        surplus = [record.id for record in self.repository.revisions()][:-KEPT]
        self.removed.update(surplus)
        self.repository.remove(surplus, force=True)
        self.repository.gc()


def change(store: Store, until: float, stop: threading.Event) -> int:
    rounds = 0
    while time.monotonic() < until and not stop.is_set():
        store.grow()
        store.shrink()
        rounds += 1
        time.sleep(0.05)
    return rounds


def read(store: Store, directory: Path, seed: int, until: float, stop: threading.Event) -> int:
    """Read at random places; what is gone may be gone, everything else must be right."""
    rng, done = random.Random(seed), 0
    while time.monotonic() < until and not stop.is_set():
        revision = rng.choice(list(store.contents)[-KEPT - 2 :])
        try:
            done += _read_one(directory / revision / "disk.img", store.contents[revision], rng)
        except FileNotFoundError:
            if revision not in store.removed:
                # Not shown yet: it must be in a moment.
                assert eventually(partial(_shown_or_gone, store, directory, revision))
    return done


def _shown_or_gone(store: Store, directory: Path, revision: str) -> bool:
    return (directory / revision).exists() or revision in store.removed


def _read_one(path: Path, data: bytes, rng: random.Random) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        for _ in range(20):
            offset, length = rng.randrange(len(data)), rng.choice((10, 4096, 5 * FRAME))
            assert os.pread(fd, length, offset) == data[offset : offset + length]
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return 1


@pytest.mark.parametrize("kind", ["packs", "cow"])
def test_reading_while_the_store_changes(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base: Path = tmp_path / "base" if kind == "packs" else request.getfixturevalue("btrfs_dir")
    base.mkdir(exist_ok=True)
    store = Store(make_vm(base, "vm", store=kind))
    for _ in range(KEPT):
        store.grow()
    with mounted(base, tmp_path / "mnt") as tree:
        _soak(store, tree)


def _soak(store: Store, tree: Mounted) -> None:
    directory = tree.path / "vm"
    until, stop = time.monotonic() + SECONDS, threading.Event()
    with ThreadPoolExecutor(5) as pool:
        changing = pool.submit(change, store, until, stop)
        reading = [pool.submit(read, store, directory, n, until, stop) for n in range(4)]
        everything: list[Future[int]] = [changing, *reading]
        try:
            done = [each.result(SECONDS + 30) for each in everything]
        finally:
            stop.set()
    assert all(done)
    assert tree.alive()
    assert eventually(lambda: not any("(deleted)" in path for path in tree.descriptors()))
    assert tree.status("VmHWM") < 192 * 1024
    for revision, data in list(store.contents.items())[-KEPT:]:
        assert eventually((directory / revision).exists)
        assert (directory / revision / "disk.img").read_bytes() == data
