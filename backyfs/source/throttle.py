"""A source that is read no faster than so many bytes per second, all disks together.

A read waits, in its own thread, until its bytes fit the rate; what a second left unused is not
made up for later.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from backyfs.model import Consistency, Extent
from backyfs.source import contract
from backyfs.source.cancelling import checkpoint
from backyfs.source.contract import (
    Backups,
    Bookmark,
    Changes,
    DiskSnapshot,
    Session,
    Snapshot,
    Source,
)

_STEP_S = 1.0
"""How long a wait may go on before it looks whether the backup is to stop."""


class Rate:
    """`bytes_per_s` (>= 1) for many threads. `now` and `sleep` are those of `time`, in seconds."""

    def __init__(
        self,
        bytes_per_s: int,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._now, self._sleep = now, sleep
        self._free_at = now()
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Wait until `count` more bytes may be read; a backup that is to stop does not wait."""
        with self._lock:
            now = self._now()
            begin = max(self._free_at, now)
            self._free_at = begin + count / self._bytes_per_s
        while (left := begin - self._now()) > 0:
            checkpoint()
            self._sleep(min(left, _STEP_S))


class ThrottledSource:
    """Another source, read at a rate."""

    def __init__(self, source: Source, rate: Rate) -> None:
        self._source, self._rate = source, rate

    @property
    def type(self) -> str:
        return self._source.type

    def disks(self) -> Sequence[str]:
        return self._source.disks()

    @contextlib.contextmanager
    def session(self, backups: Backups) -> Iterator[ThrottledSource]:
        with contract.session(self._source, backups) as source:
            yield ThrottledSource(source, self._rate)

    def remembers(self, since: Mapping[str, Bookmark]) -> bool:
        return isinstance(self._source, Session) and self._source.remembers(since)

    @contextlib.contextmanager
    def snapshot(self, revision: str, since: Mapping[str, Bookmark]) -> Iterator[Snapshot]:
        with self._source.snapshot(revision, since) as snapshot:
            yield _Snapshot(snapshot, self._rate)


class _Snapshot:
    def __init__(self, snapshot: Snapshot, rate: Rate) -> None:
        self._snapshot = snapshot
        self.quiescing = contract.quiescing(snapshot)
        self.disks: Mapping[str, DiskSnapshot] = {
            name: _Disk(disk, rate) for name, disk in snapshot.disks.items()
        }

    @property
    def consistency(self) -> Consistency:
        return self._snapshot.consistency

    @property
    def reason(self) -> str:
        return self._snapshot.reason

    @property
    def frozen(self) -> bool:
        return self._snapshot.frozen

    def published(self) -> None:
        self._snapshot.published()


@dataclass(frozen=True, slots=True)
class _Disk:
    disk: DiskSnapshot
    rate: Rate

    @property
    def size(self) -> int:
        return self.disk.size

    @property
    def bookmark(self) -> Bookmark:
        return self.disk.bookmark

    def data(self) -> Iterable[Extent]:
        return self.disk.data()

    def changed(self) -> Changes | None:
        return self.disk.changed()

    def read(self, offset: int, length: int) -> bytes:
        self.rate.take(length)
        return self.disk.read(offset, length)
