"""The transmission phase as bytes and events, without a socket."""

from __future__ import annotations

import errno
import random
import struct
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backyfs.nbd.protocol.constants import Command, CommandFlag, ExportFlag, wire_error
from backyfs.nbd.protocol.handshake import ProtocolError
from backyfs.nbd.protocol.transmission import (
    Cache,
    Disconnect,
    Event,
    Flush,
    Read,
    Refused,
    Status,
    Transmission,
    Write,
    WriteData,
    Zero,
)
from tests.nbd.wire import request

MIB = 1 << 20
SIZE = 100 * MIB
READ_ONLY = ExportFlag.HAS_FLAGS | ExportFlag.READ_ONLY | ExportFlag.SEND_DF | ExportFlag.SEND_CACHE
WRITABLE = (
    ExportFlag.HAS_FLAGS
    | ExportFlag.SEND_DF
    | ExportFlag.SEND_CACHE
    | ExportFlag.SEND_FLUSH
    | ExportFlag.SEND_FUA
    | ExportFlag.SEND_TRIM
    | ExportFlag.SEND_WRITE_ZEROES
)


def made(
    flags: ExportFlag = READ_ONLY, *, structured: bool = True, allocation: bool = True
) -> Transmission:
    return Transmission(SIZE, flags, structured=structured, allocation=allocation)


def events(transmission: Transmission, *data: bytes) -> list[Event]:
    return list(transmission.receive(b"".join(data)))


def one(transmission: Transmission, *data: bytes) -> Event:
    (event,) = events(transmission, *data)
    return event


def error_of(event: Event) -> int:
    assert isinstance(event, Refused)
    return event.error


# ---- requests ------------------------------------------------------------------------------------


def test_requests_become_events() -> None:
    found = events(
        made(WRITABLE),
        request(Command.READ, 5, 10, cookie=1),
        request(Command.READ, 5, 10, cookie=2, flags=CommandFlag.DF),
        request(Command.READ, 0, 0, cookie=3),
        request(Command.WRITE, 7, 3, cookie=4, payload=b"abc"),
        request(Command.FLUSH, cookie=5),
        request(Command.TRIM, 0, SIZE, cookie=6),
        request(Command.CACHE, 0, SIZE, cookie=7),
        request(Command.WRITE_ZEROES, 8, 9, cookie=8, flags=CommandFlag.NO_HOLE),
        request(Command.BLOCK_STATUS, 0, SIZE, cookie=9, flags=CommandFlag.REQ_ONE),
        request(Command.WRITE, SIZE, 0, cookie=10),
        request(Command.DISC, cookie=11),
    )
    assert found == [
        Read(1, 5, 10, False),
        Read(2, 5, 10, True),
        Read(3, 0, 0, False),
        Write(4, 7, 3),
        WriteData(4, 7, memoryview(b"abc"), True),
        Flush(5),
        Zero(6, 0, SIZE),
        Cache(7, 0, SIZE),
        Zero(8, 8, 9),
        Status(9, 0, SIZE, True),
        Write(10, SIZE, 0),
        Disconnect(),
    ]


@pytest.mark.parametrize("command", list(Command))
def test_where_fua_is_offered_every_command_may_carry_it(command: Command) -> None:
    payload = b"x" if command == Command.WRITE else b""
    data = request(command, 0, 1, flags=CommandFlag.FUA, payload=payload)
    assert not isinstance(events(made(WRITABLE), data)[0], Refused)
    if command != Command.DISC:
        number = errno.EPERM if command in (1, 4, 6) else errno.EINVAL
        assert error_of(events(made(READ_ONLY), data)[0]) == number


@pytest.mark.parametrize(
    ("command", "offset", "length", "error"),
    [
        (Command.READ, SIZE, 1, errno.EINVAL),
        (Command.READ, SIZE - 1, 2, errno.EINVAL),
        (Command.READ, 2**64 - 1, 1, errno.EINVAL),
        (Command.READ, 2**64 - 1, 2**32 - 1, errno.EINVAL),
        (Command.READ, 0, 33 * MIB, errno.EINVAL),
        (Command.READ, 0, 80 * MIB, errno.EINVAL),
        (Command.TRIM, SIZE, 1, errno.EINVAL),
        (Command.CACHE, SIZE, 1, errno.EINVAL),
        (Command.BLOCK_STATUS, SIZE, 1, errno.EINVAL),
        (Command.BLOCK_STATUS, 0, 0, errno.EINVAL),
        (Command.WRITE_ZEROES, SIZE, 1, errno.ENOSPC),
        (Command.WRITE_ZEROES, 2**64 - 1, 1, errno.ENOSPC),
        (9, 0, 0, errno.EINVAL),
        (0xFFFF, 0, 0, errno.EINVAL),
    ],
)
def test_what_lies_outside_is_refused(command: int, offset: int, length: int, error: int) -> None:
    transmission = made(WRITABLE)
    assert error_of(one(transmission, request(command, offset, length))) == error
    assert transmission.idle


