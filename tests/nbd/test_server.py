"""Serving: content, holes, damage, overlays; clients that stall, vanish or flood; the end."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from backyfs.model import FRAME
from backyfs.nbd.protocol.constants import Command, CommandFlag, Option, OptionReply
from backyfs.nbd.server import Limits
from backyfs.reader.catalog import Catalog
from backyfs.reader.overlay import Scratch
from backyfs.store.fs import forget_pages
from backyfs.store.repository import Repository
from tests.cli.program import backyfs, refused
from tests.conftest import SmallFs
from tests.filesystems import spoil_medium
from tests.mount.mounts import eventually
from tests.nbd.running import Running, running
from tests.nbd.wire import Client, client_flags, connected, open_data, option, request
from tests.reader.stores import add_revision, content, make_vm

MIB = 1 << 20
IMAGE = content(100, seed=8, tail=5555)
ONLY = "web01/latest"


@pytest.fixture(params=["packs", "cow-xfs", "cow-btrfs"])
def base(request: pytest.FixtureRequest) -> Path:
    """A base directory with web01, in each format."""
    store, _, file_system = request.param.partition("-")
    where = "tmp_path" if store == "packs" else f"{file_system}_dir"
    directory: Path = request.getfixturevalue(where) / "srv"
    directory.mkdir()
    make_vm(directory, "web01", IMAGE, store=store)
    return directory


@pytest.fixture
def packs(tmp_path: Path) -> Path:
    """A base directory with web01 in packs, where the format does not matter."""
    (tmp_path / "srv").mkdir()
    make_vm(tmp_path / "srv", "web01", IMAGE)
    return tmp_path / "srv"


# ---- content -------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [True, False])
def test_every_byte_can_be_read_in_any_portion(base: Path, structured: bool) -> None:
    with running(base) as server, server.attached(ONLY, structured=structured) as client:
        assert client.size == len(IMAGE)
        for offset, length in [
            (0, len(IMAGE)),
            (0, 1),
            (len(IMAGE) - 1, 1),
            (FRAME - 1, 2),
            (5, 256 << 10),
            (4097, (1 << 20) + 3),
            (FRAME, 2 * MIB),
        ]:
            for flags in (0, CommandFlag.DF) if structured else (0,):
                found = client.call(Command.READ, offset, length, flags=flags)
                assert found.data == IMAGE[offset : offset + length]
                contents = [kind for kind in found.kinds if kind in (1, 2)]
                assert not flags or len(contents) == 1
        assert client.disconnect()


def test_many_requests_in_flight_are_all_answered(base: Path) -> None:
    with running(base) as server, server.attached(ONLY, structured=False) as client:
        places = [(number * 7919 * 13) % (len(IMAGE) - 5000) for number in range(300)]
        asked = b"".join(
            request(Command.READ, at, 1 + at % 5000, cookie=number)
            for number, at in enumerate(places)
        )
        threading.Thread(target=client.send, args=(asked,)).start()
        answered = set()
        for _ in places:
            magic, error, cookie = struct.unpack(">IIQ", client.receive(16))
            assert (magic, error) == (0x67446698, 0)
            at = places[cookie]
            assert client.receive(1 + at % 5000) == IMAGE[at : at + 1 + at % 5000]
            answered.add(cookie)
        assert answered == set(range(300))


def test_holes_are_told_as_such(base: Path) -> None:
    data = IMAGE[: 4 * FRAME] + bytes(32 * FRAME) + IMAGE[: 2 * FRAME]
    add_revision(Repository.open(base / "web01"), data)
    with running(base) as server, server.attached(ONLY) as client:
        found = client.call(Command.READ, 0, len(data))
        assert found.data == data
        assert 2 in found.kinds  # a chunk that is a hole
        status = client.call(Command.BLOCK_STATUS, 0, len(data)).descriptors
        assert sum(length for length, _ in status) == len(data)
        at = 0
        for length, state in status:
            if state:
                assert state == 3
                assert not any(data[at : at + length])
            at += length
        assert sum(length for length, state in status if state) >= 32 * FRAME
        one = client.call(Command.BLOCK_STATUS, 6 * FRAME, FRAME, flags=CommandFlag.REQ_ONE)
        assert one.descriptors == [(FRAME, 3)]
        assert client.call(Command.READ, 6 * FRAME, FRAME, flags=CommandFlag.DF).data == bytes(
            FRAME
        )


def test_cache_is_a_hint(base: Path) -> None:
    with running(base) as server, server.attached(ONLY) as client:
        assert client.call(Command.CACHE, 0, len(IMAGE)).error == 0
        assert client.read(0, 100) == IMAGE[:100]


def stored_bytes(*frames: int) -> int:
    """Bytes of those of some whole frames of IMAGE that are no holes."""
    return sum(FRAME for number in frames if any(IMAGE[number * FRAME :][:FRAME]))


def test_who_reads_in_sequence_is_read_ahead_for(packs: Path) -> None:
    with running(packs) as server, server.attached(ONLY) as client:
        cache = server.images.cache
        for number in (40, 33, 77, 52):  # no sequence
            client.read(number * FRAME, FRAME)
        assert cache.bytes == stored_bytes(40, 33, 77, 52)
        for number in range(5):
            assert client.read(number * FRAME, FRAME) == IMAGE[number * FRAME :][:FRAME]
        # The fifth in a row proves a sequence: a quarter of the cache is decoded, holes included.
        read = stored_bytes(40, 33, 77, 52, *range(5))
        assert eventually(lambda: cache.bytes == read + cache.bytes_max // 4)
        assert client.read(0, len(IMAGE)) == IMAGE


def test_holes_that_are_left_out_belong_to_a_sequence(packs: Path) -> None:
    (record,) = (rev.record for rev in Catalog(packs).vm("web01").revisions.values())
    digest = record.disks["disk"].digest
    stored = [number for number in range(100) if stored_bytes(number)]
    last = next(n for n in stored if n > 40 and n - 1 not in stored)
    ahead = next(n for n in stored if n > last + 16)
    with running(packs) as server, server.attached(ONLY) as client:
        cache = server.images.cache
        for number in stored[: stored.index(last)]:
            client.read(number * FRAME, FRAME)
        assert cache.one(digest, last + 32) is None  # a quarter of the cache is 32 frames
        client.read(last * FRAME, FRAME)
        assert eventually(lambda: cache.one(digest, ahead) is not None)


def test_several_connections_share_an_image(base: Path) -> None:
    with running(base) as server, server.attached(ONLY) as one, server.attached(ONLY) as two:
        assert len(server.images) == 1
        assert one.read(9, 99) == two.read(9, 99) == IMAGE[9:108]


# ---- damage --------------------------------------------------------------------------------------


def spoil(base: Path, at: int) -> None:
    """Change a stored byte that belongs to frame 50 or so of the only pack."""
    (pack,) = (base / "web01" / "packs").iterdir()
    os.chmod(pack, 0o600)
    with pack.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0xFF]))


def damaged_frame(client: Client) -> int:
    """The number of the only frame that cannot be read."""
    frames = range(-(-len(IMAGE) // FRAME))
    sizes = [min(FRAME, len(IMAGE) - number * FRAME) for number in frames]
    (bad,) = [
        number
        for number in frames
        if client.call(Command.READ, number * FRAME, sizes[number]).error
    ]
    return bad


def test_a_damaged_frame_is_an_error_for_its_range_alone(packs: Path) -> None:
    (pack,) = (packs / "web01" / "packs").iterdir()
    spoil(packs, pack.stat().st_size // 2)
    with running(packs) as server:
        with server.attached(ONLY) as client:
            bad = damaged_frame(client)
            start, end = bad * FRAME, (bad + 1) * FRAME
            found = client.call(Command.READ, 0, len(IMAGE))
            assert found.error == errno.EIO
            assert found.offsets == [start]
            assert "damaged" in found.texts[0]
            assert f"byte {start}" in found.texts[0]
            expected = bytearray(IMAGE)
            expected[start:end] = bytes(FRAME)
            assert found.data == expected
            for length in (MIB, 3 * MIB):  # in one part, and streamed
                at = min(start - 512, len(IMAGE) - length)
                whole = client.call(Command.READ, at, length, flags=CommandFlag.DF)
                assert whole.error == errno.EIO
                assert whole.offsets == [start]
            assert client.read(end, 1000) == IMAGE[end : end + 1000]
        with server.attached(ONLY, structured=False) as client:
            for length in (FRAME, 3 * MIB):
                at = min(start, len(IMAGE) - length)
                assert client.call(Command.READ, at, length).error == errno.EIO
            assert client.read(0, start) == IMAGE[:start]
            assert client.read(end, 1000) == IMAGE[end : end + 1000]


def test_a_medium_that_fails_while_the_kernel_moves_bytes(small_fs: SmallFs) -> None:
    place = small_fs("btrfs", 110 * MIB)  # which checks what it reads
    make_vm(place, "web01", IMAGE, store="cow")
    start = 40 * FRAME
    for path in (place / "web01" / "revisions").iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            forget_pages(stream.fileno())
    assert spoil_medium(place.parent / "btrfs.img", IMAGE[start : start + 4096]) == 1
    with running(place) as server, server.attached(ONLY) as client:
        found = client.call(Command.READ, 0, len(IMAGE))
        assert found.error == errno.EIO
        (at,) = found.offsets
        assert start - MIB < at <= start  # the page cache reads in larger pieces
        assert found.data[:at] == IMAGE[:at]
        assert client.read(0, 10 * FRAME) == IMAGE[: 10 * FRAME]
        assert client.read(start + FRAME, FRAME) == IMAGE[start + FRAME : start + 2 * FRAME]
        assert client.call(Command.READ, start, 4096).error == errno.EIO


# ---- removed while attached ----------------------------------------------------------------------


def test_an_attached_revision_is_not_removed_and_stays_readable_if_it_is(packs: Path) -> None:
    repository = Repository.open(packs / "web01")
    (record,) = repository.revisions()
    add_revision(repository, content(3, seed=99))
    with running(packs) as server, server.attached(f"web01/{record.id}") as client:
        assert client.read(0, 10) == IMAGE[:10]
        refused("-b", packs / "web01", "forget", "-y", "-r", record.id, code=1)
        backyfs("-b", packs / "web01", "forget", "-y", "--force", "-r", record.id)
        assert [found.id for found in Repository.open(packs / "web01").revisions()] != [record.id]
        assert client.read(0, len(IMAGE)) == IMAGE
        with connected(server.address) as late:
            late.hello()
            assert late.ask(Option.GO, open_data(f"web01/{record.id}"))[0] != 1
    assert not list((packs / "web01" / "revisions").glob(f"{record.id}*json"))


def test_one_removed_before_anything_was_read_stays_readable(packs: Path) -> None:
    repository = Repository.open(packs / "web01")
    (first,) = repository.revisions()
    patched = add_revision(repository, IMAGE[:FRAME] + b"patch" + IMAGE[FRAME + 5 :])
    add_revision(repository, content(3, seed=99))
    with running(packs) as server, server.attached(f"web01/{patched.id}") as client:
        repository.remove([first.id, patched.id], force=True)
        assert repository.gc().freed_bytes > 2 * MIB
        expected = IMAGE[:FRAME] + b"patch" + IMAGE[FRAME + 5 :]
        assert client.read(0, len(IMAGE)) == expected


# ---- overlays ------------------------------------------------------------------------------------


def test_an_overlay_is_private_and_gone_at_disconnect(base: Path, tmp_path: Path) -> None:
    store = base / "web01"
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    scratch = Scratch(tmp_path)
    expected = bytearray(IMAGE)
    with running(base, scratch=scratch) as server:
        with server.attached(f"{ONLY}@rw") as one, server.attached(f"{ONLY}@rw") as two:
            assert one.name.endswith("@rw")
            for at, data in [(5, b"hello"), (FRAME - 2, b"wxyz"), (3 * MIB, IMAGE[:MIB])]:
                found = one.call(Command.WRITE, at, len(data), payload=data, flags=CommandFlag.FUA)
                assert not found.error
                expected[at : at + len(data)] = data
            assert not one.call(Command.WRITE_ZEROES, MIB, 300_000).error
            expected[MIB : MIB + 300_000] = bytes(300_000)
            assert not one.call(Command.TRIM, 2 * MIB, FRAME).error
            expected[2 * MIB : 2 * MIB + FRAME] = bytes(FRAME)
            assert not one.call(Command.FLUSH).error
            assert one.read(0, len(IMAGE)) == expected
            assert two.read(0, len(IMAGE)) == IMAGE
            status = one.call(Command.BLOCK_STATUS, 2 * MIB, FRAME).descriptors
            assert status == [(FRAME, 3)]
            assert scratch.used_bytes > MIB
        with server.attached(f"{ONLY}@rw") as again:
            assert again.read(0, len(IMAGE)) == IMAGE
    assert scratch.used_bytes == 0
    assert list(tmp_path.glob("tmp*")) == []
    after = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    assert after == before


def test_a_full_overlay_has_no_space_and_goes_on(packs: Path, tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, MIB)
    with running(packs, scratch=scratch) as server, server.attached(f"{ONLY}@rw") as client:
        assert not client.call(Command.WRITE, 0, MIB, payload=bytes(MIB)).error
        found = client.call(Command.WRITE, 2 * MIB, MIB, payload=b"x" * MIB)
        assert found.error == errno.ENOSPC
        assert found.texts
        assert client.read(2 * MIB, 100) == IMAGE[2 * MIB : 2 * MIB + 100]
        assert not client.call(Command.TRIM, 0, MIB).error
        assert not client.call(Command.WRITE, 2 * MIB, 4096, payload=b"y" * 4096).error
        assert client.read(2 * MIB, 4096) == b"y" * 4096


# ---- stalls, floods, aborts ----------------------------------------------------------------------

IMPATIENT = Limits(connections=8, handshake_s=0.5, stall_s=0.5, grace_s=1.0)

STALLS = {
    "silent": b"",
    "within the flags": b"\0",
    "within an option's head": client_flags() + b"IHAVE",
    "within an option": client_flags() + option(Option.GO, b"", length=100) + b"abc",
    "between options": client_flags() + option(Option.LIST),
}


@pytest.mark.parametrize("said", STALLS.values(), ids=STALLS.keys())
def test_a_client_that_stalls_in_the_handshake_is_dropped(packs: Path, said: bytes) -> None:
    with running(packs, limits=IMPATIENT) as server, connected(server.address) as client:
        client.send(said)
        assert client.is_closed()
        assert eventually(lambda: not server.server.connections)


@pytest.mark.parametrize(
    "said",
    [
        request(Command.READ, 0, 1)[:10],
        request(Command.WRITE, 0, 1000) + b"x" * 10,
    ],
)
def test_a_client_that_stalls_within_a_request_is_dropped(packs: Path, said: bytes) -> None:
    with running(packs, limits=IMPATIENT) as server, server.attached(ONLY) as client:
        client.send(said)
        assert client.is_closed()


def test_a_client_between_requests_may_take_its_time(packs: Path) -> None:
    with running(packs, limits=IMPATIENT) as server, server.attached(ONLY) as client:
        time.sleep(3 * IMPATIENT.stall_s)
        assert client.read(0, 5) == IMAGE[:5]


def test_a_client_that_takes_no_bytes_is_dropped_and_costs_little(packs: Path) -> None:
    with running(packs, limits=IMPATIENT) as server, server.attached(ONLY) as client:

        def ask() -> None:
            try:
                for _ in range(3000):
                    client.send(request(Command.READ, 0, 6 * MIB))
            except OSError:
                pass

        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        before = resident_bytes()
        asking = threading.Thread(target=ask)
        asking.start()
        with server.attached(ONLY) as other:  # nobody else is held up
            assert other.read(0, len(IMAGE)) == IMAGE
        assert eventually(lambda: server.server.connections <= 1)
        assert resident_bytes() - before < 64 * MIB
        client.sock.close()
        asking.join()


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def test_too_many_clients_are_turned_away(packs: Path) -> None:
    with running(packs, limits=Limits(connections=3)) as server:
        with server.attached(ONLY) as one, server.attached(ONLY), server.attached(ONLY):
            with connected(server.address) as fourth:
                assert fourth.is_closed()
            assert one.read(0, 1) == IMAGE[:1]
        assert eventually(lambda: not server.server.connections)
        with server.attached(ONLY) as client:
            assert client.read(0, 1) == IMAGE[:1]


def test_a_base_that_went_away_is_an_answer_and_comes_back(packs: Path) -> None:
    with running(packs) as server, connected(server.address) as client:
        client.hello()
        away = packs.rename(packs.with_name("away"))
        error, _ = client.ask(Option.LIST)
        assert error == OptionReply.ERR_UNKNOWN
        away.rename(packs)
        final, names = client.ask(Option.LIST)
        assert (final, len(names)) == (OptionReply.ACK, 1)


def test_a_path_that_is_no_utf_8_is_told_as_well_as_can_be(tmp_path: Path) -> None:
    base = tmp_path / os.fsdecode(b"odd\xff")
    base.mkdir()
    make_vm(base, "web01", IMAGE)
    with running(base) as server, connected(server.address) as client:
        client.hello()
        error, _ = client.ask(Option.GO, open_data("none/latest"))
        assert error == OptionReply.ERR_UNKNOWN
        assert client.text.endswith("odd\\udcff: no VM 'none'")
        assert client.ask(Option.GO, open_data(ONLY))[0] == OptionReply.ACK


def test_without_a_thread_to_be_had_an_image_is_given_back(
    packs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = trio.to_thread.run_sync

    async def refusing(function: Callable[..., object], *args: object, **how: Any) -> object:
        if function.__name__ in ("run", "close"):  # a session, and the end of it
            raise RuntimeError("can't start new thread")
        return await start(function, *args, **how)

    with running(packs) as server, connected(server.address) as client:
        client.hello()
        monkeypatch.setattr(trio.to_thread, "run_sync", refusing)
        client.send(option(Option.GO, open_data(ONLY)))
        assert eventually(lambda: not server.server.connections)
        monkeypatch.undo()


def test_a_reset_in_mid_request_disturbs_nobody(packs: Path) -> None:
    with running(packs) as server, server.attached(ONLY) as other:
        for said in (b"", request(0, 0, 5 * MIB) * 20, request(0, 0, 1)[:20]):
            with server.attached(ONLY) as client:
                client.send(said)
                reset(client)
        assert other.read(0, len(IMAGE)) == IMAGE
        assert eventually(lambda: server.server.connections == 1)


def reset(client: Client) -> None:
    """Close so that the server gets a reset."""
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.sock.close()


def nothing_open(server: Running) -> bool:
    server.images.sweep()
    return not len(server.images)


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_a_thousand_aborted_connections_leave_nothing(packs: Path, tmp_path: Path) -> None:
    """At every stage: within the greeting, options, requests, on overlays."""
    go = client_flags() + option(Option.GO, open_data(ONLY))
    writable = client_flags() + option(Option.GO, open_data(f"{ONLY}@rw"))
    stages = [
        b"",
        client_flags(),
        client_flags() + option(Option.LIST) * 3,
        go,
        go + request(Command.READ, 0, 4 * MIB) * 4,
        go + request(Command.READ, 0, 10)[:9],
        writable + request(Command.WRITE, 0, FRAME, payload=bytes(FRAME)),
        writable + request(Command.WRITE, 0, FRAME, payload=b"x"),
    ]
    scratch = Scratch(tmp_path)
    limits = Limits(connections=200)
    with running(packs, limits=limits, scratch=scratch) as server:
        with server.attached(ONLY) as client:  # whatever is made once
            client.read(0, 100)
        assert eventually(lambda: not server.server.connections)
        before = descriptors()
        for number in range(1000):
            with connected(server.address) as client:
                client.send(stages[number % len(stages)])
                if number % 3:
                    client.sock.settimeout(0.001 * (number % 5))
                    try:
                        client.sock.recv(1000)
                    except OSError:
                        pass
                reset(client)
        assert eventually(lambda: not server.server.connections)
        assert eventually(lambda: nothing_open(server))
        assert len(descriptors() - before) <= 2  # what the interpreter opens now and then
        assert scratch.used_bytes == 0
        with server.attached(ONLY) as client:
            assert client.read(0, len(IMAGE)) == IMAGE
    names = {thread.name for thread in threading.enumerate()}
    assert len([name for name in names if "session" in name.lower()]) == 0


# ---- the end -------------------------------------------------------------------------------------


def test_stopping_refuses_what_is_asked_and_closes(packs: Path) -> None:
    with (
        running(packs, limits=Limits(grace_s=20)) as server,
        server.attached(ONLY) as client,
        connected(server.address) as negotiating,
    ):
        negotiating.hello()
        assert client.read(0, 1) == IMAGE[:1]
        server.stop()
        assert client.is_closed()
        assert negotiating.is_closed()


def test_stopping_answers_what_it_has_with_shutdown(packs: Path) -> None:
    count = 40  # more than the sockets hold
    with (
        running(packs, limits=Limits(grace_s=20)) as server,
        server.attached(ONLY, structured=False) as client,
    ):
        client.send(request(Command.READ, 0, 1 * MIB) * count)
        assert client.answer(0, MIB).data == IMAGE[:MIB]
        server.stop()
        assert eventually(lambda: server.server.stopping)
        errors = [client.answer(0, MIB).error for _ in range(count - 1)]
        assert set(errors) == {0, errno.ESHUTDOWN}
        assert errors == sorted(errors)
        assert client.is_closed()


def test_stopping_does_not_wait_for_a_client_that_takes_no_bytes(packs: Path) -> None:
    limits = Limits(stall_s=60, grace_s=0.3)
    with running(packs, limits=limits) as server, server.attached(ONLY) as client:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.send(request(Command.READ, 0, 6 * MIB) * 50)
        server.stop()
