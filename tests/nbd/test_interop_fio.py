"""fio's engine for NBD: many small requests at once, and what was written read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.nbd.service import Service, client
from tests.nbd.site import STORES, Site
from tests.parts import require


def fio(uri: str, scratch: Path, *options: str) -> dict[str, Any]:
    """Run one job; its result."""
    require("fio")
    said = scratch / "fio.json"
    where = "--name=job", "--ioengine=nbd", f"--uri={uri}", f"--output={said}"
    client("fio", *where, "--output-format=json", "--bs=4k", "--iodepth=16", *options)
    result: dict[str, Any] = json.loads(said.read_text())["jobs"][0]
    assert result["error"] == 0
    return result


@pytest.mark.parametrize("store", STORES)
def test_random_reads(service: Service, store: str, tmp_path: Path) -> None:
    uri = service.uri(f"{store}/latest")
    result = fio(uri, tmp_path, "--rw=randread", "--size=8m")
    assert result["read"]["io_bytes"] == 8 << 20


@pytest.mark.parametrize("store", STORES)
def test_what_is_written_to_an_overlay_is_read_back(
    service: Service, site: Site, store: str, tmp_path: Path
) -> None:
    before = site.fingerprint(store)
    verify = "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0"
    result = fio(
        service.uri(f"{store}/latest@rw"), tmp_path, "--rw=randwrite", "--size=4m", *verify
    )
    assert result["write"]["io_bytes"] == 4 << 20
    assert result["read"]["io_bytes"] == 4 << 20
    assert site.fingerprint(store) == before
