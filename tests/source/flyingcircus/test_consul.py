"""The Consul client against the double, and against peers that are no Consul."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backyfs.errors import ConfigError
from backyfs.source.flyingcircus.agent import Agent, ConsulError, agent
from backyfs.source.flyingcircus.consul import ANSWER_MAX, Consul, Entry, Listing
from tests.nbd.certificates import make_certificates
from tests.source.flyingcircus.consul import VALUE_MAX, Store, serving


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def consul(store: Store) -> Iterator[Consul]:
    with serving(store) as address:
        yield Consul(agent(address, environment={}))


# ---- what Consul does ----------------------------------------------------------------------------


def test_a_key_is_written_read_listed_and_deleted(consul: Consul, store: Store) -> None:
    assert consul.read("snapshot/one").entries == ()
    consul.write("snapshot/one", b'{"vm": "web01"}')
    consul.write("snapshot/two", b"\x00\xff")
    consul.write("other", b"")
    listing = consul.below("snapshot/")
    assert [(entry.key, entry.value) for entry in listing.entries] == [
        ("snapshot/one", b'{"vm": "web01"}'),
        ("snapshot/two", b"\x00\xff"),
    ]
    assert listing.index == listing.entries[1].modified
    assert [entry.value for entry in consul.read("other").entries] == [b""]
    assert consul.delete("snapshot/one")
    assert store.below("") == {"other": b"", "snapshot/two": b"\x00\xff"}


def test_deleting_spares_what_was_written_since(consul: Consul, store: Store) -> None:
    consul.write("key", b"ours")
    (entry,) = consul.read("key").entries
    store.put("key", b"somebody else's")
    assert not consul.delete("key", modified=entry.modified)
    assert store.below("") == {"key": b"somebody else's"}
    (entry,) = consul.read("key").entries
    assert consul.delete("key", modified=entry.modified)
    assert consul.delete("key", modified=entry.modified)  # it is gone: as wanted
    assert store.below("") == {}


def test_a_query_waits_for_a_change(consul: Consul, store: Store) -> None:
    consul.write("key", b"")
    listing = consul.read("key")
    timer = threading.Timer(0.2, store.delete, ["key"])
    timer.start()
    started = time.monotonic()
    after = consul.read("key", after=listing.index, wait_s=60)
    timer.join()
    assert 0.1 < time.monotonic() - started < 50
    assert after.entries == ()
    assert after.index > listing.index


def test_a_query_ends_without_a_change(consul: Consul) -> None:
    consul.write("key", b"")
    listing = consul.read("key")
    assert consul.read("key", after=listing.index, wait_s=1) == listing


_KEYS = st.sampled_from(["a", "a/b", "a/c", "snapshot/x", "snapshot/y"])
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), _KEYS, st.binary(max_size=40)),
        st.tuples(st.just("delete"), _KEYS),
        st.tuples(st.just("delete seen"), _KEYS),
        st.tuples(st.just("see"), _KEYS),
        st.tuples(st.just("list"), st.sampled_from(["a", "a/", "snapshot/", "z"])),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(_STEPS)
def test_it_is_a_dictionary_whose_entries_have_versions(steps: list[tuple[Any, ...]]) -> None:
    model: dict[str, bytes] = {}
    versions: dict[str, int] = {}
    seen: dict[str, tuple[int, int]] = {}
    with serving(Store()) as address:
        consul = Consul(agent(address, environment={}))
        index = 0
        for step, key, *rest in steps:
            if step == "write":
                if model.get(key) != rest[0]:
                    versions[key] = versions.get(key, 0) + 1
                model[key] = rest[0]
                consul.write(key, model[key])
            elif step == "see":
                listing = consul.read(key)
                assert [entry.value for entry in listing.entries] == [
                    value for name, value in model.items() if name == key
                ]
                for entry in listing.entries:
                    seen[key] = (entry.modified, versions[key])
            elif step == "list":
                listing = consul.below(key)
                assert {entry.key: entry.value for entry in listing.entries} == {
                    name: value for name, value in model.items() if name.startswith(key)
                }
            elif step == "delete":
                assert consul.delete(key)
                if model.pop(key, None) is not None:
                    versions[key] += 1
            elif key in seen:
                modified, version = seen[key]
                same = versions[key] == version
                assert consul.delete(key, modified=modified) == (same or key not in model)
                if same and model.pop(key, None) is not None:
                    versions[key] += 1
            now = consul.below("").index
            assert now >= index
            index = now


# ---- whom it speaks for --------------------------------------------------------------------------


def test_the_token_is_read_from_its_file_each_time(tmp_path: Path) -> None:
    store = Store({"first": "snapshot/", "second": "snapshot/"})
    path = tmp_path / "token"
    with serving(store) as address:
        consul = Consul(agent(address, token_file=str(path), environment={}))
        with pytest.raises(ConsulError, match="cannot read the Consul token in"):
            consul.below("snapshot/")
        path.write_text("first\n")
        consul.write("snapshot/a", b"")
        del store.tokens["first"]
        path.write_text("second\n")
        assert consul.delete("snapshot/a")
        for nonsense in ("", "\n", "two\nlines", "grün", "x" * 5000):
            path.write_text(nonsense)
            with pytest.raises(ConsulError, match="there is no Consul token in") as caught:
                consul.below("snapshot/")
            assert nonsense.strip() == "" or nonsense not in str(caught.value)


def test_what_is_not_allowed_says_what_the_token_needs() -> None:
    with serving(Store({"good": "snapshot/"})) as address:
        for secret in ("", "bad"):
            consul = Consul(agent(address, secret=secret, environment={}))
            for call in (consul.below, consul.read, consul.delete):
                with pytest.raises(ConsulError, match="answers 403: Permission denied") as caught:
                    call("snapshot/")
                assert 'key_prefix "snapshot/"' in caught.value.hint
                assert "bad" not in caught.value.message
        assert "good" not in repr(agent(address, secret="good"))


def test_the_environment_says_what_is_not_set() -> None:
    environment = {
        "CONSUL_HTTP_ADDR": "consul.example:1234",
        "CONSUL_HTTP_TOKEN_FILE": "/run/token",
        "CONSUL_CACERT": "/etc/ca.pem",
    }
    assert agent(environment=environment) == Agent(
        "consul.example", 1234, token_file="/run/token", ca_file="/etc/ca.pem"
    )
    assert agent("https://[::1]", secret="s", environment=environment) == Agent(
        "::1", 8501, True, secret="s", ca_file="/etc/ca.pem"
    )
    assert agent(environment={}) == Agent("127.0.0.1", 8500)
    assert str(agent("[::1]:5", environment={})) == "Consul at http://[::1]:5"


@pytest.mark.parametrize(
    "address",
    [
        *["ftp://a", "http://", "http://a:0", "http://a:99999", "http://a:b", "unix:///run/consul"],
        *["http://user:password@a", "http://a/path", "http://a?x", "http://[::1", "a b://c"],
        *[":8500", "x" * 64],
    ],
)
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(ConfigError, match="no address of a Consul agent"):
        agent(address, environment={})


# ---- peers that fail, and such that are no Consul ------------------------------------------------


@contextlib.contextmanager
def peer(behave: Callable[[socket.socket], None]) -> Iterator[Consul]:
    """Something that accepts one connection after the other and then does as it likes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with client, contextlib.suppress(OSError):
                        behave(client)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        address = agent(f"127.0.0.1:{listener.getsockname()[1]}", environment={})
        yield Consul(replace(address, patience_s=1.0))
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    assert not thread.is_alive(), "a connection was left open"


