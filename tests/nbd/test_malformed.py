"""What a server answers to nonsense, over real sockets; and that it serves others all the while."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Iterator

import pytest

from backyfs.nbd.protocol.constants import Command, CommandFlag, Option, OptionReply
from backyfs.reader.overlay import Scratch
from tests.nbd.running import Running, running
from tests.nbd.wire import (
    ACK,
    Client,
    client_flags,
    connected,
    context_data,
    open_data,
    option,
    request,
    string,
)
from tests.reader.stores import content, make_vm

MIB = 1 << 20
IMAGE = content(40, seed=4, tail=777)
INVALID = int(OptionReply.ERR_INVALID)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    base = tmp_path_factory.mktemp("malformed")
    make_vm(base, "web01", IMAGE)
    with running(base, scratch=Scratch(tmp_path_factory.mktemp("scratch"))) as found:
        yield found


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    """A connection; and somebody else's, which must be served before and after."""
    with server.attached("web01/latest") as other:
        assert other.read(5, 1000) == IMAGE[5:1005]
        with connected(server.address) as found:
            yield found
        assert other.read(100_000, 1000) == IMAGE[100_000:101_000]
        assert other.disconnect()


# ---- the handshake -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        client_flags(0) + option(Option.LIST),
        client_flags(0xFF),
        client_flags() + b"IHAVENOT" + bytes(8),
        client_flags() + option(Option.GO, length=2**31 - 1),
        client_flags() + option(Option.EXPORT_NAME, b"nope"),
        client_flags() + option(Option.EXPORT_NAME, b"\xff\xff"),
        client_flags() + option(Option.EXPORT_NAME, b"x" * 5000),
        client_flags() + option(99) * 65,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
    ids=lambda said: repr(said[:24]),
)
def test_what_cannot_be_answered_closes(client: Client, said: bytes) -> None:
    client.send(said)
    assert client.is_closed()


@pytest.mark.parametrize(
    ("number", "data", "error"),
    [
        (Option.LIST, b"x", INVALID),
        (Option.INFO, b"abc", INVALID),
        (Option.INFO, struct.pack(">I", 2**32 - 1) + bytes(2), INVALID),
        (Option.INFO, string("x" * 5000) + bytes(2), INVALID),
        (Option.INFO, open_data(b"\xff\xfe"), OptionReply.ERR_UNKNOWN),
        (Option.INFO, open_data("web01/nope"), OptionReply.ERR_UNKNOWN),
        (Option.GO, open_data("../web01"), OptionReply.ERR_UNKNOWN),
        (Option.GO, open_data(""), None),
        (Option.INFO, open_data("x" * 4096), OptionReply.ERR_UNKNOWN),
        (11, b"", OptionReply.ERR_UNSUP),
        (4711, b"payload", OptionReply.ERR_UNSUP),
        (Option.SET_META_CONTEXT, context_data("web01/latest", "base:allocation"), INVALID),
        (Option.STARTTLS, b"", OptionReply.ERR_POLICY),
    ],
)
def test_what_makes_no_sense_is_refused_with_words(
    client: Client, number: int, data: bytes, error: int | None
) -> None:
    client.hello()
    kind, _ = client.ask(number, data)
    if error is None:
        assert kind == ACK  # the only export
        return
    assert kind == error
    assert client.text
    assert client.open("web01/latest", hello=False).size == len(IMAGE)
    assert client.read(0, 512) == IMAGE[:512]


def test_a_context_of_an_unknown_export_is_unknown(client: Client) -> None:
    client.hello()
    client.structure()
    for number in (Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT):
        assert client.ask(number, context_data("web01/nope"))[0] == OptionReply.ERR_UNKNOWN


@pytest.mark.parametrize("flags", [0, 1, 3])
def test_export_name_of_old_clients(client: Client, flags: int) -> None:
    client.hello(flags)
    client.send(option(Option.EXPORT_NAME, b"web01/latest"))
    size, _ = struct.unpack(">QH", client.receive(10))
    assert size == len(IMAGE)
    if not flags & 2:
        assert client.receive(124) == bytes(124)
    assert client.read(1000, 70_000) == IMAGE[1000:71_000]


def test_abort_is_answered_and_closes(client: Client) -> None:
    client.hello()
    assert client.ask(Option.ABORT)[0] == ACK
    assert client.is_closed()


