"""The handshake as bytes and events, without a socket."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backyfs.nbd.protocol.constants import ExportFlag, Info, Option, OptionReply
from backyfs.nbd.protocol.handshake import (
    Abort,
    Event,
    ExportInfo,
    Handshake,
    ListExports,
    MetaContexts,
    Open,
    ProtocolError,
    Reply,
    StartTls,
)
from tests.nbd.wire import (
    client_flags,
    context_data,
    open_data,
    option,
    string,
)

FLAGS = ExportFlag.HAS_FLAGS | ExportFlag.READ_ONLY
INFO = ExportInfo("vm/rev", "a description", 12345, FLAGS)


def greeted(flags: int = 3, *, tls: bool = False) -> Handshake:
    handshake = Handshake(tls=tls)
    assert handshake.greeting() == b"NBDMAGICIHAVEOPT\0\3"
    handshake.receive(client_flags(flags))
    return handshake


def after(handshake: Handshake, *data: bytes) -> Event | None:
    handshake.receive(b"".join(data))
    return handshake.next_event()


def replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """The replies to options in bytes: option, type, data."""
    found = []
    while data:
        magic, number, kind, length = struct.unpack_from(">QIII", data)
        assert magic == 0x3E889045565A9
        found.append((number, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


def refusal(event: Event | None) -> tuple[int, str]:
    """The error and the text in an event that is one reply."""
    assert isinstance(event, Reply)
    ((_, kind, text),) = replies(event.data)
    return kind, text.decode()


# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [4, 0xFF, 1 << 31])
def test_unknown_client_flags_close(flags: int) -> None:
    with pytest.raises(ProtocolError, match="flags"):
        greeted(flags).next_event()


def test_without_fixed_newstyle_only_an_export_may_be_named() -> None:
    handshake = greeted(0)
    assert after(handshake, option(Option.EXPORT_NAME, b"x")) == Open(Option.EXPORT_NAME, "x")
    with pytest.raises(ProtocolError, match="fixed newstyle"):
        after(greeted(0), option(Option.LIST))


@pytest.mark.parametrize(("flags", "zeroes"), [(1, 124), (3, 0), (0, 124), (2, 0)])
def test_export_name_is_followed_by_zeroes_unless_the_client_wants_none(
    flags: int, zeroes: int
) -> None:
    handshake = greeted(flags)
    event = after(handshake, option(Option.EXPORT_NAME, b"vm/rev"), b"and requests")
    assert isinstance(event, Open)
    assert handshake.accept(event, INFO) == struct.pack(">QH", 12345, FLAGS) + bytes(zeroes)
    assert handshake.done
    assert handshake.surplus == b"and requests"


def test_a_refused_export_name_can_only_close() -> None:
    handshake = greeted()
    event = after(handshake, option(Option.EXPORT_NAME, b"nope"))
    assert isinstance(event, Open)
    with pytest.raises(ProtocolError, match="no such thing"):
        handshake.refuse(event, OptionReply.ERR_UNKNOWN, "no such thing")


# ---- GO and INFO ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [Option.GO, Option.INFO])
def test_go_and_info_tell_what_was_asked_for(number: Option) -> None:
    handshake = greeted()
    wants = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE, 77)
    event = after(handshake, option(number, open_data("latest", wants)))
    assert event == Open(number, "latest", frozenset(wants))
    assert isinstance(event, Open)
    assert replies(handshake.accept(event, INFO)) == [
        (number, OptionReply.INFO, struct.pack(">HQH", 0, 12345, FLAGS)),
        (number, OptionReply.INFO, struct.pack(">H", 1) + b"vm/rev"),
        (number, OptionReply.INFO, struct.pack(">H", 2) + b"a description"),
        (number, OptionReply.INFO, struct.pack(">HIII", 3, 1, 65536, 32 << 20)),
        (number, OptionReply.ACK, b""),
    ]
    assert handshake.done == (number == Option.GO)


def test_go_tells_the_size_in_any_case() -> None:
    handshake = greeted(1)  # and never zeroes
    event = after(handshake, option(Option.GO, open_data("")))
    assert isinstance(event, Open)
    assert [kind for _, kind, _ in replies(handshake.accept(event, INFO))] == [3, 1]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        struct.pack(">I", 2**32 - 1) + bytes(6),
        struct.pack(">I", 9) + b"short" + bytes(2),
        string("x" * 5000) + bytes(2),
        string("x") + struct.pack(">H", 3) + bytes(2),
        open_data("x") + b"more",
    ],
)
@pytest.mark.parametrize("number", [Option.GO, Option.INFO])
def test_an_option_that_does_not_fit_its_fields_is_invalid(number: Option, data: bytes) -> None:
    kind, text = refusal(after(greeted(), option(number, data)))
    assert kind == OptionReply.ERR_INVALID
    assert text


def test_a_name_that_is_not_utf8_is_unknown() -> None:
    for number in (Option.GO, Option.INFO):
        kind, text = refusal(after(greeted(), option(number, open_data(b"\xff\xfe"))))
        assert (kind, "UTF-8" in text) == (OptionReply.ERR_UNKNOWN, True)
    with pytest.raises(ProtocolError):
        after(greeted(), option(Option.EXPORT_NAME, b"\xff"))


def test_a_refusal_carries_words() -> None:
    handshake = greeted()
    event = after(handshake, option(Option.GO, open_data("nope")))
    assert isinstance(event, Open)
    text = "é" * 3000  # more than a string of the protocol may have
    ((_, kind, data),) = replies(handshake.refuse(event, OptionReply.ERR_UNKNOWN, text))
    assert kind == OptionReply.ERR_UNKNOWN
    assert data.decode() == "é" * 2048
    assert not handshake.done


# ---- other options -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [4, 11, 12345, 2**32 - 1])
def test_unknown_options_are_unsupported_and_skipped(number: int) -> None:
    handshake = greeted()
    kind, _ = refusal(after(handshake, option(number, b"payload"), option(Option.LIST)))
    assert kind == OptionReply.ERR_UNSUP
    assert handshake.next_event() == ListExports()


def test_options_without_data_refuse_data() -> None:
    for number in (Option.LIST, Option.STRUCTURED_REPLY, Option.STARTTLS):
        kind, _ = refusal(after(greeted(), option(number, b"x")))
        assert kind == OptionReply.ERR_INVALID


def test_a_list_comes_in_pieces_and_ends() -> None:
    handshake = greeted()
    assert after(handshake, option(Option.LIST)) == ListExports()
    names = [(f"vm/{number}", "x" * 100) for number in range(2000)]
    pieces = list(handshake.listed(names))
    assert len(pieces) > 2
    assert max(map(len, pieces)) < 70_000
    *exports, end = replies(b"".join(pieces))
    assert end == (Option.LIST, OptionReply.ACK, b"")
    assert exports[7] == (Option.LIST, OptionReply.SERVER, string("vm/7") + b"x" * 100)
    assert len(exports) == 2000


def test_an_empty_list_just_ends() -> None:
    handshake = greeted()
    after(handshake, option(Option.LIST))
    assert replies(b"".join(handshake.listed([]))) == [(Option.LIST, OptionReply.ACK, b"")]


def test_abort_is_acknowledged() -> None:
    event = after(greeted(), option(Option.ABORT))
    assert isinstance(event, Abort)
    assert replies(event.data) == [(Option.ABORT, OptionReply.ACK, b"")]


# ---- structured replies and contexts -------------------------------------------------------------


def test_contexts_need_structured_replies() -> None:
    for number in (Option.SET_META_CONTEXT, Option.LIST_META_CONTEXT):
        data = context_data("x", "base:allocation")
        kind, _ = refusal(after(greeted(), option(number, data)))
        assert kind == OptionReply.ERR_INVALID


def structured() -> Handshake:
    handshake = greeted()
    event = after(handshake, option(Option.STRUCTURED_REPLY))
    assert isinstance(event, Reply)
    assert replies(event.data) == [(Option.STRUCTURED_REPLY, OptionReply.ACK, b"")]
    assert handshake.structured
    return handshake


@pytest.mark.parametrize(
    ("number", "queries", "found"),
    [
        (Option.SET_META_CONTEXT, ["base:allocation"], True),
        (Option.SET_META_CONTEXT, ["x-other:thing", "base:allocation"], True),
        (Option.SET_META_CONTEXT, [], False),
        (Option.SET_META_CONTEXT, ["base:"], False),
        (Option.SET_META_CONTEXT, ["qemu:dirty-bitmap:x"], False),
        (Option.LIST_META_CONTEXT, [], True),
        (Option.LIST_META_CONTEXT, ["base:"], True),
        (Option.LIST_META_CONTEXT, ["base:other"], False),
    ],
)
def test_contexts_are_found(number: Option, queries: list[str], found: bool) -> None:
    handshake = structured()
    event = after(handshake, option(number, context_data("x", *queries)))
    assert event == MetaContexts(number, "x", found)
    assert isinstance(event, MetaContexts)
    answer = replies(handshake.contexts(event))
    number_of_it = 1 if number == Option.SET_META_CONTEXT else 0
    context = struct.pack(">I", number_of_it) + b"base:allocation"
    assert answer[-1] == (number, OptionReply.ACK, b"")
    assert answer[:-1] == ([(number, OptionReply.META_CONTEXT, context)] if found else [])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        string("x") + struct.pack(">I", 5),
        string("x") + struct.pack(">II", 1, 2**32 - 1),
        context_data("x", "nocolon"),
        context_data("x", "base:allocation") + b"!",
    ],
)
def test_wrong_queries_are_invalid(data: bytes) -> None:
    kind, _ = refusal(after(structured(), option(Option.SET_META_CONTEXT, data)))
    assert kind == OptionReply.ERR_INVALID


def chosen(handshake: Handshake, name: str) -> bool:
    event = after(handshake, option(Option.GO, open_data(name)))
    assert isinstance(event, Open)
    return handshake.has_allocation(event)


def choose(handshake: Handshake, name: str, *queries: str) -> None:
    event = after(handshake, option(Option.SET_META_CONTEXT, context_data(name, *queries)))
    if isinstance(event, MetaContexts):
        handshake.contexts(event)


def test_a_context_counts_for_the_export_it_was_chosen_for() -> None:
    handshake = structured()
    choose(handshake, "x", "base:allocation")
    assert chosen(handshake, "x")
    assert not chosen(handshake, "y")


@pytest.mark.parametrize("queries", [[], ["base:other"], ["nocolon"]])
def test_a_later_choice_replaces_the_earlier_even_when_it_fails(queries: list[str]) -> None:
    handshake = structured()
    choose(handshake, "x", "base:allocation")
    choose(handshake, "x", *queries)
    assert not chosen(handshake, "x")


# ---- TLS -----------------------------------------------------------------------------------------


def test_starttls_without_tls_is_refused_by_policy() -> None:
    kind, _ = refusal(after(greeted(), option(Option.STARTTLS)))
    assert kind == OptionReply.ERR_POLICY


@pytest.mark.parametrize(
    "number", [Option.LIST, Option.GO, Option.INFO, Option.STRUCTURED_REPLY, 4711]
)
def test_with_tls_nothing_goes_in_clear(number: int) -> None:
    kind, _ = refusal(after(greeted(tls=True), option(number, open_data("x"))))
    assert kind == OptionReply.ERR_TLS_REQD


def test_with_tls_an_export_name_in_clear_closes() -> None:
    with pytest.raises(ProtocolError, match="TLS"):
        after(greeted(tls=True), option(Option.EXPORT_NAME, b"x"))


def test_starttls_forgets_what_came_before_and_behind_it() -> None:
    handshake = greeted(tls=True)
    event = after(handshake, option(Option.STARTTLS), option(Option.GO, open_data("injected")))
    assert event == StartTls()
    assert replies(handshake.begin_tls()) == [(Option.STARTTLS, OptionReply.ACK, b"")]
    assert handshake.next_event() is None
    assert after(handshake, option(Option.GO, open_data("x"))) == Open(Option.GO, "x")
    kind, _ = refusal(after(handshake, option(Option.STARTTLS)))
    assert kind == OptionReply.ERR_INVALID


# ---- limits --------------------------------------------------------------------------------------


def test_bad_magic_closes() -> None:
    with pytest.raises(ProtocolError, match="magic"):
        after(greeted(), b"IHAVEOPX" + bytes(8))


@pytest.mark.parametrize("length", [(64 << 10) + 1, 2**31 - 1, 2**32 - 1])
def test_a_huge_option_closes_before_it_is_read(length: int) -> None:
    with pytest.raises(ProtocolError, match="bytes"):
        after(greeted(), option(Option.GO, length=length))


def test_the_largest_option_is_read() -> None:
    kind, _ = refusal(after(greeted(), option(99, bytes(64 << 10))))
    assert kind == OptionReply.ERR_UNSUP


def test_a_flood_of_options_closes() -> None:
    handshake = greeted()
    for _ in range(64):
        assert isinstance(after(handshake, option(99)), Reply)
    with pytest.raises(ProtocolError, match="64 options"):
        after(handshake, option(99))


def test_who_lists_may_ask_about_each_name() -> None:
    handshake = greeted()
    assert isinstance(after(handshake, option(Option.LIST)), ListExports)
    assert b"".join(handshake.listed((f"vm/{n}", "") for n in range(1000)))
    handshake.receive(option(99) * 4063)
    for _ in range(4063):
        assert isinstance(handshake.next_event(), Reply)
    with pytest.raises(ProtocolError, match="4064 options"):
        after(handshake, option(99))


# ---- any split, any bytes ------------------------------------------------------------------------

CONVERSATION = b"".join(
    [
        client_flags(),
        option(Option.STRUCTURED_REPLY),
        option(77, b"unknown"),
        option(Option.LIST),
        option(Option.LIST_META_CONTEXT, context_data("vm/rev")),
        option(Option.SET_META_CONTEXT, context_data("vm/rev", "base:allocation")),
        option(Option.INFO, open_data("vm/rev", (1, 2, 3))),
        option(Option.INFO, b"xx"),
        option(Option.GO, open_data("nope")),
        option(Option.GO, open_data("vm/rev")),
        b"requests that follow at once",
    ]
)


def conversation(pieces: list[bytes]) -> tuple[list[Event], bytes]:
    """Events and answers when bytes arrive in these pieces, with a server of one export."""
    handshake = Handshake()
    events: list[Event] = []
    sent = bytearray()
    rest = bytearray()
    for piece in pieces:
        if handshake.done:
            rest += piece
            continue
        handshake.receive(piece)
        for event in following(handshake):
            events.append(event)
            sent += answer(handshake, event)
    return events, bytes(sent) + handshake.surplus + bytes(rest)


def following(handshake: Handshake) -> Iterator[Event]:
    """The events in what was received."""
    while not handshake.done:
        event = handshake.next_event()
        if event is None:
            return
        yield event


def answer(handshake: Handshake, event: Event) -> bytes:
    match event:
        case Open(_, "vm/rev"):
            return handshake.accept(event, INFO)
        case Open():
            return handshake.refuse(event, OptionReply.ERR_UNKNOWN, "no")
        case ListExports():
            return b"".join(handshake.listed([("vm/rev", "text")]))
        case MetaContexts():
            return handshake.contexts(event)
        case StartTls():
            return handshake.begin_tls()
        case Reply(data) | Abort(data):
            return data


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(places)]


@given(st.lists(st.integers(0, 10_000), max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_split_of_the_bytes_gives_the_same(cuts: list[int]) -> None:
    whole = conversation([CONVERSATION])
    assert whole[1].endswith(b"requests that follow at once")
    assert len(whole[0]) == 9
    assert conversation(split(CONVERSATION, cuts)) == whole


def test_byte_by_byte_gives_the_same() -> None:
    single = [CONVERSATION[at : at + 1] for at in range(len(CONVERSATION))]
    assert conversation(single) == conversation([CONVERSATION])


@pytest.mark.parametrize("seed", range(8))
def test_fuzz(seed: int) -> None:
    """Spoilt conversations end in events or a ProtocolError, and in nothing else."""
    rng = random.Random(seed)
    for _ in range(150):
        data = bytearray(CONVERSATION)
        for _ in range(rng.randrange(1, 6)):
            spoil(data, rng)
        cuts = [rng.randrange(10_000) for _ in range(rng.randrange(10))]
        try:
            events, _ = conversation(split(bytes(data), cuts))
        except ProtocolError:
            continue
        assert len(events) <= 64


def spoil(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        data[at] = rng.randrange(256)
    elif kind == 1:
        del data[at : at + rng.randrange(12)]
    elif kind == 2:
        data[at:at] = rng.randbytes(rng.randrange(12))
    else:
        data[at : at + 4] = struct.pack(">I", rng.choice([0, 1, 2**16, 2**31, 2**32 - 1]))
