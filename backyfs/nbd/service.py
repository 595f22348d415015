"""A server from its options: binds, serves until a signal, ends cleanly."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from backyfs import descriptors, notify, signals
from backyfs.allocator import GIVEN_BACK_S, give_back, keep_few_heaps, keep_freed_blocks
from backyfs.errors import TargetError
from backyfs.hanging import end_in_time
from backyfs.nbd.exports import Exports
from backyfs.nbd.listening import Endpoint, handed_over, is_exposed, listeners, listening, shown
from backyfs.nbd.server import Limits, Server
from backyfs.nbd.tls import TlsFiles, context
from backyfs.reader.cache import CACHE_BYTES_MAX, FrameCache
from backyfs.reader.catalog import Catalog
from backyfs.reader.images import OpenImages
from backyfs.reader.overlay import Scratch
from backyfs.store.packs.decoders import decoders

log = logging.getLogger(__name__)

_SWEEP_S = 1.0


@dataclass(frozen=True, slots=True)
class ScratchPlace:
    """Where overlays are kept, and how many bytes of them, all together (None: no bound)."""

    directory: Path
    bytes_max: int | None = None


DEFAULT_SCRATCH = ScratchPlace(Path("/var/tmp"), 16 << 30)


@dataclass(frozen=True, slots=True)
class Options:
    """What to serve, and where.

    `base` is one VM's directory or the base directory of many; `scratch` where overlays are kept
    (None: DEFAULT_SCRATCH, and without `@rw` where that cannot be used); `cache_bytes` bounds
    decoded frames in memory.
    """

    base: Path
    endpoint: Endpoint = field(default_factory=Endpoint)
    tls: TlsFiles | None = None
    scratch: ScratchPlace | None = None
    cache_bytes: int = CACHE_BYTES_MAX
    limits: Limits = field(default_factory=Limits)


def serve(options: Options, ready: Callable[[list[str]], None]) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP; `ready` is told where, once clients can connect.

    NoRepository, ConfigError, TargetError; BackyfsError when it cannot listen there.
    """
    keep_few_heaps()
    tls = context(options.tls) if options.tls is not None else None
    catalog = Catalog(options.base, refresh_s=0)  # clients come rarely, and want what is there
    with contextlib.ExitStack() as stack:
        scratch = _scratch(options.scratch, catalog.base)
        if scratch is not None:
            stack.callback(scratch.close)
        helping = stack.enter_context(decoders(options.cache_bytes))
        images = OpenImages(FrameCache(options.cache_bytes, helping.room))
        stack.callback(images.close)
        sockets = [stack.enter_context(sock) for sock in handed_over()]
        if not sockets:
            sockets = stack.enter_context(listening(options.endpoint))
        _warn_if_open(sockets, options.tls)
        descriptors.allow()
        keep_freed_blocks()
        server = Server(Exports(catalog, images, scratch), tls=tls, limits=options.limits)
        trio.run(_serve, server, sockets, images, ready)


def _scratch(place: ScratchPlace | None, base: Path) -> Scratch | None:
    wanted = place or DEFAULT_SCRATCH
    try:
        return Scratch(wanted.directory, wanted.bytes_max, base=base)
    except TargetError as exc:
        if place is not None:
            raise
        log.warning("no writable exports", {"why": exc})
        return None


def _warn_if_open(sockets: list[socket.socket], tls: TlsFiles | None) -> None:
    for sock in filter(is_exposed, sockets):
        if tls is None:
            log.warning(
                "everybody who can connect may read all exports: no TLS", {"listening": shown(sock)}
            )
        elif tls.authority is None:
            log.warning(
                "everybody who can connect may read all exports: no client certificates (--tls-ca)",
                {"listening": shown(sock)},
            )


async def _serve(
    server: Server,
    sockets: list[socket.socket],
    images: OpenImages,
    ready: Callable[[list[str]], None],
) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(_stop_on_signal, server)
        nursery.start_soon(_sweep, images)
        nursery.start_soon(_give_back)
        async with trio.open_nursery() as serving:
            await serving.start(server.serve, listeners(sockets))
            places = [shown(sock) for sock in sockets]
            log.info("listening", {"on": ", ".join(places)})
            ready(places)
            notify.tell(notify.READY)
        nursery.cancel_scope.cancel()
    log.info("stopped")


async def _stop_on_signal(
    server: Server, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(*signals.ending()) as arriving:
        task_status.started()
        async for number in arriving:
            log.info("stopping", {"signal": signal.Signals(number).name})
            notify.tell(notify.STOPPING)
            end_in_time()
            server.stop()


async def _give_back() -> None:
    while True:
        await trio.sleep(GIVEN_BACK_S)
        await trio.to_thread.run_sync(give_back)


async def _sweep(images: OpenImages) -> None:
    while True:
        await trio.sleep(_SWEEP_S)
        await trio.to_thread.run_sync(images.sweep)
