"""The suite of the sources, with a hypervisor that takes all snapshots it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from backyfs.source import registry
from backyfs.source.contract import Source
from backyfs.testing.source import SourceContract
from tests.ceph.cluster import Cluster
from tests.source.flyingcircus.host import hosting

MIB = 1 << 20
SIZES = {"root": 6 * MIB + 4096 + 77, "data": 4 * MIB}


class Vm:
    """Two images of a VM, and power over them."""

    def __init__(self, cluster: Cluster, settings: Mapping[str, Any]) -> None:
        self.cluster = cluster
        self.source: Source = registry.make("flyingcircus", settings)

    def content(self) -> dict[str, bytes]:
        return {name: self._read(name) for name in SIZES}

    def _read(self, disk: str) -> bytes:
        with self.cluster.image(disk) as image:
            data: bytes = image.read(0, image.size())
        return data

    def write(self, disk: str, offset: int, data: bytes) -> None:
        with self.cluster.image(disk) as image:
            image.write(data, offset)

    def take_away(self) -> None:
        assert self.cluster.rbd("rename", "rbd/data", "rbd/elsewhere").returncode == 0


class TestFlyingCircus(SourceContract):
    @pytest.fixture
    def subject(self, ceph: Cluster) -> Iterator[Vm]:
        for name, size in SIZES.items():
            ceph.create_image(name, size)
        with hosting(ceph, "web01", *SIZES) as address:
            images = {name: f"rbd/{name}" for name in SIZES}
            vm = Vm(ceph, {"images": images, "vm": "web01", "consul": address})
            vm.write("root", 5 * MIB + 1, b"x" * 300_000)
            vm.write("root", SIZES["root"] - 3, b"end")
            vm.write("data", MIB, b"y" * 100)
            yield vm
