"""An export that is open: bytes by offset in the export, whether disk, partition or overlay.

Offsets here are those of the client; an image has others when a partition is exported. Belongs to
one connection; its image is shared with others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import cast

from backyfs.model import FRAME, Extent
from backyfs.nbd.datamap import DataMap, Piece
from backyfs.nbd.protocol.handshake import ExportInfo
from backyfs.reader.images import DiskImage
from backyfs.reader.overlay import Origin, Overlay
from backyfs.reader.shared import Lease
from backyfs.store.contract import Buffer

_KEPT_MAX = 4
"""Bytes of a block that are kept for each byte of it that waits to be sent."""


class Attached:
    """The bytes of an export. `start` is where it begins in the image.

    Whoever reads or writes keeps within the export's size: Transmission makes sure of it.
    """

    def __init__(
        self,
        info: ExportInfo,
        lease: Lease[DiskImage],
        data_map: Callable[[DiskImage], DataMap],
        *,
        start: int = 0,
        overlay: Overlay | None = None,
    ) -> None:
        self.info, self.start = info, start
        self._lease, self._overlay, self._data_map = lease, overlay, data_map
        self._image = lease.image
        self._bytes = overlay or lease.image
        self._map: DataMap | None = None

    @property
    def raw_fd(self) -> int | None:
        """A descriptor with the image's bytes (the export begins at `start`), or None."""
        return self._bytes.raw_fd()

    # Reading

    def read(self, offset: int, length: int) -> Buffer:
        """Exactly `length` bytes. Corrupt, OSError."""
        return _apart(self._bytes.read(self.start + offset, length))

    def try_read(self, offset: int, length: int) -> Buffer | None:
        """The bytes when they are in memory, else None; never blocks."""
        data = self._bytes.try_read(self.start + offset, length)
        return None if data is None else _apart(data)

    def frames(self, offset: int, length: int) -> list[tuple[int, int]]:
        """A range (offset, length) cut at the frames of the image."""
        found, end = [], offset + length
        while offset < end:
            stop = min(end, offset + FRAME - (self.start + offset) % FRAME)
            found.append((offset, stop - offset))
            offset = stop
        return found

    def stored(self, offset: int, length: int) -> bool:
        """Whether a range is surely no hole in any part: the usual case, answered quickly."""
        start = self.start + offset
        return self._overlay is None and self.map.stored(start, start + length)

    def hole(self, offset: int, end: int) -> bool:
        """Whether bytes [offset, end), some at least, surely are a hole."""
        start, end = self.start + offset, self.start + end
        return start < end and self._overlay is None and self.map.hole(start, end)

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """A range cut into what is stored and what is a hole; neighbours may be alike."""
        start = self.start + offset
        for begin, end, stored in self._pieces(start, start + length):
            yield Piece(begin - self.start, end - self.start, stored)

    def _pieces(self, start: int, end: int) -> Iterator[Piece]:
        if self._overlay is None:
            yield from self.map.pieces(start, end)
            return
        for extent, origin in self._overlay.pieces(start, end - start):
            if origin is Origin.IMAGE:
                yield from self.map.pieces(extent.offset, extent.end)
            else:
                yield Piece(extent.offset, extent.end, origin is Origin.OVERLAY)

    @property
    def map(self) -> DataMap:
        """Where the image holds data."""
        if self._map is None:
            self._map = self._data_map(self._image)
        return self._map

    def prefetch(self, offset: int, length: int) -> None:
        """Make a later read cheap; reports no damage."""
        self._bytes.prefetch(Extent(self.start + offset, length))

    # Writing

    @property
    def writable(self) -> bool:
        """Whether there is an overlay to write to."""
        return self._overlay is not None

    def write(self, offset: int, data: Buffer) -> None:
        """Replace bytes. OSError ENOSPC when overlays take too much."""
        assert self._overlay is not None
        self._overlay.write(self.start + offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Make bytes zero. OSError ENOSPC."""
        assert self._overlay is not None
        self._overlay.zero(self.start + offset, length)

    def close(self) -> None:
        """Drop what was written; give the image back. Harmless when repeated."""
        if self._overlay is not None:
            self._overlay.close()
        self._lease.close()


def _apart(data: Buffer) -> Buffer:
    """A small part of a block as bytes of its own, so that the cache can drop the block."""
    if isinstance(data, memoryview) and len(data) * _KEPT_MAX < len(cast("Sized", data.obj)):
        return bytes(data)
    return data
