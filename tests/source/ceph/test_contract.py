"""The suite of the sources on real images: with all features, and clones without object maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from backyfs.source.ceph.config import read_config
from backyfs.source.ceph.source import CephSource
from backyfs.testing.source import SourceContract
from tests.ceph.cluster import Cluster

MIB = 1 << 20

SIZES = {"root": 10 * MIB + 4096 + 77, "data": 4 * MIB}


class Images:
    """Two images of a VM, and power over them."""

    def __init__(self, cluster: Cluster, settings: Mapping[str, Any]) -> None:
        self.cluster = cluster
        self.source = CephSource(read_config(settings))

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


class CephContract(SourceContract):
    @pytest.fixture
    def subject(self, ceph: Cluster) -> Images:
        for name, size in SIZES.items():
            self.make(ceph, name, size)
        images = Images(ceph, {"pool": "rbd", "images": {name: name for name in SIZES}})
        images.write("root", 0, b"boot")
        images.write("root", 5 * MIB + 1, b"x" * 300_000)
        images.write("root", SIZES["root"] - 3, b"end")
        images.write("data", MIB, b"y" * 100)
        return images

    def make(self, ceph: Cluster, name: str, size: int) -> None:
        ceph.create_image(name, size)


class TestFastDiff(CephContract):
    pass


class TestClonesWithoutObjectMaps(CephContract):
    def make(self, ceph: Cluster, name: str, size: int) -> None:
        parent = f"{name}-parent"
        ceph.create_image(parent, size)
        with ceph.image(parent) as image:
            image.write(b"parent" * 50_000, 2 * MIB)
            image.create_snap("s")
            image.protect_snap("s")
        options = ["--image-feature", "layering"]
        assert ceph.rbd("clone", *options, f"rbd/{parent}@s", f"rbd/{name}").returncode == 0
