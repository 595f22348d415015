"""The transmission phase: requests in, events out; and the bytes of every reply.

    transmission = Transmission(size, flags, structured=True, allocation=True)
    for event in transmission.receive(data):     # data may be cut anywhere
        ...                                      # and send what `data`, `hole`, `error` … return

A request that makes no sense comes out as Refused, with its reply; the stream goes on.
ProtocolError is raised when it cannot: the connection must be closed.

Invariants: every request gives exactly one event (WRITE: one Write, then its bytes as WriteData,
the last of which is marked; a refused WRITE only Refused, after its bytes were skipped); events
never name bytes outside the export; at most one request header is held.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from backyfs.nbd.protocol.constants import (
    BASE_ALLOCATION_ID,
    CHUNK_DONE,
    PAYLOAD_BYTES_MAX,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRING_BYTES_MAX,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
    Command,
    CommandFlag,
    ExportFlag,
    wire_error,
)
from backyfs.nbd.protocol.handshake import ProtocolError

_REQUEST = struct.Struct(">IHHQQI")
_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_DATA = struct.Struct(">IHHQIQ")
_HOLE = struct.Struct(">IHHQIQI")

# Plain numbers: a look at an enum's member costs as much as the rest of parsing a request.
_READ, _DISC = int(Command.READ), int(Command.DISC)
_SIZE = _REQUEST.size


class Read(NamedTuple):
    """`whole`: at most one content chunk may answer it."""

    cookie: int
    offset: int
    length: int
    whole: bool


class Write(NamedTuple):
    """`length` bytes of WriteData follow (none for 0)."""

    cookie: int
    offset: int
    length: int


class WriteData(NamedTuple):
    """Bytes for `offset`; valid until the next call of `receive`. `last`: reply now."""

    cookie: int
    offset: int
    data: memoryview
    last: bool


class Zero(NamedTuple):
    """WRITE_ZEROES or TRIM: both make bytes zero."""

    cookie: int
    offset: int
    length: int


class Status(NamedTuple):
    """BLOCK_STATUS; `one`: a single extent, not longer than `length`."""

    cookie: int
    offset: int
    length: int
    one: bool


class Cache(NamedTuple):
    """The client will read this soon."""

    cookie: int
    offset: int
    length: int


class Flush(NamedTuple):
    """Everything answered before must be kept as well as it can be."""

    cookie: int


class Refused(NamedTuple):
    """A request that makes no sense: `reply` is its answer, `error` the errno."""

    cookie: int
    reply: bytes
    error: int
    why: str


class Disconnect(NamedTuple):
    """The client is done: close."""


Event = Read | Write | WriteData | Zero | Status | Cache | Flush | Refused | Disconnect


class Transmission:
    """Requests to an export of `size` bytes with `flags`, and the replies to them.

    `structured` and `allocation` say what the handshake agreed upon.
    """

    def __init__(self, size: int, flags: ExportFlag, *, structured: bool, allocation: bool) -> None:
        self._size, self._read_only = size, ExportFlag.READ_ONLY in flags
        self.structured, self._allocation = structured, allocation
        self._allowed = _allowed_flags(flags, structured)
        self._held = bytearray()
        self._payload = 0  # bytes of a WRITE still to come
        self._write: Write | None = None  # the one they belong to
        self._skipped: Refused | None = None  # the answer when they are through, if it is refused

    @property
    def idle(self) -> bool:
        """Whether the client is between two requests, not within one."""
        return not self._held and not self._payload

    # Requests

    def receive(self, data: bytes | bytearray | memoryview) -> Iterator[Event]:
        """The events in what arrived; exhaust it before the next call. ProtocolError."""
        view = memoryview(data)
        at, end = 0, len(view)
        while at < end:
            if self._payload:
                count = min(self._payload, end - at)
                yield from self._take_payload(view[at : at + count])
                at += count
            elif self._held or end - at < _SIZE:
                count = min(_SIZE - len(self._held), end - at)
                self._held += view[at : at + count]
                at += count
                if len(self._held) == _SIZE:
                    event = self._event(_REQUEST.unpack(self._held))
                    self._held.clear()
                    if event is not None:
                        yield event
            else:
                event = self._event(_REQUEST.unpack_from(view, at))
                at += _SIZE
                if event is not None:
                    yield event

    def _event(self, request: tuple[int, int, int, int, int, int]) -> Event | None:
        magic, flags, command, cookie, offset, length = request
        if magic != REQUEST_MAGIC:
            raise ProtocolError("a request without its magic")
        if command == _READ and length <= PAYLOAD_BYTES_MAX and offset + length <= self._size:
            if not flags & ~self._allowed[_READ]:
                return Read(cookie, offset, length, bool(flags))
        elif command == _DISC:
            return Disconnect()
        return self._other(flags, command, cookie, offset, length)

    def _other(
        self, flags: int, command: int, cookie: int, offset: int, length: int
    ) -> Event | None:
        if command == Command.WRITE and length > PAYLOAD_BYTES_MAX:
            raise ProtocolError(f"a write of {length} bytes")
        refused = self._refusal(flags, command, cookie, offset, length)
        if command == Command.WRITE:
            return self._begin_write(refused, cookie, offset, length)
        if refused is not None:
            return refused
        if command in (Command.TRIM, Command.WRITE_ZEROES):
            return Zero(cookie, offset, length)
        if command == Command.BLOCK_STATUS:
            return Status(cookie, offset, length, bool(flags & CommandFlag.REQ_ONE))
        if command == Command.CACHE:
            return Cache(cookie, offset, length)
        return Flush(cookie)

    def _begin_write(
        self, refused: Refused | None, cookie: int, offset: int, length: int
    ) -> Event | None:
        self._payload = length
        if refused is not None:
            self._skipped = refused if length else None
            return None if length else refused
        self._write = Write(cookie, offset, length)
        return self._write

    def _take_payload(self, data: memoryview) -> Iterator[Event]:
        offset = 0
        if self._write is not None:
            offset = self._write.offset + self._write.length - self._payload
        self._payload -= len(data)
        if self._skipped is None:
            assert self._write is not None
            yield WriteData(self._write.cookie, offset, data, not self._payload)
        elif not self._payload:
            refused, self._skipped = self._skipped, None
            yield refused

    def _refusal(
        self, flags: int, command: int, cookie: int, offset: int, length: int
    ) -> Refused | None:
        """Why a request cannot be served; None if it can."""
        number, why = self._objection(flags, command, offset, length)
        if not number:
            return None
        return Refused(cookie, self.error(cookie, number, why), number, why)

    def _objection(self, flags: int, command: int, offset: int, length: int) -> tuple[int, str]:
        """An errno and its reason; 0 when there is nothing to object."""
        writes = command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)
        if writes and self._read_only:
            return errno.EPERM, "the export is read-only"
        if command not in self._allowed:
            return errno.EINVAL, f"unknown command {command}"
        if flags & ~self._allowed[command]:
            return errno.EINVAL, f"unknown flags {flags:#x} of command {command}"
        if command == Command.FLUSH:
            return 0, ""
        if offset + length > self._size:
            grows = command in (Command.WRITE, Command.WRITE_ZEROES)
            number = errno.ENOSPC if grows else errno.EINVAL
            return number, f"bytes {offset}+{length} lie outside the export's {self._size}"
        if command == Command.READ and length > PAYLOAD_BYTES_MAX:
            return errno.EINVAL, f"a read of {length} bytes; the most is {PAYLOAD_BYTES_MAX}"
        if command == Command.BLOCK_STATUS and not self._allocation:
            return errno.EINVAL, "base:allocation was not negotiated"
        if command == Command.BLOCK_STATUS and not length:
            return errno.EINVAL, "the status of no bytes"
        return 0, ""

    # Replies

    def done(self, cookie: int) -> bytes:
        """Success of a request other than READ and BLOCK_STATUS."""
        return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, cookie)

    def error(self, cookie: int, number: int, text: str) -> bytes:
        """Failure of a request as a whole, by errno; the text is for people."""
        if not self.structured:
            return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, wire_error(number), cookie)
        return _error_chunk(cookie, CHUNK_DONE, Chunk.ERROR, number, text)

    def error_at(
        self, cookie: int, number: int, text: str, offset: int, *, last: bool = False
    ) -> bytes:
        """A READ failed from `offset` on (structured replies only)."""
        flags = CHUNK_DONE if last else 0
        where = struct.pack(">Q", offset)
        return _error_chunk(cookie, flags, Chunk.ERROR_OFFSET, number, text, where)

    def data(self, cookie: int, offset: int, length: int, *, last: bool) -> bytes:
        """What goes before `length` bytes that answer a READ.

        A simple reply has one such header; of a structured one, `last` marks the final part.
        """
        if not self.structured:
            return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, cookie)
        return _DATA.pack(STRUCTURED_REPLY_MAGIC, last, 1, cookie, length + 8, offset)

    def hole(self, cookie: int, offset: int, length: int, *, last: bool) -> bytes:
        """`length` zeros answer a READ (structured replies only)."""
        return _HOLE.pack(STRUCTURED_REPLY_MAGIC, last, 2, cookie, 12, offset, length)

    def end(self, cookie: int) -> bytes:
        """The end of the answer to a READ that was structured."""
        return _CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, Chunk.NONE, cookie, 0)

    def status(self, cookie: int, descriptors: Sequence[tuple[int, int]]) -> bytes:
        """The answer to BLOCK_STATUS: lengths and states of extents from the request's offset."""
        flat = [number for descriptor in descriptors for number in descriptor]
        payload = struct.pack(f">I{len(flat)}I", BASE_ALLOCATION_ID, *flat)
        head = _CHUNK.pack(
            STRUCTURED_REPLY_MAGIC, CHUNK_DONE, Chunk.BLOCK_STATUS, cookie, len(payload)
        )
        return head + payload


