"""The handshake: options of a client in, events out, until an export is open.

    handshake = Handshake(tls=False)
    send(handshake.greeting())
    handshake.receive(data)                  # as often as bytes arrive
    while event := handshake.next_event():   # None: more bytes are needed
        send(event.data)                     # a Reply; other events want an answer:
        send(handshake.accept(event, info))  # or .refuse(), .listed(), .contexts(), .begin_tls()

What is wrong but harmless is answered with the error of the specification; what makes the stream
unusable (or a client that floods us) raises ProtocolError: the connection must be closed.

Invariants: nothing of an option is acted upon before all of it is there and no more than its
limits allow; each event is answered before the next is asked for; at most one option's bytes
(64 KiB) and one read are held.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from backyfs.nbd.protocol.constants import (
    BASE_ALLOCATION,
    BASE_ALLOCATION_ID,
    BLOCK_MIN,
    BLOCK_PREFERRED,
    OPTION_BYTES_MAX,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    OPTIONS_MAX,
    OPTIONS_PER_NAME,
    PAYLOAD_BYTES_MAX,
    SERVER_GREETING,
    STRING_BYTES_MAX,
    ExportFlag,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
)

_OPTION = struct.Struct(">8sII")
_REPLY = struct.Struct(">QIII")
_U32 = struct.Struct(">I")
_ZEROES = bytes(124)
_CLIENT_FLAGS = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
_LIST_PIECE_BYTES = 64 << 10


class ProtocolError(Exception):
    """The peer broke the protocol, or a limit, such that the connection must be closed."""


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a client learns of an export: canonical name, description, size in bytes, flags."""

    name: str
    description: str
    size: int
    flags: ExportFlag


@dataclass(frozen=True, slots=True)
class Reply:
    """Bytes to send; nothing else to do."""

    data: bytes


@dataclass(frozen=True, slots=True)
class ListExports:
    """Wants `listed`."""


@dataclass(frozen=True, slots=True)
class Open:
    """GO, INFO or EXPORT_NAME: wants `accept` or `refuse`.

    `wants` are the numbers of the pieces of information asked for.
    """

    option: Option
    name: str
    wants: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class MetaContexts:
    """LIST_ or SET_META_CONTEXT of an export: wants `contexts` if it exists, else `refuse`.

    `allocation`: whether base:allocation is among what was asked for.
    """

    option: Option
    name: str
    allocation: bool


@dataclass(frozen=True, slots=True)
class StartTls:
    """Wants TLS to begin after `begin_tls` was sent."""


@dataclass(frozen=True, slots=True)
class Abort:
    """The client goes away: send `data`, then close."""

    data: bytes


Event = Reply | ListExports | Open | MetaContexts | StartTls | Abort


class _Refused(Exception):
    """An option's answer is an error."""

    def __init__(self, error: OptionReply, text: str) -> None:
        super().__init__(text)
        self.error, self.text = error, text


