"""A client of the NBD protocol that may be as rude as a test wants; and its bytes by themselves."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from backyfs.nbd.protocol.constants import Chunk, Command, Info, Option, OptionReply

PATIENCE_S = 20.0

FIXED, NO_ZEROES = 1, 2
OPTION_MAGIC = b"IHAVEOPT"
ACK = int(OptionReply.ACK)


# ---- bytes ---------------------------------------------------------------------------------------


def client_flags(flags: int = FIXED | NO_ZEROES) -> bytes:
    return struct.pack(">I", flags)


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return OPTION_MAGIC + struct.pack(">II", number, size) + data


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(data)) + data


def open_data(name: str | bytes, wants: tuple[int, ...] = ()) -> bytes:
    """The data of GO and INFO."""
    return string(name) + struct.pack(f">H{len(wants)}H", len(wants), *wants)


def context_data(name: str, *queries: str) -> bytes:
    """The data of LIST_ and SET_META_CONTEXT."""
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


def request(
    command: int,
    offset: int = 0,
    length: int = 0,
    *,
    cookie: int = 1,
    flags: int = 0,
    payload: bytes = b"",
    magic: int = 0x25609513,
) -> bytes:
    return struct.pack(">IHHQQI", magic, flags, command, cookie, offset, length) + payload


# ---- a connection --------------------------------------------------------------------------------


@dataclass
class Reply:
    """The answer to a request, put together."""

    error: int = 0
    data: bytearray = field(default_factory=bytearray)
    texts: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    descriptors: list[tuple[int, int]] = field(default_factory=list)


class Client:
    """A blocking connection; every wait ends after PATIENCE_S with an error."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.structured = False
        self.size = 0
        self.flags = 0
        self.name = ""
        sock.settimeout(PATIENCE_S)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self, count: int) -> bytes:
        """Exactly `count` bytes. EOFError when the server closes before."""
        data = bytearray()
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise EOFError(f"{len(data)} of {count} bytes")
            data += piece
        return bytes(data)

    def is_closed(self) -> bool:
        """Wait for the server's end of the connection; whatever it still sends is dropped."""
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False
        return True

    # The handshake

    def hello(self, flags: int = FIXED | NO_ZEROES) -> None:
        assert self.receive(16) == b"NBDMAGICIHAVEOPT"
        assert struct.unpack(">H", self.receive(2)) == (3,)
        self.send(client_flags(flags))

    def reply(self) -> tuple[int, int, bytes]:
        """One reply to an option: its option, type and data."""
        magic, number, kind, length = struct.unpack(">QIII", self.receive(20))
        assert magic == 0x3E889045565A9
        return number, kind, self.receive(length)

    def ask(self, number: int, data: bytes = b"") -> tuple[int, list[tuple[int, bytes]]]:
        """Send an option; the type of its last reply, and those before."""
        self.send(option(number, data))
        before: list[tuple[int, bytes]] = []
        while True:
            answered, kind, found = self.reply()
            assert answered == number
            if kind == ACK or kind >= 1 << 31:
                self.text = found.decode() if kind != ACK else ""
                return kind, before
            before.append((kind, found))

    def structure(self) -> None:
        assert self.ask(Option.STRUCTURED_REPLY)[0] == ACK
        self.structured = True

    def open(
        self, name: str, *, structured: bool = True, allocation: bool = True, hello: bool = True
    ) -> Client:
        """All of a usual handshake, with GO."""
        if hello:
            self.hello()
        if structured:
            self.structure()
            if allocation:
                data = context_data(name, "base:allocation")
                kind, found = self.ask(Option.SET_META_CONTEXT, data)
                assert (kind, len(found)) == (ACK, 1)
        kind, found = self.ask(Option.GO, open_data(name, (Info.NAME, Info.BLOCK_SIZE)))
        assert kind == ACK, self.text
        for _, data in found:
            (what,) = struct.unpack_from(">H", data)
            if what == Info.EXPORT:
                self.size, self.flags = struct.unpack(">QH", data[2:])
            elif what == Info.NAME:
                self.name = data[2:].decode()
        return self

    # Requests

    def call(self, command: int, offset: int = 0, length: int = 0, **more: object) -> Reply:
        """Make a request and wait for all of its answer."""
        self.send(request(command, offset, length, **more))  # type: ignore[arg-type]
        return self.answer(offset, length if command == Command.READ else 0)

    def answer(self, offset: int = 0, length: int = 0) -> Reply:
        """The next answer; of a READ of `length` bytes at `offset`."""
        found = Reply(data=bytearray(length))
        covered = 0
        while True:
            (magic,) = struct.unpack(">I", self.receive(4))
            if magic == 0x67446698:
                found.error, _ = struct.unpack(">IQ", self.receive(12))
                if not found.error and length:
                    assert not self.structured
                    found.data[:] = self.receive(length)
                return found
            assert magic == 0x668E33EF
            flags, kind, _, size = struct.unpack(">HHQI", self.receive(16))
            covered += self._chunk(found, kind, self.receive(size), offset)
            if flags & 1:
                assert found.error or covered == length
                return found

    def _chunk(self, found: Reply, kind: int, payload: bytes, offset: int) -> int:
        found.kinds.append(kind)
        if kind == Chunk.OFFSET_DATA:
            (at,) = struct.unpack_from(">Q", payload)
            found.data[at - offset : at - offset + len(payload) - 8] = payload[8:]
            return len(payload) - 8
        if kind == Chunk.OFFSET_HOLE:
            at, count = struct.unpack(">QI", payload)
            return int(count)
        if kind == Chunk.BLOCK_STATUS:
            numbers = struct.unpack(f">{len(payload) // 4}I", payload)
            assert numbers[0] == 1
            found.descriptors = list(zip(numbers[1::2], numbers[2::2], strict=True))
        elif kind >= 1 << 15:
            found.error, length = struct.unpack_from(">IH", payload)
            found.texts.append(payload[6 : 6 + length].decode())
            if kind == Chunk.ERROR_OFFSET:
                found.offsets += struct.unpack(">Q", payload[6 + length :])
        else:
            assert kind == Chunk.NONE
        return 0

    def read(self, offset: int, length: int, **more: object) -> bytes:
        found = self.call(Command.READ, offset, length, **more)
        assert not found.error, found.texts
        return bytes(found.data)

    def disconnect(self) -> bool:
        """Say goodbye; whether the server closes."""
        self.send(request(Command.DISC))
        return self.is_closed()


@contextlib.contextmanager
def connected(address: tuple[str, int] | str) -> Iterator[Client]:
    """A connection to a TCP address or a unix socket."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(address)
        yield Client(sock)
