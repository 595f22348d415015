"""The bytes of a connection, in clear or through TLS, first in trio and then in a thread.

The handshake speaks through a Link (trio). What comes behind it goes through the Channel that the
link turns into: blocking, for the one thread that serves the connection. TLS runs over memory
buffers in both, so that one TLS session spans the two and no thread is tied up by a client that
does not finish its TLS handshake.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import struct
from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import trio

from backyfs.store.contract import Buffer

_RECEIVE_BYTES = 64 << 10
_BUFFERS_MAX = 512
"""Buffers of one sendmsg(); the kernel takes up to 1024."""


class Stalled(Exception):
    """The peer did not take or send a byte in time."""


class Idle(Exception):
    """Nothing arrived for a while, which may be all right."""


class Channel(Protocol):
    """Blocking; for one thread. OSError when the connection breaks, Stalled."""

    def receive(self, buffer: memoryview) -> int:
        """Wait for bytes, put them into `buffer`; 0 at the end of the stream. Idle."""

    def send(self, buffers: Sequence[Buffer], *, more: bool = False) -> None:
        """Send all of the buffers; `more`: something follows at once."""

    def end(self) -> None:
        """Say that nothing follows, as far as the client listens."""

    @property
    def socket(self) -> socket.socket | None:
        """The socket, where its bytes are those of the stream (for sendfile)."""


class Link(Protocol):
    """A connection in its handshake."""

    async def receive(self) -> bytes:
        """Some bytes; none at the end of the stream."""

    async def send(self, data: bytes) -> None:
        """Send all of it."""

    def channel(self, sock: socket.socket) -> Channel:
        """What to use from now on, in a thread; `sock` is the connection's, blocking."""


# In clear


class PlainLink:
    """A trio stream as it is."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream

    async def receive(self) -> bytes:
        return bytes(await self.stream.receive_some(_RECEIVE_BYTES))

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    def channel(self, sock: socket.socket) -> Channel:
        return PlainChannel(sock)


class PlainChannel:
    """A blocking socket as it is."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    @property
    def socket(self) -> socket.socket | None:
        return self._socket

    def receive(self, buffer: memoryview) -> int:
        return _receive(self._socket, buffer)

    def send(self, buffers: Sequence[Buffer], *, more: bool = False) -> None:
        flags = socket.MSG_MORE if more else 0
        for start in range(0, len(buffers), _BUFFERS_MAX):
            self._send(buffers[start : start + _BUFFERS_MAX], flags)

    def end(self) -> None:
        """Nothing to do: closing says it."""

    def _send(self, buffers: Sequence[Buffer], flags: int) -> None:
        total = sum(map(len, buffers))
        with _stalling():
            sent = self._socket.sendmsg(buffers, (), flags)
            while sent < total:
                buffers = list(_behind(buffers, sent))
                total -= sent
                sent = self._socket.sendmsg(buffers, (), flags)


def _behind(buffers: Iterable[Buffer], count: int) -> Iterable[Buffer]:
    """What is left of buffers when the first `count` bytes are gone."""
    for buffer in buffers:
        if count >= len(buffer):
            count -= len(buffer)
        else:
            yield memoryview(buffer)[count:] if count else buffer
            count = 0


# TLS


