"""The handshake of one connection: options answered from the exports, until one is open."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import trio

from backyfs.errors import BackyfsError
from backyfs.hanging import Threads
from backyfs.nbd.attached import Attached
from backyfs.nbd.channel import Link, PlainLink, TlsLink
from backyfs.nbd.exports import Export, Exports
from backyfs.nbd.protocol.constants import Option, OptionReply
from backyfs.nbd.protocol.handshake import (
    Abort,
    Handshake,
    ListExports,
    MetaContexts,
    Open,
    ProtocolError,
    Reply,
    StartTls,
)

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Opened:
    """What a handshake led to; `allocation`: the client wants block status."""

    export: Export
    attached: Attached
    allocation: bool


NAME_S = 1.0
"""How much longer we wait for each name that the client was told: it may ask about all of them.

libnbd 1.14 alone takes 0.2 s for each.
"""


class Negotiation:
    """Runs a handshake over a stream. `threads` are those that look into the store.

    After `run`, however it ended, `opened` is what the caller must close.
    """

    def __init__(
        self,
        exports: Exports,
        stream: trio.SocketStream,
        peer: str,
        *,
        tls: ssl.SSLContext | None,
        threads: Threads,
    ) -> None:
        self.handshake = Handshake(tls=tls is not None)
        self.link: Link = PlainLink(stream)
        self.opened: Opened | None = None
        self._exports, self._stream, self._peer = exports, stream, peer
        self._tls, self._threads = tls, threads
        self._patience = trio.CancelScope()

    def cancel(self) -> None:
        """End it, wherever it is."""
        self._patience.cancel()

    async def run(self, patience_s: float) -> bool:
        """Answer options until an export is open; False when the client went away before.

        ProtocolError, also when the client took longer than `patience_s`; ssl.SSLError;
        trio.BrokenResourceError.
        """
        self._patience.deadline = trio.current_time() + patience_s
        with self._patience:
            return await self._run()
        if trio.current_time() < self._patience.deadline:
            return False  # we stop
        raise ProtocolError(f"no export was opened within {patience_s:g} s")

    async def _run(self) -> bool:
        await self.link.send(self.handshake.greeting())
        while not self.handshake.done:
            data = await self.link.receive()
            if not data:
                return False
            self.handshake.receive(data)
            if not await self._answer():
                return False
        return True

    async def _answer(self) -> bool:
        """Answer what has arrived; False when the client said goodbye."""
        while not self.handshake.done:
            match self.handshake.next_event():
                case None:
                    return True
                case Reply(data):
                    await self.link.send(data)
                case ListExports() as event:
                    await self._list(event)
                case Open() as event:
                    await self._open(event)
                case MetaContexts() as event:
                    await self._contexts(event)
                case StartTls():
                    await self._start_tls()
                case Abort(data):
                    await self.link.send(data)
                    return False
        return True

    async def _start_tls(self) -> None:
        assert self._tls is not None  # else the handshake refuses it
        await self.link.send(self.handshake.begin_tls())
        link = TlsLink(self._stream, self._tls)
        await link.begin()
        self.link = link

    async def _list(self, event: ListExports) -> None:
        told, pieces = self.handshake.told, self.handshake.listed(self._exports.listed())
        while True:
            try:
                piece = await self._ask(lambda: next(pieces, None))
            except (BackyfsError, OSError) as exc:
                await self._refuse(event, exc)
                return
            if piece is None:
                break
            await self.link.send(piece)
        self._patience.deadline += NAME_S * (self.handshake.told - told)

    async def _contexts(self, event: MetaContexts) -> None:
        try:
            await self._ask(lambda: self._exports.find(event.name))
        except (BackyfsError, OSError) as exc:
            await self._refuse(event, exc)
        else:
            await self.link.send(self.handshake.contexts(event))

    async def _open(self, event: Open) -> None:
        try:
            export = await self._ask(lambda: self._found(event))
        except (BackyfsError, OSError) as exc:
            await self._refuse(event, exc)
        else:
            await self.link.send(self.handshake.accept(event, export.info))

    def _found(self, event: Open) -> Export:
        """The export, opened unless the client only asks about it. In a thread."""
        export = self._exports.find(event.name)
        if event.option != Option.INFO:
            attached = self._exports.open(export)
            self.opened = Opened(export, attached, self.handshake.has_allocation(event))
        return export

    async def _refuse(
        self, event: Open | MetaContexts | ListExports, exc: BackyfsError | OSError
    ) -> None:
        text = exc.message if isinstance(exc, BackyfsError) else exc.strerror or str(exc)
        name = "(list)" if isinstance(event, ListExports) else event.name
        log.info("refused", {"peer": self._peer, "export": name, "why": exc})
        await self.link.send(self.handshake.refuse(event, OptionReply.ERR_UNKNOWN, text))

    async def _ask(self, question: Callable[[], T]) -> T:
        """The answer of what may do input and output; the client's time stands still meanwhile."""
        started = trio.current_time()
        answer = await self._threads.run(question)
        self._patience.deadline += trio.current_time() - started
        return answer
