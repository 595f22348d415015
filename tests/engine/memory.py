"""A source in memory: passes the contract suite of the sources, and misbehaves on request."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from backyfs.errors import SourceUnavailable
from backyfs.extents import merged
from backyfs.model import FRAME, Consistency, Extent
from backyfs.source.contract import Bookmark, Changes, Snapshot

ReadHook = Callable[[str, int, int], None]


def no_hook(disk: str, offset: int, length: int) -> None:
    """Does nothing before a read."""


@dataclass
class MemorySource:
    """Disks as bytearrays. Snapshots are frozen copies unless `live`.

    With `tracking`, a snapshot whose bookmark comes back tells what changed since, exactly; in
    4 KiB blocks. `before_read` is called with disk, offset and length before each read.
    """

    contents: dict[str, bytearray] = field(default_factory=dict)
    live: bool = False
    tracking: bool = False
    before_read: ReadHook = no_hook
    on_published: Callable[[], None] = lambda: None
    type: str = "memory"
    gone: bool = False
    entered: int = 0
    left: int = 0
    published: int = 0
    read_bytes: int = 0
    since: dict[str, Bookmark] = field(default_factory=dict)
    kept: dict[int, dict[str, bytes]] = field(default_factory=dict)

    def disks(self) -> Sequence[str]:
        self._require()
        return tuple(self.contents)

    def _require(self) -> None:
        if self.gone:
            raise SourceUnavailable("the memory is gone")

    @contextlib.contextmanager
    def snapshot(self, revision: str, since: Mapping[str, Bookmark]) -> Iterator[Snapshot]:
        self._require()
        self.entered += 1
        self.since = dict(since)
        number = self.entered
        if self.tracking:
            self.kept[number] = {name: bytes(data) for name, data in self.contents.items()}
        disks = {name: self._disk(name, number, since) for name in self.contents}
        try:
            yield MemorySnapshot(self, disks)
        finally:
            self.left += 1
            for disk in disks.values():
                disk.open = False

    def remembers(self, since: Mapping[str, Bookmark]) -> bool:
        """Whether the copies are there that `tracking` kept."""
        names = since.keys() & self.contents.keys()
        return bool(names) and all(
            name in self.kept.get(since[name].get("snapshot", 0), {}) for name in names
        )

    def _disk(self, name: str, number: int, since: Mapping[str, Bookmark]) -> MemoryDisk:
        data = self.contents[name] if self.live else bytes(self.contents[name])
        changes = None
        if self.tracking and name in since:
            old = self.kept.get(since[name].get("snapshot", 0), {}).get(name)
            changes = None if old is None else Changes(tuple(_differences(old, data)))
        return MemoryDisk(self, name, data, {"snapshot": number}, changes)


@dataclass
class MemorySnapshot:
    source: MemorySource
    disks: Mapping[str, MemoryDisk]
    consistency: Consistency = Consistency.CRASH
    reason: str = "made in memory"

    @property
    def frozen(self) -> bool:
        return not self.source.live

    def published(self) -> None:
        self.source.published += 1
        self.source.on_published()


class MemoryDisk:
    def __init__(
        self,
        source: MemorySource,
        name: str,
        data: bytes | bytearray,
        bookmark: Bookmark,
        changes: Changes | None,
    ) -> None:
        self._source, self._name, self._data, self._changes = source, name, data, changes
        self.size = len(data)
        self.bookmark = bookmark
        self.open = True

    def data(self) -> Iterable[Extent]:
        zeros = bytes(4096)
        return (
            Extent(at, min(4096, self.size - at))
            for at in range(0, self.size, 4096)
            if self._data[at : at + 4096] != zeros[: self.size - at]
        )

    def changed(self) -> Changes | None:
        return self._changes

    def tell(self, changes: Changes) -> None:
        """Have `changed` say this instead."""
        self._changes = changes

    def read(self, offset: int, length: int) -> bytes:
        if not 0 <= offset <= offset + length <= self.size:
            raise ValueError(f"[{offset}, +{length}) is outside of {self.size}")
        if not self.open:
            raise SourceUnavailable("the snapshot was given back")
        self._source.before_read(self._name, offset, length)
        self._source.read_bytes += length
        found = bytes(self._data[offset : offset + length])
        if len(found) < length:
            raise SourceUnavailable(f"{self._name} ends at {offset + len(found)}")
        return found


def _differences(old: bytes, new: bytes | bytearray) -> Iterator[Extent]:
    blocks = (
        Extent(at, min(4096, len(new) - at))
        for at in range(0, len(new), 4096)
        if old[at : at + 4096] != new[at : at + 4096]
    )
    return merged(blocks)


def disk(frames: str, seed: int = 0, tail: int = 0) -> bytearray:
    """A disk by its frames: '.' is zero, a letter always the same bytes; `tail` bytes more."""
    content = bytearray()
    for letter in frames:
        content += bytes(FRAME) if letter == "." else frame(letter, seed)
    content += frame("tail", seed)[:tail]
    return content


def frame(letter: str, seed: int = 0) -> bytes:
    return random.Random(f"{letter} {seed}").randbytes(FRAME)
