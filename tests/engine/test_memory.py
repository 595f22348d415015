"""The source in memory keeps the contract of the real ones, so what it shows the engine is true."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from backyfs.testing.source import SourceContract, Subject
from tests.engine.memory import MemorySource, disk


@dataclass
class InMemory:
    source: MemorySource

    def content(self) -> dict[str, bytes]:
        return {name: bytes(data) for name, data in self.source.contents.items()}

    def write(self, disk: str, offset: int, data: bytes) -> None:
        content = self.source.contents[disk]
        data = data[: len(content) - offset]
        content[offset : offset + len(data)] = data

    def take_away(self) -> None:
        self.source.gone = True


class TestMemorySource(SourceContract):
    @pytest.fixture(params=["frozen", "live", "tracking"])
    def subject(self, request: pytest.FixtureRequest) -> Subject:
        contents = {"a": disk("ab..c" * 5, tail=700), "b": disk("." * 15 + "xyz")}
        live, tracking = request.param == "live", request.param == "tracking"
        return InMemory(MemorySource(contents, live=live, tracking=tracking))
