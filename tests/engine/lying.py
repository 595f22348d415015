"""A source whose change lists leave something out, as fast-diff of some versions of Ceph does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from backyfs.extents import gaps, merged
from backyfs.model import FRAME, Extent
from backyfs.source.contract import Bookmark, Changes
from tests.engine.memory import MemoryDisk, MemorySource


@dataclass
class LyingSource(MemorySource):
    """Tells all changes but those in the frames `omitted`."""

    tracking: bool = True
    omitted: set[int] = field(default_factory=set)

    def put(self, number: int, data: bytes, name: str = "disk") -> None:
        """Change a frame and tell nobody."""
        content = self.contents[name]
        end = min(len(content), (number + 1) * FRAME)
        content[number * FRAME : end] = data[: end - number * FRAME]
        self.omitted.add(number)

    def _disk(self, name: str, number: int, since: Mapping[str, Bookmark]) -> MemoryDisk:
        made = super()._disk(name, number, since)
        if (told := made.changed()) is not None:
            made.tell(_without(told, self.omitted, made.size))
        return made


def _without(told: Changes, omitted: set[int], size: int) -> Changes:
    hidden = [Extent(number * FRAME, FRAME) for number in omitted]
    kept = gaps(merged([*gaps(told.extents, size), *hidden]), size)
    return Changes(tuple(kept))
