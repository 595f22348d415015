"""QEMU's programs: qemu-img, qemu-io, and qemu-nbd and qemu-storage-daemon as clients."""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.filesystems import unmount
from tests.mount.mounts import eventually
from tests.nbd.disks import PATTERN, PATTERN_AT, PATTERN_SIZE, SIZE
from tests.nbd.service import Service, client, client_fails
from tests.nbd.site import STORES, TIB, Site
from tests.parts import require


@pytest.fixture(autouse=True)
def _needs_qemu() -> None:
    require("qemu-img")


def test_info(service: Service) -> None:
    found = json.loads(
        client("qemu-img", "info", "-f", "raw", "--output=json", service.uri("packs/latest"))
    )
    assert (found["format"], found["virtual-size"]) == ("raw", SIZE)


@pytest.mark.parametrize("store", STORES)
def test_convert_and_compare(service: Service, site: Site, store: str, tmp_path: Path) -> None:
    target, raw = tmp_path / "disk.qcow2", ("-f", "raw")
    latest, old = service.uri(f"{store}/latest"), service.uri(f"{store}/tag:daily")
    client("qemu-img", "convert", *raw, "-O", "qcow2", latest, target)
    client("qemu-img", "compare", "-f", "qcow2", "-F", "raw", target, site.disk.image)
    said = client("qemu-img", "compare", *raw, "-F", "raw", site.before, old)
    assert "Images are identical" in said
    assert "Content mismatch" in client_fails("qemu-img", "compare", *raw, latest, old)


@pytest.mark.parametrize("store", STORES)
def test_map(service: Service, site: Site, store: str) -> None:
    uri = service.uri(f"{store}/latest")
    found = json.loads(client("qemu-img", "map", "-f", "raw", "--output=json", uri))
    content = site.disk.image.read_bytes()
    assert [extent["start"] for extent in found[1:]] == [
        extent["start"] + extent["length"] for extent in found[:-1]
    ]
    assert sum(extent["length"] for extent in found) == SIZE
    holes = [(e["start"], e["length"]) for e in found if not e["data"]]
    assert sum(length for _, length in holes) > SIZE // 2
    assert not any(any(content[start : start + length]) for start, length in holes)
    huge = service.uri(f"huge-{store}/latest")
    tebibyte = json.loads(client("qemu-img", "map", "-f", "raw", "--output=json", huge))
    assert sum(extent["length"] for extent in tebibyte) == TIB


def test_io_finds_patterns(service: Service) -> None:
    uri = service.uri("cow/latest")
    inside = f"read -P {PATTERN} {PATTERN_AT + 1000} {PATTERN_SIZE - 2000}"
    said = client("qemu-io", "-r", "-f", "raw", "-c", inside, "-c", "read -P 0 512k 64k", uri)
    assert said.count("read ") == 2
    beside = f"read -P {PATTERN} {PATTERN_AT - 100} 1000"
    assert "Pattern verification failed" in client_fails(
        "qemu-io", "-r", "-f", "raw", "-c", beside, uri
    )


def test_io_writes_to_an_overlay_alone(service: Service, site: Site) -> None:
    before = site.fingerprint("packs")
    steps = (
        "write -P 7 1M 300k",
        "write -f -P 8 1M 64k",
        "write -z 2M 1M",
        "discard 1536k 4k",
        "flush",
        "read -P 8 1M 64k",
        "read -P 7 1088k 236k",
        "read -P 0 2M 1M",
    )
    commands = [word for step in steps for word in ("-c", step)]
    client("qemu-io", "-f", "raw", *commands, service.uri("packs/latest@rw"))
    assert site.fingerprint("packs") == before
    read_only = service.uri("packs/latest")
    assert "Permission denied" in client_fails("qemu-io", "-f", "raw", "-c", steps[0], read_only)


@contextlib.contextmanager
def background(*command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program that goes on until it is told to end."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_qemu_nbd_serves_it_on(service: Service, site: Site, tmp_path: Path) -> None:
    require("libnbd")
    path, target = tmp_path / "sock", tmp_path / "copy"
    command = "qemu-nbd", "--read-only", "--format=raw", "--shared=4", f"--socket={path}"
    with background(*command, service.uri("packs/latest")) as process:
        assert eventually(lambda: path.exists() or process.poll() is not None)
        client("nbdcopy", f"nbd+unix:///?socket={path}", target)
    assert filecmp.cmp(target, site.disk.image, shallow=False)


def test_the_storage_daemon_makes_it_a_file(service: Service, site: Site, tmp_path: Path) -> None:
    require("qemu-storage-daemon")
    require("fuse")
    file, export = tmp_path / "disk", "cow/latest"
    file.touch()
    where = f"server.type=inet,server.host=127.0.0.1,server.port={service.port},export={export}"
    daemon = (
        *("qemu-storage-daemon", "--blockdev", f"driver=nbd,node-name=disk,read-only=on,{where}"),
        *("--export", f"fuse,id=file,node-name=disk,mountpoint={file}"),
    )
    with background(*daemon) as process:
        assert eventually(lambda: os.path.ismount(file) or process.poll() is not None)
        assert filecmp.cmp(file, site.disk.image, shallow=False)
    if os.path.ismount(file):
        unmount(file)
