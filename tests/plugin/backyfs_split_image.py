"""A source for images that are split into parts: NAME.000, NAME.001 … make one disk.

An example of a plug-in. Settings: `image`, the path without the number.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from backyfs.errors import ConfigError, SourceUnavailable
from backyfs.model import DEFAULT_DISK, Consistency, Extent
from backyfs.source.contract import Bookmark, Changes, Snapshot


def make(settings: Mapping[str, Any]) -> SplitImage:
    """What the entry point names: settings to a source; opens nothing."""
    if unknown := settings.keys() - {"image"}:
        raise ConfigError(f"split-image: unknown key {min(unknown)!r}", hint="known is: image")
    if not isinstance(settings.get("image"), str):
        raise ConfigError("split-image: the key 'image' is missing")
    return SplitImage(Path(settings["image"]))


class SplitImage:
    """One disk out of several files."""

    type = "split-image"

    def __init__(self, image: Path) -> None:
        self._image = image

    def disks(self) -> Sequence[str]:
        """One, if its parts are there."""
        self._parts()
        return [DEFAULT_DISK]

    def _parts(self) -> list[Path]:
        found = sorted(self._image.parent.glob(f"{self._image.name}.[0-9][0-9][0-9]"))
        wanted = [self._image.with_name(f"{self._image.name}.{n:03}") for n in range(len(found))]
        if not found or found != wanted:
            raise SourceUnavailable(
                f"{self._image}: {len(found)} parts, and not one after the other",
                hint=f"they must be called {self._image.name}.000, {self._image.name}.001 …",
            )
        return found

    @contextmanager
    def snapshot(self, revision: str, since: Mapping[str, Bookmark]) -> Iterator[Snapshot]:
        """The files as they are: nobody is kept from writing to them."""
        with ExitStack() as opened:
            try:
                descriptors = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in self._parts()]
            except OSError as exc:
                raise SourceUnavailable(f"{exc.filename}: {exc.strerror}") from exc
            for descriptor in descriptors:
                opened.callback(os.close, descriptor)
            disk = Disk(descriptors)
            opened.callback(disk.close)
            yield Split({DEFAULT_DISK: disk})


class Split:
    """The snapshot."""

    consistency = Consistency.CRASH
    reason = "files that may be written to while they are read"
    frozen = False

    def __init__(self, disks: Mapping[str, Disk]) -> None:
        self.disks = disks

    def published(self) -> None:
        """Nothing to give back."""


class Disk:
    """The parts one after the other. Safe from many threads: it only reads by position."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self._descriptors: Sequence[int] = descriptors
        sizes = [os.fstat(descriptor).st_size for descriptor in descriptors]
        self._starts = [0, *accumulate(sizes)]

    @property
    def size(self) -> int:
        """Of all parts together."""
        return self._starts[-1]

    @property
    def bookmark(self) -> Bookmark:
        """Files do not remember what was written to them."""
        return {}

    def data(self) -> Iterable[Extent]:
        """All of it: zeros are found by reading."""
        return [Extent(0, self.size)] if self.size else []

    def changed(self) -> Changes | None:
        """Not known: everything is read."""
        return None

    def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes, out of as many parts as it takes."""
        if not 0 <= offset <= offset + length <= self.size or length < 0:
            raise ValueError(f"{offset}+{length} is outside of the disk")
        found = b"".join(self._pieces(offset, offset + length))
        if len(found) != length:
            raise SourceUnavailable(f"a part was cut short while it was read, at byte {offset}")
        return found

    def _pieces(self, offset: int, end: int) -> Iterator[bytes]:
        while offset < end:
            number = bisect_right(self._starts, offset) - 1
            if number >= len(self._descriptors):
                raise SourceUnavailable("the snapshot is over")
            start, behind = self._starts[number], self._starts[number + 1]
            piece = self._pread(number, min(end, behind) - offset, offset - start)
            if not piece:
                return
            yield piece
            offset += len(piece)

    def _pread(self, number: int, length: int, offset: int) -> bytes:
        try:
            return os.pread(self._descriptors[number], length, offset)
        except OSError as exc:
            raise SourceUnavailable(f"part {number}: {exc.strerror}") from exc

    def close(self) -> None:
        """Reading is over: a number of a closed descriptor may be another file's by then."""
        self._descriptors = []