class Handshake:
    """The server's side of one handshake. `tls`: nothing is served before STARTTLS."""

    def __init__(self, *, tls: bool = False) -> None:
        self._tls, self._secure = tls, False
        self._buffer = bytearray()
        self._flags: HandshakeFlag | None = None
        self._options = 0
        self.told = 0
        """Most names that a list told the client; it may ask about each of them."""
        self._meta: str | None = None
        self._done = False
        self.structured = False

    # What the outside asks and says

    def greeting(self) -> bytes:
        """The first bytes of a connection."""
        flags = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        return SERVER_GREETING + struct.pack(">H", flags)

    def receive(self, data: bytes) -> None:
        """Take bytes of the client."""
        self._buffer += data

    @property
    def surplus(self) -> bytes:
        """After an export was opened: bytes that are requests already."""
        return bytes(self._buffer)

    @property
    def done(self) -> bool:
        """Whether an export was opened: the rest of the stream are requests."""
        return self._done

    def has_allocation(self, event: Open) -> bool:
        """Whether the client chose base:allocation for the export that it opens."""
        return self.structured and self._meta == event.name

    def next_event(self) -> Event | None:
        """The next thing the client wants; None when more bytes are needed. ProtocolError."""
        assert not self._done
        if self._flags is None and not self._take_flags():
            return None
        if len(self._buffer) < _OPTION.size:
            return None
        magic, option, length = _OPTION.unpack_from(self._buffer)
        if magic != OPTION_MAGIC:
            raise ProtocolError("an option without its magic")
        if length > OPTION_BYTES_MAX:
            raise ProtocolError(f"an option of {length} bytes")
        if len(self._buffer) < _OPTION.size + length:
            return None
        data = bytes(self._buffer[_OPTION.size : _OPTION.size + length])
        del self._buffer[: _OPTION.size + length]
        self._options += 1
        if self._options > (most := OPTIONS_MAX + OPTIONS_PER_NAME * self.told):
            raise ProtocolError(f"more than {most} options")
        return self._event(option, data)

    def _take_flags(self) -> bool:
        if len(self._buffer) < _U32.size:
            return False
        (flags,) = _U32.unpack_from(self._buffer)
        del self._buffer[: _U32.size]
        if flags & ~_CLIENT_FLAGS:
            raise ProtocolError(f"unknown client flags {flags:#x}")
        self._flags = HandshakeFlag(flags)
        return True

    # Options

    def _event(self, option: int, data: bytes) -> Event:
        if option == Option.EXPORT_NAME:
            return self._export_name(data)
        if self._flags is None or HandshakeFlag.FIXED_NEWSTYLE not in self._flags:
            raise ProtocolError("a client without fixed newstyle may only name an export")
        if option == Option.ABORT:
            return Abort(_reply(option, OptionReply.ACK))
        try:
            return self._negotiated(option, data)
        except _Refused as exc:
            return Reply(_reply(option, exc.error, exc.text.encode()))

    def _export_name(self, data: bytes) -> Open:
        if self._tls and not self._secure:
            raise ProtocolError("EXPORT_NAME before TLS")
        if len(data) > STRING_BYTES_MAX:
            raise ProtocolError(f"an export name of {len(data)} bytes")
        try:
            return Open(Option.EXPORT_NAME, data.decode())
        except UnicodeDecodeError as exc:
            raise ProtocolError("an export name that is not UTF-8") from exc

    def _negotiated(self, option: int, data: bytes) -> Event:
        if option == Option.STARTTLS:
            return self._start_tls(data)
        if self._tls and not self._secure:
            raise _Refused(OptionReply.ERR_TLS_REQD, "this server speaks TLS only")
        if option == Option.LIST:
            _refuse_data(data)
            return ListExports()
        if option == Option.STRUCTURED_REPLY:
            _refuse_data(data)
            self.structured = True
            return Reply(_reply(option, OptionReply.ACK))
        if option in (Option.INFO, Option.GO):
            return _parsed_open(Option(option), data)
        if option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            return self._meta_contexts(Option(option), data)
        raise _Refused(OptionReply.ERR_UNSUP, f"option {option} is not supported")

    def _start_tls(self, data: bytes) -> StartTls:
        _refuse_data(data)
        if not self._tls:
            raise _Refused(OptionReply.ERR_POLICY, "TLS is not set up on this server")
        if self._secure:
            raise _Refused(OptionReply.ERR_INVALID, "TLS is on already")
        return StartTls()

    def _meta_contexts(self, option: Option, data: bytes) -> MetaContexts:
        if option == Option.SET_META_CONTEXT:
            self._meta = None
        if not self.structured:
            raise _Refused(OptionReply.ERR_INVALID, "structured replies must be negotiated first")
        name, queries = _parsed_queries(data)
        wanted = any(_selects(query, option) for query in queries)
        everything = option == Option.LIST_META_CONTEXT and not queries
        return MetaContexts(option, name, wanted or everything)

    # Answers

    def listed(self, exports: Iterable[tuple[str, str]]) -> Iterator[bytes]:
        """The answer to ListExports: names and descriptions, in pieces to send."""
        piece, told = bytearray(), 0
        for name, description in exports:
            told += 1
            encoded = name.encode()
            text = _cut(description)
            piece += _reply(
                Option.LIST, OptionReply.SERVER, _U32.pack(len(encoded)) + encoded + text
            )
            if len(piece) >= _LIST_PIECE_BYTES:
                yield bytes(piece)
                piece.clear()
        self.told = max(self.told, told)
        piece += _reply(Option.LIST, OptionReply.ACK)
        yield bytes(piece)

    def accept(self, event: Open, info: ExportInfo) -> bytes:
        """The answer to Open for an export that is there."""
        self._done = event.option != Option.INFO
        if event.option == Option.EXPORT_NAME:
            assert self._flags is not None  # they come before any option
            zeroes = b"" if HandshakeFlag.NO_ZEROES in self._flags else _ZEROES
            return struct.pack(">QH", info.size, info.flags) + zeroes
        parts = [struct.pack(">HQH", Info.EXPORT, info.size, info.flags)]
        if Info.NAME in event.wants:
            parts.append(struct.pack(">H", Info.NAME) + info.name.encode())
        if Info.DESCRIPTION in event.wants:
            parts.append(struct.pack(">H", Info.DESCRIPTION) + _cut(info.description))
        if Info.BLOCK_SIZE in event.wants:
            sizes = (BLOCK_MIN, BLOCK_PREFERRED, PAYLOAD_BYTES_MAX)
            parts.append(struct.pack(">HIII", Info.BLOCK_SIZE, *sizes))
        replies = [_reply(event.option, OptionReply.INFO, part) for part in parts]
        return b"".join(replies) + _reply(event.option, OptionReply.ACK)

    def refuse(
        self, event: Open | MetaContexts | ListExports, error: OptionReply, text: str
    ) -> bytes:
        """The answer to an event that cannot be served. ProtocolError when there is none."""
        if isinstance(event, ListExports):
            return _reply(Option.LIST, error, _cut(text))
        if event.option == Option.EXPORT_NAME:
            raise ProtocolError(text)
        return _reply(event.option, error, _cut(text))

    def contexts(self, event: MetaContexts) -> bytes:
        """The answer to MetaContexts for an export that is there."""
        setting = event.option == Option.SET_META_CONTEXT
        if setting and event.allocation:
            self._meta = event.name
        context = _U32.pack(BASE_ALLOCATION_ID if setting else 0) + BASE_ALLOCATION.encode()
        found = _reply(event.option, OptionReply.META_CONTEXT, context) if event.allocation else b""
        return found + _reply(event.option, OptionReply.ACK)

    def begin_tls(self) -> bytes:
        """The answer to StartTls, the last bytes in clear; all that was negotiated is forgotten.

        So is what the client sent in clear behind the option.
        """
        self._secure = True
        self.structured, self._meta = False, None
        self._buffer.clear()
        return _reply(Option.STARTTLS, OptionReply.ACK)


