"""The NBD server: connections, limits, and their end (docs/nbd.md).

One trio thread accepts, negotiates and watches the clock. An attached client is served by a thread
of its own (session.py), which its connection's task waits for: when the task is cancelled, the
socket is shut down, which ends the thread. So nothing outlives the nursery of `Server.serve`.

Invariants: a connection's task raises nothing, so one client cannot end another; whatever happens,
a connection's lease, overlay, thread and descriptors are given back by its own task.
"""

from __future__ import annotations

import logging
import socket
import ssl
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import trio

from backyfs.hanging import Threads
from backyfs.log import about
from backyfs.nbd.attached import Attached
from backyfs.nbd.channel import blocking, keep_alive, shut
from backyfs.nbd.exports import Exports
from backyfs.nbd.helpers import Helpers
from backyfs.nbd.negotiation import Negotiation, Opened
from backyfs.nbd.protocol.handshake import ProtocolError
from backyfs.nbd.protocol.transmission import Transmission
from backyfs.nbd.session.ahead import Window
from backyfs.nbd.session.session import Session

log = logging.getLogger(__name__)


def _seldom(seconds: float) -> Callable[[logging.LogRecord], bool]:
    """Lets a line pass every so often, without its traceback."""
    due = 0.0

    def passes(record: logging.LogRecord) -> bool:
        nonlocal due
        record.exc_info = None
        if (now := time.monotonic()) < due:
            return False
        due = now + seconds
        return True

    return passes


# Without a free descriptor trio tells so ten times a second.
logging.getLogger("trio.serve_listeners").addFilter(_seldom(60.0))