def saying(*pieces: bytes, pause_s: float = 0.0, times: int = 1) -> Callable[[socket.socket], None]:
    """A peer that says something whatever it is asked."""

    def behave(client: socket.socket) -> None:
        client.recv(65536)
        for _ in range(times):
            for piece in pieces:
                client.sendall(piece)
                time.sleep(pause_s)

    return behave


def answer(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def entries(**changes: object) -> bytes:
    value = {"Key": "k", "Value": "AA==", "ModifyIndex": 5, "Flags": 0} | changes
    return answer(json.dumps([value]).encode())


GARBAGE = {
    "not JSON": answer(b"<html>"),
    "no list": answer(b'{"Key": "k"}'),
    "a list of numbers": answer(b"[1, 2]"),
    "null": answer(b"null"),
    "empty": answer(b""),
    "not UTF-8": answer(b'["\xff"]'),
    "deep": answer(b"[" * 100_000),
    "a number as key": entries(Key=5),
    "half a surrogate pair in a key": entries(Key="snapshot/\ud800"),
    "a text as index": entries(ModifyIndex="5"),
    "wrong base64": entries(Value="A?=="),
    "a number as value": entries(Value=5),
    "a list as value": entries(Value=[1]),
    "not ASCII as value": entries(Value="ä"),
}


@pytest.mark.parametrize("said", GARBAGE.values(), ids=GARBAGE.keys())
def test_an_answer_that_is_none(said: bytes) -> None:
    with peer(saying(said)) as consul, pytest.raises(ConsulError, match="answers what no Consul"):
        consul.below("snapshot/")


@pytest.mark.parametrize("body", [b"", b"yes", b"1", b"null", b"[]", b"\xff"])
def test_a_change_that_is_neither_true_nor_false(body: bytes) -> None:
    with peer(saying(answer(body))) as consul, pytest.raises(ConsulError, match="no Consul"):
        consul.delete("key")


@pytest.mark.parametrize("index", ["", "-1", "x", "٣", "1e9", "5, 6", "9" * 5000])
def test_an_index_that_is_none_is_not_told(index: str) -> None:
    said = answer(b"[]", headers=f"X-Consul-Index: {index}\r\n")
    with peer(saying(said)) as consul:
        assert consul.below("snapshot/") == Listing((), 0)


def test_a_value_that_is_null_is_empty() -> None:
    with peer(saying(entries(Value=None))) as consul:
        assert consul.read("k").entries == (Entry("k", b"", 5),)


BROKEN = {
    "silence": b"",
    "noise": b"\x00\x16\x03\x01" * 50 + b"\n",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "half a status line": b"HTTP/1.1 2",
    "half a header": b"HTTP/1.1 200 OK\r\nContent-Le",
    "half a body": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[{",
    "a body that ends early": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[]",
    "half a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n50\r\n[{",
    "no chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n[{",
    "a negative chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n[{",
    "an endless line": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000,
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
}


@pytest.mark.parametrize("said", BROKEN.values(), ids=BROKEN.keys())
def test_a_peer_that_closes_or_speaks_no_http(said: bytes) -> None:
    with (
        peer(saying(said)) as consul,
        pytest.raises(ConsulError, match="closed the connection|not speak HTTP|no Consul"),
    ):
        consul.below("snapshot/")


HUGE = {
    "sent": (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n", b"[" * (1 << 20)),
    "in chunks": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffff\r\n",
        b"[" * (1 << 20),
    ),
    "without an end": (b"HTTP/1.0 200 OK\r\n\r\n", b"[" * (1 << 20)),
    "in continuations": (b"HTTP/1.1 100 Continue\r\n\r\n" * 50_000,),
}


@pytest.mark.parametrize("pieces", HUGE.values(), ids=HUGE.keys())
def test_an_answer_without_an_end(pieces: tuple[bytes, ...]) -> None:
    def behave(client: socket.socket) -> None:
        client.recv(65536)
        client.sendall(pieces[0])
        while True:
            client.sendall(pieces[-1])

    expected = pytest.raises(ConsulError, match="more than 16 MiB|not answer")
    with peer(behave) as consul, expected as caught:
        consul.below("snapshot/")
    assert caught.value.message  # it still holds all that was there: the connection has ended


SLOW = {
    "nothing": (b"",),
    "a dripping status": (b"H",),
    "a dripping header": (b"HTTP/1.1 200 OK\r\nX: ", *[b"x"] * 1000),
    "a dripping body": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", *[b"["] * 1000),
}


@pytest.mark.parametrize("pieces", SLOW.values(), ids=SLOW.keys())
def test_a_peer_that_never_gets_done(pieces: tuple[bytes, ...]) -> None:
    over = threading.Event()

    def behave(client: socket.socket) -> None:
        client.recv(65536)
        for piece in [*pieces, *[b""] * 1000]:
            client.sendall(piece)
            if over.wait(0.05):
                return

    started = time.monotonic()
    with peer(behave) as consul:
        with pytest.raises(ConsulError, match="does not answer"):
            consul.below("snapshot/")
        over.set()
    assert time.monotonic() - started < 20


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    consul = Consul(agent(f"127.0.0.1:{port}", environment={}))
    with pytest.raises(ConsulError, match="cannot be reached: Connection refused"):
        consul.write("snapshot/x", b"")
    with pytest.raises(ConsulError, match="cannot be reached"):
        Consul(agent("http://no-such-host.invalid", environment={})).read("key")


@pytest.mark.parametrize("status", ["500 x", "503 x", "301 Moved", "204 No Content", "404 x"])
def test_another_status(status: str) -> None:
    said = answer(b"No cluster\nleader \x1b[31m" + b"x" * 1000, status)
    number = status[:3]
    with peer(saying(said)) as consul:
        with pytest.raises(ConsulError, match=f"answers {number}") as caught:
            consul.write("snapshot/x", b"")
        assert "\n" not in caught.value.message
        assert "\x1b" not in caught.value.message
        assert len(caught.value.message) < 400


def test_no_leader_and_values_that_are_too_large(consul: Consul, store: Store) -> None:
    with pytest.raises(ConsulError, match="answers 413: Request body"):
        consul.write("key", bytes(VALUE_MAX + 1))
    for n in range(ANSWER_MAX // VALUE_MAX):
        store.put(f"large/{n}", bytes(VALUE_MAX))
    with pytest.raises(ConsulError, match="answers more than 16 MiB"):
        consul.below("large/")
    store.leader = False
    with pytest.raises(ConsulError, match="answers 500: No cluster leader"):
        consul.below("snapshot/")


# ---- TLS -----------------------------------------------------------------------------------------


def test_over_tls_the_agent_must_prove_who_it_is(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "tls")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server-cert.pem", certificates / "server-key.pem")
    ca_file = str(certificates / "ca-cert.pem")
    store = Store({"secret": ""})
    with serving(store, tls=context) as address:
        Consul(agent(address, ca_file=ca_file, secret="secret", environment={})).write("k", b"v")
        assert store.below("") == {"k": b"v"}
        with pytest.raises(ConsulError, match="certificate verify failed"):
            Consul(agent(address, secret="secret", environment={})).write("k", b"w")
        with pytest.raises(ConsulError, match="cannot read the certificates in /no/such"):
            Consul(agent(address, ca_file="/no/such", environment={})).write("k", b"w")
        garbage = tmp_path / "garbage"
        garbage.write_text("no certificate")
        with pytest.raises(ConsulError, match="cannot read the certificates in"):
            Consul(agent(address, ca_file=str(garbage), environment={})).write("k", b"w")
        plain = address.replace("https", "http")
        with pytest.raises(ConsulError, match="closed the connection|no.* HTTP"):
            Consul(agent(plain, environment={})).write("k", b"w")
    assert store.below("") == {"k": b"v"}