def test_the_longest_read_is_allowed() -> None:
    assert one(made(), request(Command.READ, 0, 32 * MIB)) == Read(1, 0, 32 * MIB, False)


@pytest.mark.parametrize("command", [Command.READ, Command.BLOCK_STATUS, Command.CACHE])
@pytest.mark.parametrize("flags", [1 << 1, 1 << 4, 1 << 5, 1 << 15])
def test_unknown_flags_are_refused(command: Command, flags: int) -> None:
    assert error_of(one(made(), request(command, 0, 1, flags=flags))) == errno.EINVAL


def test_what_was_not_negotiated_is_refused() -> None:
    simple = made(structured=False, allocation=False)
    status = request(Command.BLOCK_STATUS, 0, 1)
    assert error_of(one(simple, status)) == errno.EINVAL
    assert error_of(one(simple, request(Command.READ, 0, 1, flags=CommandFlag.DF))) == errno.EINVAL
    assert error_of(one(made(allocation=False), status)) == errno.EINVAL
    assert error_of(one(made(), request(Command.FLUSH))) == errno.EINVAL


@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
def test_writing_to_a_read_only_export_is_not_permitted(command: Command) -> None:
    payload = b"abcd" if command == Command.WRITE else b""
    transmission = made()
    found = events(transmission, request(command, 0, 4, payload=payload), request(0, 0, 1))
    assert error_of(found[0]) == errno.EPERM
    assert found[1:] == [Read(1, 0, 1, False)]


def test_a_refused_write_is_answered_when_its_bytes_are_through() -> None:
    transmission = made()
    assert events(transmission, request(Command.WRITE, 0, 4, payload=b"ab")) == []
    within = transmission.idle
    assert error_of(one(transmission, b"cd")) == errno.EPERM
    assert (within, transmission.idle) == (False, True)
    assert error_of(one(transmission, request(Command.WRITE, 0, 0))) == errno.EPERM


def test_a_write_beyond_the_end_has_no_space() -> None:
    data = request(Command.WRITE, SIZE - 1, 2, payload=b"ab")
    assert error_of(one(made(WRITABLE), data)) == errno.ENOSPC


@pytest.mark.parametrize("flags", [READ_ONLY, WRITABLE])
@pytest.mark.parametrize("length", [32 * MIB + 1, 2**32 - 1])
def test_a_huge_write_closes(flags: ExportFlag, length: int) -> None:
    with pytest.raises(ProtocolError, match="bytes"):
        events(made(flags), request(Command.WRITE, 0, length))


def test_bad_magic_closes_after_what_came_before() -> None:
    found = made().receive(request(0, 0, 1) + request(0, 0, 1, magic=0x25609514))
    assert next(found) == Read(1, 0, 1, False)
    with pytest.raises(ProtocolError, match="magic"):
        list(found)


def test_a_refusal_keeps_the_cookie() -> None:
    event = one(made(structured=False), request(9, cookie=0xDEADBEEFCAFE))
    assert isinstance(event, Refused)
    assert event.reply == struct.pack(">IIQ", 0x67446698, 22, 0xDEADBEEFCAFE)
    event = one(made(), request(9, cookie=0xDEADBEEFCAFE))
    assert isinstance(event, Refused)
    magic, flags, kind, cookie, length = struct.unpack_from(">IHHQI", event.reply)
    assert (magic, flags, kind, cookie) == (0x668E33EF, 1, (1 << 15) + 1, 0xDEADBEEFCAFE)
    error, size = struct.unpack_from(">IH", event.reply, 20)
    assert (error, size) == (22, length - 6)
    assert event.reply[26:].decode() == event.why


# ---- replies -------------------------------------------------------------------------------------


def test_replies_have_the_bytes_of_the_specification() -> None:
    simple, structured = made(structured=False), made()
    assert simple.data(7, 100, 5, last=True) == struct.pack(">IIQ", 0x67446698, 0, 7)
    assert simple.error(7, errno.EIO, "text") == struct.pack(">IIQ", 0x67446698, 5, 7)
    assert structured.done(7) == struct.pack(">IIQ", 0x67446698, 0, 7)
    head = ">IHHQI"
    magic = 0x668E33EF
    assert structured.data(7, 100, 5, last=False) == struct.pack(
        head + "Q", magic, 0, 1, 7, 13, 100
    )
    assert structured.hole(7, 100, 5, last=True) == struct.pack(
        head + "QI", magic, 1, 2, 7, 12, 100, 5
    )
    assert structured.end(7) == struct.pack(head, magic, 1, 0, 7, 0)
    assert structured.error_at(7, errno.EIO, "bad", 100) == (
        struct.pack(head + "IH", magic, 0, (1 << 15) + 2, 7, 17, 5, 3)
        + b"bad"
        + struct.pack(">Q", 100)
    )
    assert structured.status(7, [(10, 0), (20, 3)]) == struct.pack(
        head + "5I", magic, 1, 5, 7, 20, 1, 10, 0, 20, 3
    )