class TlsLink:
    """TLS over a trio stream; `begin` first."""

    def __init__(self, stream: trio.SocketStream, context: ssl.SSLContext) -> None:
        self.stream = stream
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._session = context.wrap_bio(self._in, self._out, server_side=True)

    async def begin(self) -> None:
        """The TLS handshake. ssl.SSLError, or trio.BrokenResourceError when the client left."""
        while True:
            try:
                self._session.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._flush()
                data = await self.stream.receive_some(_RECEIVE_BYTES)
                if not data:
                    raise trio.BrokenResourceError("the client left within TLS") from None
                self._in.write(data)
            except ssl.SSLError:
                with contextlib.suppress(trio.BrokenResourceError):
                    await self._flush()  # the alert that says why
                raise
        await self._flush()

    async def _flush(self) -> None:
        data = self._out.read()
        if data:
            await self.stream.send_all(data)

    async def receive(self) -> bytes:
        while True:
            try:
                return self._session.read(_RECEIVE_BYTES)
            except ssl.SSLWantReadError:
                await self._flush()
                data = await self.stream.receive_some(_RECEIVE_BYTES)
                if not data:
                    return b""
                self._in.write(data)
            except ssl.SSLZeroReturnError:
                return b""

    async def send(self, data: bytes) -> None:
        self._session.write(data)
        await self._flush()

    def channel(self, sock: socket.socket) -> Channel:
        return TlsChannel(sock, self._session, self._in, self._out)


class TlsChannel:
    """The TLS session of a link, over the blocking socket."""

    def __init__(
        self,
        sock: socket.socket,
        session: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
    ) -> None:
        self._socket, self._session = sock, session
        self._in, self._out = incoming, outgoing
        self._raw = memoryview(bytearray(_RECEIVE_BYTES))

    @property
    def socket(self) -> socket.socket | None:
        return None

    def receive(self, buffer: memoryview) -> int:
        while True:
            try:
                # With a buffer, it returns the count.
                return cast("int", self._session.read(len(buffer), cast("bytearray", buffer)))
            except ssl.SSLWantReadError:
                self._flush()
                count = _receive(self._socket, self._raw)
                if not count:
                    return 0
                self._in.write(self._raw[:count])
            except ssl.SSLZeroReturnError:
                return 0

    def send(self, buffers: Sequence[Buffer], *, more: bool = False) -> None:
        for buffer in buffers:
            if len(buffer):
                self._session.write(buffer)
            if self._out.pending >= _RECEIVE_BYTES:
                self._flush()
        if not more:
            self._flush()

    def end(self) -> None:
        """Tell the client that the stream was not cut off."""
        with contextlib.suppress(OSError):  # wants the client's answer, too; we do not
            self._session.unwrap()
        with contextlib.suppress(OSError, Stalled):
            self._flush()

    def _flush(self) -> None:
        if self._out.pending:
            with _stalling():
                _send_all(self._socket, self._out.read())


def _send_all(sock: socket.socket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[sock.send(view) :]


# Sockets


def _receive(sock: socket.socket, buffer: memoryview) -> int:
    try:
        return sock.recv_into(buffer)
    except BlockingIOError:
        raise Idle from None


class _stalling(contextlib.AbstractContextManager[None]):  # noqa: N801 - used like a function
    """A send that made no progress for the time set with `patient` is Stalled."""

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if isinstance(exc, BlockingIOError):
            raise Stalled("the client takes no bytes") from None


def blocking(stream: trio.SocketStream, *, receive_s: float, send_s: float) -> socket.socket:
    """A blocking socket of a connection that trio no longer uses; the caller closes it.

    Waiting for bytes ends with Idle after `receive_s`, sending with Stalled when nothing could be
    sent for `send_s`.
    """
    sock = socket.socket(fileno=os.dup(stream.socket.fileno()))
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(receive_s))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(send_s))
    return sock


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return struct.pack("@ll", whole, int((seconds - whole) * 1_000_000))


_KEEPALIVE_IDLE_S, _KEEPALIVE_INTERVAL_S, _KEEPALIVE_PROBES = 60, 15, 4
_UNACKNOWLEDGED_MS = 120_000


def keep_alive(stream: trio.SocketStream) -> None:
    """Have the kernel find out when the other end is gone without a word (TCP only)."""
    sock = stream.socket
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)


def shut(sock: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    """Wake whoever waits in a connection; harmless when it is gone already."""
    try:
        sock.shutdown(how)
    except OSError as exc:
        if exc.errno != errno.ENOTCONN:
            raise
