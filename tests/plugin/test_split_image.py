"""The example's own tests: the suite of backyfs, with power over the files behind the source."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from backyfs_split_image import SplitImage

from backyfs.testing.source import SourceContract

PART = 1 << 20


class Parts:
    """Three files, the last one of an odd size."""

    def __init__(self, directory: Path) -> None:
        self._files = [directory / f"web01.img.{number:03}" for number in range(3)]
        rng = random.Random(1)
        for path, size in zip(self._files, (PART, PART, 300_001), strict=True):
            path.write_bytes(rng.randbytes(size // 2) + bytes(size - size // 2))
        self.source = SplitImage(directory / "web01.img")

    def content(self) -> dict[str, bytes]:
        return {"disk": b"".join(path.read_bytes() for path in self._files)}

    def write(self, disk: str, offset: int, data: bytes) -> None:
        for at, byte in enumerate(data, offset):
            number, position = divmod(at, PART)
            with open(self._files[number], "r+b") as stream:
                stream.seek(position)
                stream.write(bytes([byte]))

    def take_away(self) -> None:
        self._files[1].unlink()


class TestSplitImage(SourceContract):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> Parts:
        return Parts(tmp_path)