def test_all_at_once(client: Client) -> None:
    """A client that waits for nothing: options, GO and requests in one piece."""
    said = client_flags() + option(Option.GO, open_data("web01/latest"))
    client.send(said + request(Command.READ, 3, 5) + request(Command.DISC))
    assert client.receive(18)[:8] == b"NBDMAGIC"
    while client.reply()[1] != ACK:
        pass
    assert client.answer(3, 5).data == IMAGE[3:8]
    assert client.is_closed()


# ---- requests ------------------------------------------------------------------------------------

BAD_REQUESTS = [
    (Command.READ, len(IMAGE), 1, 0, errno.EINVAL),
    (Command.READ, len(IMAGE) - 1, 2, 0, errno.EINVAL),
    (Command.READ, 2**64 - 1, 1, 0, errno.EINVAL),
    (Command.READ, 0, 33 * MIB, 0, errno.EINVAL),
    (Command.READ, 0, 80 * MIB, 0, errno.EINVAL),
    (Command.READ, 0, 1, 1 << 15, errno.EINVAL),
    (Command.READ, 0, 1, int(CommandFlag.FUA), errno.EINVAL),
    (Command.TRIM, 0, 1, 0, errno.EPERM),
    (Command.WRITE_ZEROES, 0, 1, 0, errno.EPERM),
    (Command.FLUSH, 0, 0, 0, errno.EINVAL),
    (4711, 0, 0, 0, errno.EINVAL),
]


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(("command", "offset", "length", "flags", "error"), BAD_REQUESTS)
def test_a_bad_request_is_refused_and_the_next_one_served(
    client: Client,
    structured: bool,
    command: int,
    offset: int,
    length: int,
    flags: int,
    error: int,
) -> None:
    client.open("web01/latest", structured=structured)
    found = client.call(command, offset, length, flags=flags)
    assert found.error == error
    assert bool(found.texts) == structured
    assert client.read(7, 3000) == IMAGE[7:3007]


def test_block_status_without_context_is_refused(client: Client) -> None:
    client.open("web01/latest", allocation=False)
    assert client.call(Command.BLOCK_STATUS, 0, 1).error == errno.EINVAL
    assert client.read(0, 1) == IMAGE[:1]


@pytest.mark.parametrize("structured", [True, False])
def test_a_read_of_nothing_succeeds(client: Client, structured: bool) -> None:
    client.open("web01/latest", structured=structured)
    assert client.read(0, 0) == b""
    assert client.read(len(IMAGE), 0) == b""
    assert client.read(5, 5) == IMAGE[5:10]


def test_a_write_to_a_read_only_export_is_skipped(client: Client) -> None:
    client.open("web01/latest")
    payload = bytes(3 * MIB)
    assert client.call(Command.WRITE, 0, len(payload), payload=payload).error == errno.EPERM
    assert client.read(0, 100) == IMAGE[:100]


@pytest.mark.parametrize("name", ["web01/latest", "web01/latest@rw"])
@pytest.mark.parametrize(
    "said",
    [
        request(Command.READ, 0, 1, magic=0x12345678),
        request(Command.WRITE, 0, 2**32 - 1),
        request(Command.WRITE, 0, 33 * MIB),
    ],
)
def test_what_breaks_the_stream_closes_after_earlier_answers(
    client: Client, name: str, said: bytes
) -> None:
    client.open(name)
    client.send(request(Command.READ, 0, 4) + said)
    assert client.answer(0, 4).data == IMAGE[:4]
    assert client.is_closed()


def test_disconnect_closes(client: Client) -> None:
    assert client.open("web01/latest").disconnect()


@pytest.mark.parametrize("seed", range(4))
def test_fuzz(server: Running, seed: int) -> None:
    """Random bytes at every stage end in a closed connection or an answer, never in silence."""
    rng = random.Random(seed)
    with server.attached("web01/latest") as other:
        for _ in range(25):
            with connected(server.address) as client:
                if rng.random() < 0.7:
                    client.open("web01/latest", structured=rng.random() < 0.5)
                client.send(rng.randbytes(rng.randrange(1, 2000)))
                client.sock.shutdown(1)
                assert client.is_closed()
        assert other.read(0, 1000) == IMAGE[:1000]
