"""A source whose snapshots are taken by the test: frozen or not, quick or slow, or not at all."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from backyfs.errors import SourceUnavailable
from backyfs.model import Consistency
from backyfs.source.contract import Bookmark, DiskSnapshot


@dataclass
class StillSnapshot:
    frozen: bool = True
    consistency: Consistency = Consistency.CRASH
    reason: str = "a snapshot"
    disks: Mapping[str, DiskSnapshot] = field(default_factory=dict)
    told: int = 0

    def published(self) -> None:
        self.told += 1


def _nothing() -> None:
    pass


@dataclass
class StillSource:
    """`during` is called when a snapshot is taken, and may raise."""

    snapshots: StillSnapshot = field(default_factory=StillSnapshot)
    during: Callable[[], object] = _nothing
    there: bool = True
    seconds: float = 0.0
    open: int = 0
    type: str = "still"

    def disks(self) -> Sequence[str]:
        if not self.there:
            raise SourceUnavailable("not there")
        return ["disk"]

    @contextlib.contextmanager
    def snapshot(self, revision: str, since: Mapping[str, Bookmark]) -> Iterator[StillSnapshot]:
        time.sleep(self.seconds)
        self.during()
        self.open += 1
        try:
            yield self.snapshots
        finally:
            self.open -= 1
