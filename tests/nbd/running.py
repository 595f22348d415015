"""Servers for tests: one in a thread of this process, with the limits a test wants."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import trio

from backyfs.nbd.exports import Exports
from backyfs.nbd.listening import listeners
from backyfs.nbd.server import Limits, Server
from backyfs.reader.cache import FrameCache
from backyfs.reader.catalog import Catalog
from backyfs.reader.images import OpenImages
from backyfs.reader.overlay import Scratch
from tests.nbd.wire import Client, connected

END_S = 30.0
LIMITS = Limits()


@dataclass(frozen=True)
class Running:
    """A server that serves."""

    address: tuple[str, int]
    server: Server
    images: OpenImages
    token: trio.lowlevel.TrioToken

    @contextlib.contextmanager
    def attached(self, name: str, **how: bool) -> Iterator[Client]:
        """A client of an export."""
        with connected(self.address) as client:
            yield client.open(name, **how)

    def stop(self) -> None:
        """Begin to end it."""
        self.token.run_sync_soon(self.server.stop)


@contextlib.contextmanager
def running(
    base: Path,
    *,
    scratch: Scratch | None = None,
    limits: Limits = LIMITS,
    tls: ssl.SSLContext | None = None,
    cache_bytes: int = 8 << 20,
) -> Iterator[Running]:
    """A server of `base` on a free port; at the end nothing of it may be left."""
    images = OpenImages(FrameCache(cache_bytes), linger_s=0)
    server = Server(Exports(Catalog(base, refresh_s=0), images, scratch), tls=tls, limits=limits)
    started = threading.Event()
    found: list[Running] = []
    failed: list[BaseException] = []

    async def main(sock: socket.socket) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listeners([sock]))
            address = sock.getsockname()
            found.append(Running(address, server, images, trio.lowlevel.current_trio_token()))
            started.set()

    def run(sock: socket.socket) -> None:
        try:
            trio.run(main, sock)
        except BaseException as exc:
            failed.append(exc)
        finally:
            started.set()

    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=run, args=(sock,))
        thread.start()
        started.wait(END_S)
        try:
            assert found, failed
            yield found[0]
        finally:
            if found:
                with contextlib.suppress(trio.RunFinishedError):
                    found[0].stop()
            thread.join(END_S)
            assert not thread.is_alive(), "the server does not end"
            assert not failed, failed
            images.sweep()
            assert not len(images), "an image was not given back"
            images.close()
