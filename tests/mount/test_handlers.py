"""Handlers by themselves: whatever goes wrong becomes an errno, and the loop stays free."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
import time
from pathlib import Path

import pyfuse3
import pytest
import trio
import trio.testing

from backyfs.errors import Corrupt, Unsupported
from backyfs.model import FRAME
from backyfs.mount.handlers import Handlers
from backyfs.reader.cache import FrameCache
from backyfs.reader.catalog import Catalog
from backyfs.reader.images import OpenImages
from backyfs.reader.tree import ROOT, NoEntry, Tree
from tests.reader.stores import content, make_vm

DATA = content(64, seed=6)
CONTEXT = pyfuse3.RequestContext()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    make_vm(tmp_path, "vm", DATA)
    return Tree(Catalog(tmp_path), OpenImages(FrameCache()))


async def inode_of(handlers: Handlers, *names: str) -> int:
    inode = ROOT
    for name in names:
        entry = await handlers.lookup(inode, os.fsencode(name), CONTEXT)
        inode = entry.st_ino
    return inode


async def image_inode(handlers: Handlers) -> int:
    vm = await inode_of(handlers, "vm")
    latest = await handlers.lookup(vm, b"latest", CONTEXT)
    target = await handlers.readlink(latest.st_ino, CONTEXT)
    return await inode_of(handlers, "vm", os.fsdecode(target), "disk.img")


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (NoEntry("x"), errno.ENOENT),
        (Corrupt("x"), errno.EIO),
        (Unsupported("x"), errno.EIO),
        (OSError(errno.EIO, "x"), errno.EIO),
        (OSError(errno.EMFILE, "x"), errno.EMFILE),
        (PermissionError(errno.EACCES, "x"), errno.EIO),
        (MemoryError(), errno.ENOMEM),
        (ZeroDivisionError("x"), errno.EIO),
        (KeyError("x"), errno.EIO),
        (TimeoutError("x"), errno.EIO),
        (pyfuse3.FUSEError(errno.EROFS), errno.EROFS),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_every_failure_is_an_errno(
    tree: Tree,
    failure: Exception,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    handlers = Handlers(tree)

    def fail(*args: object, **kwargs: object) -> None:
        raise failure

    for name in ("node", "child", "children", "open"):
        monkeypatch.setattr(tree, name, fail)
    calls = (
        lambda: handlers.lookup(ROOT, b"x", CONTEXT),
        lambda: handlers.getattr(ROOT, CONTEXT),
        lambda: handlers.readlink(ROOT, CONTEXT),
        lambda: handlers.opendir(ROOT, CONTEXT),
        lambda: handlers.open(ROOT, os.O_RDONLY, CONTEXT),
    )
    with caplog.at_level(logging.ERROR):
        for call in calls:
            with pytest.raises(pyfuse3.FUSEError) as caught:
                await call()
            assert caught.value.errno == expected
    traceback = isinstance(failure, ZeroDivisionError | KeyError)
    assert bool([r for r in caplog.records if r.exc_info]) == traceback


async def test_a_bad_handle_is_an_error(tree: Tree) -> None:
    handlers = Handlers(tree)
    for call in (handlers.read(99, 0, 1), handlers.release(99), handlers.releasedir(99)):
        with pytest.raises(pyfuse3.FUSEError):
            await call


async def test_writing_is_refused(tree: Tree) -> None:
    handlers = Handlers(tree)
    for flags in (os.O_WRONLY, os.O_RDWR):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await handlers.open(ROOT, flags, CONTEXT)
        assert caught.value.errno == errno.EROFS


async def test_reading(tree: Tree) -> None:
    handlers = Handlers(tree)
    async with trio.open_nursery() as nursery:
        handlers.nursery = nursery
        info = await handlers.open(await image_inode(handlers), os.O_RDONLY, CONTEXT)
        assert info.keep_cache
        for offset in range(0, len(DATA) + 2 * FRAME, 100_000):
            for length in (1, 4096, 200_000):
                expected = DATA[offset : offset + length]
                assert bytes(await handlers.read(info.fh, offset, length)) == expected
        await handlers.release(info.fh)
    handlers.close()


async def test_a_slow_store_does_not_stop_others(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a large read waits for the store, what is at hand is answered."""
    handlers = Handlers(tree)
    info = await handlers.open(await image_inode(handlers), os.O_RDONLY, CONTEXT)
    gate = threading.Event()
    image = tree.open(await image_inode(handlers)).image
    slow = type(image).read

    def read(self: object, offset: int, length: int) -> object:
        assert gate.wait(10)
        return slow(image, offset, length)

    monkeypatch.setattr(type(image), "read", read)
    async with trio.open_nursery() as nursery:
        handlers.nursery = nursery
        nursery.start_soon(handlers.read, info.fh, 0, 20 * FRAME)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(5):
            await handlers.getattr(ROOT, CONTEXT)
        gate.set()


async def test_small_reads_of_a_cold_disk_move_into_threads(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = Handlers(tree)
    info = await handlers.open(await image_inode(handlers), os.O_RDONLY, CONTEXT)
    image = tree.open(await image_inode(handlers)).image
    store = image._image  # type: ignore[attr-defined]
    read, delay_s, threads = store.read, 0.004, []

    def cold(offset: int, length: int) -> object:
        threads.append(threading.get_ident())
        time.sleep(delay_s)
        return read(offset, length)

    monkeypatch.setattr(store, "read", cold)
    monkeypatch.setattr(store, "read_sound", cold)
    offsets = (n * FRAME for n in range(64) if any(DATA[n * FRAME : (n + 1) * FRAME]))
    async with trio.open_nursery() as nursery:
        handlers.nursery = nursery
        for offset in itertools.islice(offsets, 20):
            assert await handlers.read(info.fh, offset, 4096) == DATA[offset : offset + 4096]
        assert threads[0] == threading.get_ident() != threads[-1]
        delay_s = 0.0
        for offset in itertools.islice(offsets, 4):
            await handlers.read(info.fh, offset, 4096)
        assert threads[-1] == threading.get_ident(), "warm again"
        nursery.cancel_scope.cancel()


async def test_damage_is_logged_once_per_place(
    tree: Tree, caplog: pytest.LogCaptureFixture
) -> None:
    handlers = Handlers(tree)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            for offset in range(0, 3 * FRAME, FRAME):
                error = Corrupt("x", vm="vm", revision="r", disk="d", offset=offset, length=FRAME)
                assert handlers.errno_of(error, "read") == errno.EIO
    assert len(caplog.records) == 3