def test_a_text_is_cut_between_characters() -> None:
    reply = made().error(1, errno.EIO, "é" * 4000)
    (size,) = struct.unpack_from(">H", reply, 24)
    assert size == 4096
    assert reply[26:].decode() == "é" * 2048


def test_a_text_that_is_no_utf_8_is_told_as_well_as_can_be() -> None:
    assert made().error(7, errno.EIO, "b\udcff").endswith(b"b\\udcff")


def test_only_errors_of_the_specification_go_over_the_wire() -> None:
    assert {wire_error(number) for number in range(200)} == {1, 5, 12, 22, 28, 75, 95, 108}
    assert wire_error(errno.ENOENT) == 5
    assert wire_error(errno.EDQUOT) == 28
    assert wire_error(errno.ESHUTDOWN) == 108


# ---- any split, any bytes ------------------------------------------------------------------------

_REQUESTS = st.lists(
    st.one_of(
        st.builds(
            request,
            st.sampled_from([0, 3, 4, 5, 6, 7, 9]),
            st.sampled_from([0, 4096, SIZE - 1, SIZE, 2**64 - 1]),
            st.sampled_from([0, 1, 4096, 33 * MIB]),
            cookie=st.integers(0, 2**64 - 1),
            flags=st.sampled_from([0, 1, 2, 4, 8, 1 << 9]),
        ),
        st.builds(
            lambda payload, offset, cookie: request(
                1, offset, len(payload), cookie=cookie, payload=payload
            ),
            st.binary(max_size=100),
            st.sampled_from([0, SIZE - 50, SIZE]),
            st.integers(0, 2**64 - 1),
        ),
    ),
    max_size=12,
)


def digest(found: list[Event]) -> list[tuple[object, ...]]:
    """Events with the bytes of each WRITE joined: where they are cut is not the protocol's."""
    joined: list[tuple[object, ...]] = []
    data = b""
    for event in found:
        if isinstance(event, WriteData):
            data += event.data
            if event.last:
                joined.append(("data", event.cookie, event.offset + len(event.data), data))
                data = b""
        else:
            joined.append((type(event).__name__, *event))
    return joined


@given(_REQUESTS, st.lists(st.integers(0, 10_000), max_size=30), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_split_of_the_bytes_gives_the_same(
    requests: list[bytes], cuts: list[int], writable: bool
) -> None:
    data = b"".join(requests)
    flags = WRITABLE if writable else READ_ONLY
    whole = digest(events(made(flags), data))
    transmission = made(flags)
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    found: list[tuple[object, ...]] = []
    kept: list[Event] = []
    for start, end in pairwise(places):
        kept += [
            event._replace(data=memoryview(bytes(event.data)))
            if isinstance(event, WriteData)
            else event
            for event in transmission.receive(data[start:end])
        ]
    found = digest(kept)
    assert found == whole
    assert transmission.idle
    answered = [entry for entry in whole if entry[0] != "data"]
    assert len(answered) == len(requests)


@pytest.mark.parametrize("seed", range(6))
def test_fuzz(seed: int) -> None:
    """Random and nearly right bytes end in events within the export, or a ProtocolError."""
    rng = random.Random(seed)
    for _ in range(300):
        transmission = made(rng.choice([READ_ONLY, WRITABLE]), structured=rng.random() < 0.5)
        try:
            for _ in range(rng.randrange(1, 20)):
                for event in transmission.receive(nearly_right(rng)):
                    if isinstance(event, Read | Zero | Status | Cache | Write):
                        assert event.offset + event.length <= SIZE
                    elif isinstance(event, WriteData):
                        assert event.offset + len(event.data) <= SIZE
        except ProtocolError:
            continue


def nearly_right(rng: random.Random) -> bytes:
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(100))
    return request(
        rng.randrange(9),
        rng.choice([0, rng.randrange(SIZE), SIZE, 2**63, 2**64 - 1]),
        rng.choice([0, 1, 100, rng.randrange(40 * MIB)]),
        flags=rng.choice([0, 0, 0, 1 << rng.randrange(16)]),
        payload=rng.randbytes(rng.choice([0, 0, 100])),
    )