def _reply(option: int, kind: OptionReply, data: bytes = b"") -> bytes:
    return _REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def _cut(text: str) -> bytes:
    """Text as a string of the protocol; what is too long loses its end."""
    data = text.encode(errors="backslashreplace")  # a path may be no UTF-8
    return data[:STRING_BYTES_MAX].decode(errors="ignore").encode()


def _refuse_data(data: bytes) -> None:
    if data:
        raise _Refused(OptionReply.ERR_INVALID, "this option has no data")


def _name(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        raise _Refused(OptionReply.ERR_UNKNOWN, "an export name that is not UTF-8") from exc


class _Fields:
    """The fields of an option, one after the other; any that does not fit is refused."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, size: int) -> int:
        return int.from_bytes(self.bytes(size), "big")

    def string(self) -> bytes:
        length = self.number(4)
        if length > STRING_BYTES_MAX:
            raise _Refused(OptionReply.ERR_INVALID, f"a string of {length} bytes")
        return self.bytes(length)

    def bytes(self, length: int) -> bytes:
        found = self._data[self._at : self._at + length]
        if len(found) < length:
            raise _Refused(OptionReply.ERR_INVALID, "the option is too short for its fields")
        self._at += length
        return found

    def end(self) -> None:
        if self._at != len(self._data):
            raise _Refused(OptionReply.ERR_INVALID, "the option is too long for its fields")


def _parsed_open(option: Option, data: bytes) -> Open:
    fields = _Fields(data)
    name = fields.string()
    wants = frozenset(fields.number(2) for _ in range(fields.number(2)))
    fields.end()
    return Open(option, _name(name), wants)


def _parsed_queries(data: bytes) -> tuple[str, list[bytes]]:
    fields = _Fields(data)
    name = fields.string()
    queries = []
    for _ in range(fields.number(4)):
        queries.append(fields.string())
        if b":" not in queries[-1]:
            raise _Refused(OptionReply.ERR_INVALID, "a query without a namespace")
    fields.end()
    return _name(name), queries


def _selects(query: bytes, option: Option) -> bool:
    """Whether a query means base:allocation; all of a namespace may only be listed."""
    return query == BASE_ALLOCATION.encode() or (
        option == Option.LIST_META_CONTEXT and query == b"base:"
    )
