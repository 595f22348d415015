"""libnbd's programs: nbdinfo, nbdcopy, nbddump, nbdsh and nbdfuse."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import images
from tests.cli.program import PROGRAM
from tests.filesystems import unmount
from tests.mount.mounts import eventually
from tests.nbd.disks import SIZE
from tests.nbd.service import Service, client, client_fails, serving, serving_at
from tests.nbd.site import FRAME, PIECES, STORES, TIB, Site
from tests.parts import require


@pytest.fixture(autouse=True)
def _needs_libnbd() -> None:
    require("libnbd")


def extents(uri: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(client("nbdinfo", "--map", "--json", uri))
    return found


# ---- nbdinfo -----------------------------------------------------------------------------------


def test_the_list_has_names_that_work(service: Service, site: Site) -> None:
    listed = json.loads(client("nbdinfo", "--list", "--json", service.uri()))["exports"]
    names = [export["export-name"] for export in listed]
    vms = [*STORES, *(f"huge-{store}" for store in STORES)]
    assert {f"{vm}/{revision}" for vm in vms for revision in site.ids(vm)} <= set(names)
    for export in listed:
        vm = export["export-name"].partition("/")[0]
        assert export["export-size"] == (TIB if vm.startswith("huge-") else SIZE)
        assert export["is_read_only"]
    newest = f"packs/{site.ids('packs')[-1]}"
    (described,) = (e["description"] for e in listed if e["export-name"] == newest)
    assert "manual:before upgrade" in described
    assert re.search(r"\d{4}-\d\d-\d\d", described)
    assert int(client("nbdinfo", "--size", service.uri(newest))) == SIZE


@pytest.mark.parametrize("store", STORES)
def test_an_export_says_what_it_can_do(service: Service, site: Site, store: str) -> None:
    name = f"{store}/{site.ids(store)[-1]}"
    found = json.loads(client("nbdinfo", "--json", service.uri(name)))
    assert found["protocol"] == "newstyle-fixed"
    assert found["structured"]
    (export,) = found["exports"]
    assert export["contexts"] == ["base:allocation"]
    assert export["export-size"] == SIZE
    said = {
        name: export[name] for name in ("is_read_only", "can_multi_conn", "can_df", "can_cache")
    }
    assert set(said.values()) == {True}
    assert not export["can_trim"]
    assert not export["can_zero"]
    assert (export["block_size_minimum"], export["block_size_maximum"]) == (1, 32 << 20)


def test_a_writable_export_says_so(service: Service) -> None:
    (export,) = json.loads(client("nbdinfo", "--json", service.uri("packs/latest@rw")))["exports"]
    said = {name: export[name] for name in ("can_flush", "can_fua", "can_trim", "can_zero")}
    assert set(said.values()) == {True}
    assert not export["is_read_only"]
    assert not export["can_multi_conn"]


def test_other_names_are_resolved_to_the_revision(service: Service, site: Site) -> None:
    old, new = site.ids("cow")
    for name, canonical in (
        ("latest", new),
        ("tag:daily", old),
        ("tag:manual:before%20upgrade", new),
    ):
        (export,) = json.loads(client("nbdinfo", "--json", service.uri(f"cow/{name}")))["exports"]
        assert export["export-name"].startswith(f"cow/{canonical}")


@pytest.mark.parametrize("name", ["", "nope", "packs/nope", "packs/latest/nope", "../packs/latest"])
def test_an_unknown_name_is_refused_with_a_reason(service: Service, name: str) -> None:
    said = client_fails("nbdinfo", service.uri(name))
    assert "No such file or directory" in said or "Invalid argument" in said


@pytest.mark.parametrize("store", STORES)
def test_the_map_covers_the_disk_and_its_holes_are_zero(
    service: Service, site: Site, store: str
) -> None:
    uri = service.uri(f"{store}/latest")
    content = site.disk.image.read_bytes()
    position = data = 0
    for extent in extents(uri):
        assert extent["offset"] == position
        position += extent["length"]
        if extent["type"] == 0:
            data += extent["length"]
        else:
            assert extent["type"] == 3
            assert not any(content[extent["offset"] : position])
    assert position == SIZE
    assert 6 << 20 < data < SIZE // 2
    totals = json.loads(client("nbdinfo", "--map", "--totals", "--json", uri))
    assert {entry["type"]: entry["size"] for entry in totals} == {0: data, 3: SIZE - data}


@pytest.mark.parametrize("store", STORES)
def test_the_map_of_a_tebibyte_comes_without_reading(service: Service, store: str) -> None:
    uri = service.uri(f"huge-{store}/latest")
    found = extents(uri)
    assert sum(extent["length"] for extent in found) == TIB
    kept = [(extent["offset"], extent["length"]) for extent in found if extent["type"] == 0]
    assert sum(length for _, length in kept) <= 4 * FRAME
    for offset, piece in PIECES.items():
        assert any(at <= offset and offset + len(piece) <= at + length for at, length in kept)


# ---- nbdcopy, nbddump, nbdfuse -----------------------------------------------------------------


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("store", STORES)
def test_nbdcopy_gets_the_bytes(
    service: Service, site: Site, store: str, connections: int, tmp_path: Path
) -> None:
    for name, image in (("latest", site.disk.image), ("tag:daily", site.before)):
        target = tmp_path / name
        many = f"--connections={connections}"
        client("nbdcopy", many, service.uri(f"{store}/{name}"), target)
        assert filecmp.cmp(target, image, shallow=False)


@pytest.mark.parametrize("store", STORES)
def test_nbdcopy_moves_data_only(service: Service, store: str, tmp_path: Path) -> None:
    target = tmp_path / "huge.img"
    client("nbdcopy", service.uri(f"huge-{store}/latest"), target)
    assert target.stat().st_size == TIB
    assert target.stat().st_blocks * 512 <= 8 * FRAME
    with target.open("rb") as stream:
        for offset, piece in PIECES.items():
            assert os.pread(stream.fileno(), len(piece), offset) == piece


def test_nbddump_shows_the_bytes(service: Service, site: Site) -> None:
    said = client("nbddump", "--length=512", service.uri("packs/latest"))
    dumped = bytes(512)
    for line in said.splitlines():
        if found := re.match(r"([0-9a-f]{10}): ((?:[0-9a-f]{2} +)+)", line):
            at, row = int(found[1], 16), bytes.fromhex(found[2])
            dumped = dumped[:at] + row + dumped[at + len(row) :]
    assert dumped == site.disk.image.read_bytes()[:512]


@contextlib.contextmanager
def _fuse(uri: str, mountpoint: Path) -> Iterator[Path]:
    """An export as a file, by nbdfuse."""
    mountpoint.mkdir()
    process = subprocess.Popen(["nbdfuse", mountpoint, uri], stdin=subprocess.DEVNULL)
    try:
        assert eventually(lambda: os.path.ismount(mountpoint) or process.poll() is not None)
        yield mountpoint / "nbd"
    finally:
        if os.path.ismount(mountpoint):
            unmount(mountpoint)
        process.wait(timeout=30)


def test_nbdfuse_makes_it_a_file(service: Service, site: Site, tmp_path: Path) -> None:
    require("fuse")
    with _fuse(service.uri("packs/latest"), tmp_path / "mnt") as file:
        assert filecmp.cmp(file, site.disk.image, shallow=False)
        with pytest.raises(OSError, match="(?i)permission denied|read-only"):
            file.write_bytes(b"x")


# ---- the library -------------------------------------------------------------------------------

_BASE = """
import errno, hashlib, json, os, random
def fails(call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as exc:
        return errno.errorcode.get(exc.errnum, exc.errnum)
"""


def nbdsh(uri: str, script: str) -> dict[str, Any]:
    """Run a script with `h`, a handle of an export; the JSON value it prints."""
    whole = f"{_BASE}\nh.set_full_info(True)\nh.connect_uri({uri!r})\n{script}"
    found: dict[str, Any] = json.loads(client("nbdsh", "-c", whole))
    return found


@pytest.mark.parametrize("store", STORES)
def test_the_library_reads_any_range(service: Service, site: Site, store: str) -> None:
    script = f"""
image = open({str(site.disk.image)!r}, 'rb')
rng = random.Random(5)
wrong = 0
for _ in range(200):
    length = rng.choice((1, 511, 4096, 65536, 200_001))
    offset = rng.randrange(h.get_size() - length)
    expected = os.pread(image.fileno(), length, offset)
    wrong += bytes(h.pread(length, offset)) != expected
    chunks = []
    def note(data, at, *more):
        chunks.append(at)
    whole = h.pread_structured(length, offset, note, nbd.CMD_FLAG_DF)
    wrong += bytes(whole) != expected or chunks != [offset]
print(json.dumps({{"wrong": wrong, "name": h.get_canonical_export_name()}}))
"""
    name = f"{store}/{site.ids(store)[-1]}"
    found = nbdsh(service.uri(f"{store}/latest"), script)
    assert found["wrong"] == 0
    assert found["name"].startswith(name)


def test_many_requests_in_flight_are_answered_each(service: Service, site: Site) -> None:
    script = f"""
image = open({str(site.disk.image)!r}, 'rb')
rng = random.Random(6)
waiting = []
for _ in range(300):
    offset = rng.randrange(h.get_size() - 5000)
    buffer = nbd.Buffer(5000)
    waiting.append((h.aio_pread(buffer, offset), buffer, offset))
right = 0
for cookie, buffer, offset in waiting:
    while not h.aio_command_completed(cookie):
        h.poll(-1)
    right += bytes(buffer.to_bytearray()) == os.pread(image.fileno(), 5000, offset)
print(json.dumps({{"right": right}}))
"""
    assert nbdsh(service.uri("packs/latest"), script) == {"right": 300}


def test_misuse_is_answered_and_forgiven(service: Service) -> None:
    script = """
h.set_strict_mode(0)
size = h.get_size()
said = {
    "read past the end": fails(h.pread, 512, size - 100),
    "read far away": fails(h.pread, 512, 2**63 - 1024),
    "write": fails(h.pwrite, b"x" * 512, 0),
    "trim": fails(h.trim, 512, 0),
    "zero": fails(h.zero, 512, 0),
    "then": len(h.pread(512, 0)),
}
print(json.dumps(said))
"""
    assert nbdsh(service.uri("cow/latest"), script) == {
        "read past the end": "EINVAL",
        "read far away": "EINVAL",
        "write": "EPERM",
        "trim": "EPERM",
        "zero": "EPERM",
        "then": 512,
    }


@pytest.mark.parametrize("store", STORES)
def test_writes_are_kept_until_the_connection_ends(
    service: Service, site: Site, store: str
) -> None:
    script = """
h.pwrite(b"written" * 100, 1000)
h.pwrite(b"and sure" * 100, 5000, nbd.CMD_FLAG_FUA)
h.trim(8192, 1 << 20)
h.zero(100_000, (1 << 20) + 50_000)
h.flush()
area = bytes(h.pread(2 << 20, 0))
other = nbd.NBD()
other.connect_uri(URI)
print(json.dumps({
    "written": area[1000:1700] == b"written" * 100 and area[5000:5800] == b"and sure" * 100,
    "trimmed": not any(area[1 << 20:][:8192]),
    "zeroed": not any(area[(1 << 20) + 50_000:][:100_000]),
    "area": hashlib.sha256(bytes(h.pread(900, 0)) + area[1700:5000]).hexdigest(),
    "other": hashlib.sha256(bytes(other.pread(2 << 20, 0))).hexdigest(),
    "past the end": fails(h.pwrite, b"x" * 512, h.get_size() - 100),
}))
"""
    uri = service.uri(f"{store}/latest@rw")
    before = site.fingerprint(store)
    found = nbdsh(uri, f"URI = {uri!r}\nh.set_strict_mode(0)\n{script}")
    content = site.disk.image.read_bytes()[: 2 << 20]
    assert found == {
        "written": True,
        "trimmed": True,
        "zeroed": True,
        "area": images.digest(content[:900] + content[1700:5000]),
        "other": images.digest(content),
        "past the end": "ENOSPC",
    }
    assert site.fingerprint(store) == before


# ---- other ways to connect ---------------------------------------------------------------------


def test_a_long_list_is_shown_whole(site: Site, tmp_path: Path) -> None:
    for number in range(70 // len(site.ids("huge-packs"))):
        shutil.copytree(site.base / "huge-packs", tmp_path / "vms" / f"vm{number}")
    with serving(tmp_path / "vms", tmp_path / "log") as service:
        listed = json.loads(client("nbdinfo", "--list", "--json", service.uri()))["exports"]
    assert len(listed) >= 60


def test_a_unix_socket(site: Site, tmp_path: Path) -> None:
    path, target = tmp_path / "nbd.sock", tmp_path / "copy"
    with serving_at(path, site.base, tmp_path / "log"):
        uri = f"nbd+unix:///cow/latest?socket={path}"
        client("nbdcopy", uri, target)
        assert filecmp.cmp(target, site.disk.image, shallow=False)
    assert not path.exists()


def test_a_socket_that_a_service_manager_made(site: Site, tmp_path: Path) -> None:
    server = PROGRAM, "-l", str(tmp_path / "log"), "-b", str(site.base), "nbd-server"
    listed = json.loads(client("nbdinfo", "--list", "--json", "--", "[", *server, "]"))["exports"]
    assert len(listed) >= 6
    alone = PROGRAM, "-l", str(tmp_path / "log"), "-b", str(site.base / "huge-packs"), "nbd-server"
    assert int(client("nbdinfo", "--size", "--", "[", *alone, "]")) == TIB


def test_clients_leave_nothing_in_the_server(service: Service) -> None:
    before = service.sockets()
    for _ in range(5):
        client("nbdinfo", "--size", service.uri("packs/latest"))
        client_fails("nbdinfo", "--size", service.uri("packs/nope"))
    deadline = time.monotonic() + 10
    while service.sockets() > before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
