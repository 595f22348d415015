"""TLS with real certificates: who gets in, what is moved, and what is never said in clear."""

from __future__ import annotations

import errno
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from backyfs.errors import ConfigError
from backyfs.nbd.protocol.constants import Command, Option, OptionReply
from backyfs.nbd.server import Limits
from backyfs.nbd.tls import TlsFiles, context
from backyfs.reader.overlay import Scratch
from tests.mount.mounts import eventually
from tests.nbd.certificates import make_certificates
from tests.nbd.running import Running, running
from tests.nbd.wire import ACK, Client, connected, open_data, option, request
from tests.reader.stores import content, make_vm

MIB = 1 << 20
IMAGE = content(60, seed=21, tail=99)
ONLY = "web01/latest"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("pki") / "good")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of another authority."""
    return make_certificates(tmp_path_factory.mktemp("pki") / "strange")


def files(directory: Path, *, clients: bool = True) -> TlsFiles:
    return TlsFiles(
        directory / "server-cert.pem",
        directory / "server-key.pem",
        directory / "ca-cert.pem" if clients else None,
    )


@pytest.fixture(scope="module")
def server(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    base = tmp_path_factory.mktemp("tls")
    make_vm(base, "web01", IMAGE)
    limits = Limits(handshake_s=2)
    scratch = Scratch(tmp_path_factory.mktemp("scratch"))
    with running(base, tls=context(files(certificates)), limits=limits, scratch=scratch) as found:
        yield found


def trusting(directory: Path, *, with_certificate: bool = True) -> ssl.SSLContext:
    """What a client needs."""
    made = ssl.create_default_context(cafile=directory / "ca-cert.pem")
    if with_certificate:
        made.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
    return made


def secured(client: Client, trust: ssl.SSLContext, extra: bytes = b"") -> Client:
    """Go through STARTTLS; `extra` is sent in clear behind it."""
    client.send(option(Option.STARTTLS) + extra)
    assert client.reply() == (Option.STARTTLS, ACK, b"")
    client.sock = trust.wrap_socket(client.sock, server_hostname="localhost")
    return client


def test_all_is_served_through_tls(server: Running, certificates: Path) -> None:
    with connected(server.address) as client:
        client.hello()
        with secured(client, trusting(certificates)).open(ONLY, hello=False).sock as sock:
            assert client.read(0, len(IMAGE)) == IMAGE
            assert client.read(4000, 3 * MIB) == IMAGE[4000 : 4000 + 3 * MIB]
            assert client.call(Command.READ, len(IMAGE), 1).error == errno.EINVAL
            sock.sendall(request(Command.DISC))
            assert sock.recv(1) == b""  # a proper end, not one that was cut off


def test_overlays_work_through_tls(server: Running, certificates: Path) -> None:
    with connected(server.address) as client:
        client.hello()
        with secured(client, trusting(certificates)).open(f"{ONLY}@rw", hello=False).sock:
            payload = IMAGE[: 2 * MIB]
            assert not client.call(Command.WRITE, MIB, len(payload), payload=payload).error
            assert client.read(0, 3 * MIB) == IMAGE[:MIB] + payload


def test_requests_that_follow_at_once(server: Running, certificates: Path) -> None:
    with connected(server.address) as client:
        client.hello()
        with secured(client, trusting(certificates)).sock:
            go = option(Option.GO, open_data(ONLY))
            client.send(go + request(Command.READ, 5, 70_000) * 3)
            while client.reply()[1] != ACK:
                pass
            for _ in range(3):
                assert client.answer(5, 70_000).data == IMAGE[5:70_005]


def test_nothing_is_told_in_clear(server: Running) -> None:
    with connected(server.address) as client:
        client.hello()
        for number, data in ((Option.LIST, b""), (Option.INFO, open_data(ONLY))):
            assert client.ask(number, data)[0] == OptionReply.ERR_TLS_REQD
        client.send(option(Option.EXPORT_NAME, ONLY.encode()))
        assert client.is_closed()


def test_what_was_said_in_clear_behind_starttls_is_dropped(
    server: Running, certificates: Path
) -> None:
    """Whether it comes with STARTTLS or makes TLS fail: it is never taken for an option."""
    with connected(server.address) as client:
        client.hello()
        client.send(option(Option.STARTTLS) + option(Option.ABORT))
        assert client.reply() == (Option.STARTTLS, ACK, b"")
        with trusting(certificates).wrap_socket(client.sock, server_hostname="localhost") as sock:
            client.sock = sock
            client.open(ONLY, hello=False)
            assert client.read(0, 10) == IMAGE[:10]


@pytest.mark.parametrize("who", ["no certificate", "a stranger"])
def test_who_has_no_certificate_of_ours_stays_out(
    server: Running, certificates: Path, strangers: Path, who: str
) -> None:
    trust = trusting(certificates, with_certificate=False)
    if who == "a stranger":
        trust.load_cert_chain(strangers / "client-cert.pem", strangers / "client-key.pem")
    with connected(server.address) as client:
        client.hello()
        with pytest.raises((ssl.SSLError, ConnectionError, EOFError)), secured(client, trust).sock:
            client.ask(Option.LIST)
    assert eventually(lambda: not server.server.connections)


def test_old_tls_is_refused(certificates: Path) -> None:
    assert context(files(certificates)).minimum_version == ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01", b"plain nonsense\n" * 10])
def test_a_client_that_does_not_finish_tls_is_dropped(server: Running, said: bytes) -> None:
    with connected(server.address) as client:
        client.hello()
        client.send(option(Option.STARTTLS))
        assert client.reply()[1] == ACK
        client.send(said)
        assert client.is_closed()


def test_a_client_that_takes_no_bytes_is_dropped(packs_base: Path, certificates: Path) -> None:
    tls, limits = context(files(certificates)), Limits(stall_s=0.5)
    with running(packs_base, tls=tls, limits=limits) as server, connected(server.address) as client:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.hello()
        with secured(client, trusting(certificates)).open(ONLY, hello=False).sock:

            def ask() -> None:
                try:
                    client.send(request(Command.READ, 0, 3 * MIB) * 100)
                except OSError:
                    pass

            asking = threading.Thread(target=ask)
            asking.start()
            assert eventually(lambda: not server.server.connections)
            asking.join()


@pytest.fixture
def packs_base(tmp_path: Path) -> Path:
    base = tmp_path / "srv"
    base.mkdir()
    make_vm(base, "web01", IMAGE)
    return base


def test_files_that_cannot_be_used_are_named(
    certificates: Path, strangers: Path, tmp_path: Path
) -> None:
    good = files(certificates)
    empty = tmp_path / "empty.pem"
    empty.touch()
    wrong = [
        TlsFiles(tmp_path / "none.pem", good.key),
        TlsFiles(good.certificate, tmp_path / "none.pem"),
        TlsFiles(good.certificate, good.key, tmp_path / "none.pem"),
        TlsFiles(empty, good.key),
        TlsFiles(good.certificate, empty),
        TlsFiles(good.certificate, strangers / "server-key.pem"),
        TlsFiles(good.certificate, good.key, empty),
        TlsFiles(good.certificate, tmp_path),
    ]
    for each in wrong:
        with pytest.raises(ConfigError, match=r"TLS: .*\.pem|TLS: cannot read"):
            context(each)
