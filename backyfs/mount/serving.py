"""One mount being served: FUSE session, trio loop, signals, house-keeping; then its clean end.

Runs in a process of its own (or the command's, in the foreground) and ends when the tree is
unmounted, or SIGTERM or SIGINT arrive (in the foreground also SIGHUP); in each case nothing stays
mounted.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyfuse3
import trio

from backyfs import descriptors, notify, signals
from backyfs.allocator import GIVEN_BACK_S, give_back, keep_few_heaps, keep_freed_blocks
from backyfs.errors import TargetError
from backyfs.hanging import end_in_time
from backyfs.mount.handlers import Handlers
from backyfs.mount.lifeline import lifeline
from backyfs.mount.mountpoint import FSTYPE, Mount, beacon, mounted_at, mounts, source_of, unmount
from backyfs.reader.cache import CACHE_BYTES_MAX, FrameCache
from backyfs.reader.catalog import Catalog
from backyfs.reader.images import OpenImages
from backyfs.reader.overlay import Scratch
from backyfs.reader.scratch import IDLE_S, ScratchViews
from backyfs.reader.tree import Tree
from backyfs.store.packs.decoders import decoders

log = logging.getLogger(__name__)

_NAME = FSTYPE.removeprefix("fuse.")
_READ_AHEAD_KIB = 1024
"""The largest read request the kernel makes is 1 MiB: more read-ahead gains nothing."""
_ANSWER_S = 20.0
_SWEEP_S = 1.0
_GC_THRESHOLD = 20_000
_PR_SET_IO_FLUSHER = 57


@dataclass(frozen=True, slots=True)
class Options:
    """What to mount where. `base` and `mountpoint` are absolute; `cache_bytes` bounds decoded
    frames in memory; `allow_other` lets other users in, to all of it; `check` verifies every byte
    of cow revisions, too. With a directory `scratch`, disks may be written to: what is written is
    kept in there, `scratch_bytes` at most (None: no bound), until the mount ends or nobody has
    used it for `scratch_idle_s`. With a process `while_pid` the mount, unless it was detached, and
    its mountpoint are gone soon after that process.
    """

    base: Path
    mountpoint: Path
    allow_other: bool = False
    cache_bytes: int = CACHE_BYTES_MAX
    check: bool = False
    scratch: Path | None = None
    scratch_bytes: int | None = None
    scratch_idle_s: float = IDLE_S
    while_pid: int | None = None


def serve(options: Options, ready: Callable[[], None]) -> None:
    """Mount and serve until the end; `ready` is called once the tree answers. TargetError."""
    _bound_resources()
    keep_freed_blocks()
    views = _views(options)
    logging.getLogger("pyfuse3").setLevel(logging.CRITICAL)  # else a word per interrupted request
    with decoders(options.cache_bytes) as helping:  # before there are threads, and the session
        images = OpenImages(FrameCache(options.cache_bytes, helping.room))
        tree = Tree(Catalog(options.base), images, check=options.check, views=views)
        handlers = Handlers(tree)
        _mount(handlers, options)
        try:
            trio.run(_serve, options, handlers, ready)
        finally:
            if views is not None:
                views.close()
            images.close()
            if options.while_pid is not None:
                with contextlib.suppress(OSError):
                    os.rmdir(options.mountpoint)
    log.info("unmounted", {"mountpoint": options.mountpoint})


def _bound_resources() -> None:
    """Let the process use all descriptors it may have, and keep its memory together."""
    descriptors.allow()
    keep_few_heaps()
    # Records make no cycles, but are a million objects to look through again and again.
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD, 10, 100)


def _views(options: Options) -> ScratchViews | None:
    if options.scratch is None:
        return None
    # The kernel must not hold us up until data is written back that only we can write back.
    ctypes.CDLL(None).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    scratch = Scratch(options.scratch, options.scratch_bytes, base=options.base)
    return ScratchViews(scratch, idle_s=options.scratch_idle_s)


async def _serve(options: Options, handlers: Handlers, ready: Callable[[], None]) -> None:
    try:
        async with trio.open_nursery() as nursery:
            handlers.nursery = nursery
            await nursery.start(_end_on_signal, options.mountpoint)
            nursery.start_soon(_sweep, handlers.tree)
            for threads in handlers.threads:
                nursery.start_soon(threads.make_room)
            nursery.start_soon(_give_back)
            mount = mounted_at(options.mountpoint)
            nursery.start_soon(_announce, options, mount, ready)
            if mount is not None:
                nursery.start_soon(_shine, mount.device)
                if options.while_pid is not None:
                    nursery.start_soon(_end_with, options.while_pid, mount)
            await pyfuse3.main()
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=True)
        handlers.close()


class _Option(str):
    """An option with a path in it: pyfuse3 asks for ASCII, but names of files are any bytes."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        """The bytes that the name has on disk, whatever `encoding` is."""
        return os.fsencode(str(self))


def _mount(handlers: Handlers, options: Options) -> None:
    names = {"nosuid", "nodev", "default_permissions", "auto_unmount"}
    names.add("ro" if options.scratch is None else "rw")
    source = source_of(options.base).replace("\\", "\\\\").replace(",", "\\,")
    names |= {_Option(f"fsname={source}"), f"subtype={_NAME}"}
    if options.allow_other:
        names.add("allow_other")
    with tempfile.TemporaryFile() as said:
        try:
            with _stderr_into(said.fileno()), lifeline():
                pyfuse3.init(handlers, str(options.mountpoint), names)
        except RuntimeError as exc:
            said.seek(0)
            why = "; ".join(said.read(4096).decode(errors="replace").splitlines()) or str(exc)
            raise TargetError(
                f"cannot mount on {options.mountpoint}: {why}", hint=_remedy(why)
            ) from exc


def _remedy(why: str) -> str:
    if "user_allow_other" in why:
        return "root must write user_allow_other into /etc/fuse.conf"
    if "/dev/fuse" in why:
        return "load the module fuse, and see who may open /dev/fuse"
    return "see what this host can do: backyfs doctor"


@contextlib.contextmanager
def _stderr_into(fd: int) -> Iterator[None]:
    """What libfuse and fusermount3 say meanwhile goes to `fd`."""
    sys.stderr.flush()
    saved = os.dup(2)
    os.dup2(fd, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _set_read_ahead(device: str) -> None:
    """Have the kernel ask for 1 MiB at a time; only root may say so."""
    with contextlib.suppress(OSError):
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(_READ_AHEAD_KIB))


async def _shine(device: str) -> None:
    with trio.socket.from_stdlib_socket(beacon(device)) as listener, contextlib.suppress(OSError):
        while True:
            connection, _ = await listener.accept()
            connection.close()


async def _announce(options: Options, mount: Mount | None, ready: Callable[[], None]) -> None:
    """Say so when the tree answers; ask in a thread, for the loop itself gives the answer."""
    with trio.move_on_after(_ANSWER_S) as patience:
        await trio.to_thread.run_sync(os.stat, options.mountpoint, abandon_on_cancel=True)
        if mount is not None:  # only now: the kernel's first request sets it back
            _set_read_ahead(mount.device)
        log.info("mounted", {"base": options.base, "mountpoint": options.mountpoint})
        ready()
        notify.tell(notify.READY)
    if patience.cancelled_caught:
        log.error("the tree does not answer", {"mountpoint": options.mountpoint})
        pyfuse3.terminate()


async def _end_on_signal(
    mountpoint: Path,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(*signals.ending()) as arriving:  # in the background no SIGHUP
        task_status.started()
        async for number in arriving:
            log.info("stopped by a signal", {"signal": signal.Signals(number).name})
            end_in_time(partial(unmount, mountpoint, lazy=True))
            pyfuse3.terminate()


async def _end_with(pid: int, mount: Mount) -> None:
    """End a mount that is still attached when process `pid` is gone."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            await trio.lowlevel.wait_readable(fd)
        finally:
            os.close(fd)
    if mount in mounts():
        log.warning("stopped: who needed it is gone", {"pid": pid})
        pyfuse3.terminate()


async def _give_back() -> None:
    while True:
        await trio.sleep(GIVEN_BACK_S)
        await trio.to_thread.run_sync(give_back)


async def _sweep(tree: Tree) -> None:
    while True:
        await trio.sleep(_SWEEP_S)
        if tree.views is not None:
            await trio.to_thread.run_sync(tree.views.sweep)
        await trio.to_thread.run_sync(tree.images.sweep)