CONNECTIONS_MAX = 64
_CATALOG_THREADS = 4
_GONE = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a server, and of each of its connections.

    `handshake_s`: how long we wait for a client, all together, until it opens an export. `stall_s`:
    how long a client may stop within a request, or take none of the bytes that it asked for.
    `grace_s`: how long connections may take to end when the server stops.
    """

    connections: int = CONNECTIONS_MAX
    handshake_s: float = 10.0
    stall_s: float = 60.0
    grace_s: float = 5.0


class Server:
    """Serves `exports`, through TLS only if `tls` is given."""

    def __init__(
        self, exports: Exports, *, tls: ssl.SSLContext | None = None, limits: Limits = Limits()
    ) -> None:
        self._exports, self._tls, self._limits = exports, tls, limits
        self._catalog = Threads(_CATALOG_THREADS)
        self._threads = trio.CapacityLimiter(limits.connections)
        self._helpers = Helpers()
        self._hands = trio.CapacityLimiter(self._helpers.count)
        self._window = Window(exports.cache_bytes)
        self._connections = 0
        self._accepting, self._stopping = trio.CancelScope(), False
        self._negotiations: set[Negotiation] = set()
        self._attachments: set[_Attachment] = set()

    @property
    def connections(self) -> int:
        """Connections that are open."""
        return self._connections

    @property
    def stopping(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping

    async def serve(
        self,
        listeners: list[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `stop`; returns when all connections have ended."""
        async with trio.open_nursery() as helping:
            helping.start_soon(self._catalog.make_room)
            for _ in range(self._helpers.count):
                helping.start_soon(self._help)
            try:
                async with trio.open_nursery() as connections:
                    with self._accepting:
                        await trio.serve_listeners(
                            self._accepted,
                            listeners,
                            handler_nursery=connections,
                            task_status=task_status,
                        )
                    connections.cancel_scope.deadline = trio.current_time() + self._limits.grace_s
            finally:
                self._helpers.stop()
                helping.cancel_scope.cancel()

    async def _help(self) -> None:
        with trio.CancelScope(shield=True):  # `stop` ends it, whatever ended the connections
            await trio.to_thread.run_sync(self._helpers.run, limiter=self._hands)

    def stop(self) -> None:
        """Accept nobody any more, refuse further requests, and end."""
        self._stopping = True
        self._accepting.cancel()
        for negotiation in self._negotiations:
            negotiation.cancel()
        for attachment in self._attachments:
            attachment.stop()

    # One connection

    async def _accepted(self, stream: trio.SocketStream) -> None:
        peer = _peer(stream)
        if self._connections >= self._limits.connections:
            log.warning("too many connections", {"peer": peer, "most": self._limits.connections})
            return
        self._connections += 1
        try:
            await self._connection(stream, peer)
        except (ProtocolError, ssl.SSLError) as exc:
            log.warning("connection dropped", {"peer": peer, "why": exc})
        except _GONE as exc:
            log.info("connection lost", {"peer": peer, "why": exc})
        except Exception as exc:
            log.error("connection dropped: a bug", {"peer": peer}, exc_info=exc)
        finally:
            self._connections -= 1

    async def _connection(self, stream: trio.SocketStream, peer: str) -> None:
        keep_alive(stream)
        negotiation = Negotiation(self._exports, stream, peer, tls=self._tls, threads=self._catalog)
        try:
            self._negotiations.add(negotiation)
            try:
                done = await negotiation.run(self._limits.handshake_s)
            finally:
                self._negotiations.discard(negotiation)
            if done and negotiation.opened is not None:
                await self._attach(stream, negotiation, negotiation.opened, peer)
        finally:
            if negotiation.opened is not None:
                await self._close(negotiation.opened.attached)

    async def _close(self, attached: Attached) -> None:
        # In a thread: the file system may take its time to free what an overlay kept.
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(attached.close, limiter=self._threads)
            except RuntimeError:  # the system has no thread left: an image kept open is worse
                attached.close()

    async def _attach(
        self, stream: trio.SocketStream, negotiation: Negotiation, opened: Opened, peer: str
    ) -> None:
        info = opened.attached.info
        stall_s = self._limits.stall_s
        with (
            about(opened.export.vm.name),
            blocking(stream, receive_s=stall_s, send_s=stall_s) as sock,
        ):
            transmission = Transmission(
                info.size,
                info.flags,
                structured=negotiation.handshake.structured,
                allocation=opened.allocation,
            )
            channel = negotiation.link.channel(sock)
            session = Session(channel, opened.attached, transmission, self._helpers, self._window)
            values = {"peer": peer, "export": info.name}
            log.info("attached", values | {"tls": self._tls is not None})
            started = trio.current_time()
            why = await self._serve(_Attachment(sock, session), negotiation.handshake.surplus)
            seconds = round(trio.current_time() - started, 3)
            log.info(
                "detached", values | asdict(session.traffic) | {"seconds": seconds, "why": why}
            )

    async def _serve(self, attachment: _Attachment, first: bytes) -> str:
        self._attachments.add(attachment)
        try:
            if self.stopping:
                attachment.stop()
            return await attachment.run(first, self._threads)
        finally:
            self._attachments.discard(attachment)


class _Attachment:
    """An attached client: its socket, and the session that a thread runs."""

    def __init__(self, sock: socket.socket, session: Session) -> None:
        self._sock, self._session = sock, session

    def stop(self) -> None:
        """Let the session answer what it has received, and end."""
        self._session.stop()
        shut(self._sock, socket.SHUT_RD)

    async def run(self, first: bytes, limiter: trio.CapacityLimiter) -> str:
        """Run the session in a thread; cancellation shuts the socket, which ends the thread."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._shut_when_cancelled)
            why = await trio.to_thread.run_sync(self._session.run, first, limiter=limiter)
            nursery.cancel_scope.cancel()
        return why

    async def _shut_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            shut(self._sock)


def _peer(stream: trio.SocketStream) -> str:
    """Who is at the other end, for the log."""
    sock = stream.socket
    try:
        if sock.family == socket.AF_UNIX:
            found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            pid, uid, _ = struct.unpack("3i", found)
            return f"pid:{pid},uid:{uid}"
        host, port = sock.getpeername()[:2]
    except OSError:
        return "gone"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