def _error_chunk(
    cookie: int, flags: int, kind: Chunk, number: int, text: str, where: bytes = b""
) -> bytes:
    data = text.encode(errors="backslashreplace")  # a path may be no UTF-8
    message = data[:STRING_BYTES_MAX].decode(errors="ignore").encode()
    payload = struct.pack(">IH", wire_error(number), len(message)) + message + where
    return _CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(payload)) + payload


def _allowed_flags(export: ExportFlag, structured: bool) -> dict[int, int]:
    """The commands that an export has, each with the flags it may carry."""
    fua = int(CommandFlag.FUA) if ExportFlag.SEND_FUA in export else 0
    allowed = {Command.READ: fua | (CommandFlag.DF if structured else 0)}
    if structured:
        allowed[Command.BLOCK_STATUS] = fua | CommandFlag.REQ_ONE
    if ExportFlag.SEND_CACHE in export:
        allowed[Command.CACHE] = fua
    if ExportFlag.READ_ONLY not in export:
        allowed[Command.WRITE] = fua
    if ExportFlag.SEND_FLUSH in export:
        allowed[Command.FLUSH] = fua
    if ExportFlag.SEND_TRIM in export:
        allowed[Command.TRIM] = fua
    if ExportFlag.SEND_WRITE_ZEROES in export:
        allowed[Command.WRITE_ZEROES] = fua | CommandFlag.NO_HOLE
    return {int(command): int(flags) for command, flags in allowed.items()}
