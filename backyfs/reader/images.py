"""The images a process has open: shared by all who read the same disk, closed soon after.

Whoever opens a disk gets a lease. The image behind it is opened once, keeps the reader's lock of
its revision while any lease lives, and is closed `linger_s` after the last one ended: a `cp`
followed by a `sha256sum` opens it once, a forgotten one does not hold up the removal of its
revision. At most `images_max` are open.

Synchronous and safe from many threads; `sweep` must be called about once per second.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from backyfs.model import Extent
from backyfs.reader.cache import CachedImage, FrameCache
from backyfs.reader.shared import Lease, SharedImages
from backyfs.store.contract import Buffer, Image, StoredImage
from backyfs.store.record import Record
from backyfs.store.repository import Repository

LINGER_S = 4.0
IMAGES_MAX = 512


class ReadableImage(Protocol):
    """An image as readers get it: with a read that never waits for another thread."""

    @property
    def size(self) -> int:
        """Bytes of the disk."""

    def read(self, offset: int, length: int) -> Buffer:
        """Exactly `length` bytes. ValueError outside the image; Corrupt, OSError."""

    def try_read(self, offset: int, length: int) -> Buffer | None:
        """The bytes when they are in memory or a hole, else None; never blocks."""

    def raw_fd(self) -> int | None:
        """A descriptor whose bytes are the image's, or None; closed with the image."""

    def close(self) -> None:
        """Close the image."""

    def read_unless_reserved(self, offset: int, length: int) -> Buffer | None:
        """As `read`; None where it would wait for a thread that decodes the same bytes, or record
        that they are damaged.
        """

    def prefetch(self, extent: Extent) -> None:
        """Make a later `read` of the extent cheap; reports no damage."""


class WritableImage(ReadableImage, Protocol):
    """An image that can be written to: a view, of which nothing lasts."""

    def write(self, offset: int, data: Buffer) -> None:
        """Replace bytes. ValueError outside the image; OSError, ENOSPC when nothing is left."""

    def flush(self) -> None:
        """Have errors of earlier writes told. OSError."""


class DiskImage(ReadableImage, Protocol):
    """A readable image of a disk, which knows where it holds data."""

    def extents(self) -> Iterator[Extent]:
        """Sorted, disjoint extents that hold data; the rest are holes."""


class RawImage:
    """An image that is a plain file (cow): the kernel's page cache is its cache."""

    def __init__(self, image: Image, fd: int) -> None:
        self._image, self._fd, self._size = image, fd, image.size

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._size

    def extents(self) -> Iterator[Extent]:
        """As the image's."""
        return self._image.extents()

    def raw_fd(self) -> int | None:
        """The descriptor whose bytes are the image's."""
        return self._fd

    def close(self) -> None:
        """Close the image and its descriptor."""
        self._image.close()

    def try_read(self, offset: int, length: int) -> Buffer | None:
        """The bytes if the page cache holds them all, else None."""
        self._check(offset, length)
        data = bytearray(length)
        try:
            count = os.preadv(self._fd, [data], offset, os.RWF_NOWAIT)
        except OSError:  # not cached, or a file system that cannot tell
            return None
        return data if count == length else None

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes, from the file; an OSError is the file system's."""
        self._check(offset, length)
        data = os.pread(self._fd, length, offset)
        if len(data) == length:
            return data
        return self._image.read(offset, length)  # names what is wrong with a file cut short

    def read_unless_reserved(self, offset: int, length: int) -> bytes | None:
        """None: a read that is not cached belongs into a thread."""
        return None

    def prefetch(self, extent: Extent) -> None:
        """Nothing: the kernel reads ahead by itself."""

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self._size:
            raise ValueError(f"bytes {offset}+{length} lie outside the disk's {self._size}")


class Text:
    """A small file's content as a readable image."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._data)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of a range."""
        return self._data[offset : offset + length]

    try_read = read_unless_reserved = read

    def raw_fd(self) -> int | None:
        """None: there is no file."""
        return None

    def prefetch(self, extent: Extent) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class SliceImage:
    """Bytes [start, start + size) of an image, which is closed by whoever opened it."""

    def __init__(self, image: ReadableImage, start: int, size: int) -> None:
        self._image, self._start, self._size = image, start, size

    @property
    def size(self) -> int:
        """Bytes of the slice."""
        return self._size

    def read(self, offset: int, length: int) -> Buffer:
        """Exactly `length` bytes. ValueError outside the slice; Corrupt, OSError."""
        return self._image.read(self._place(offset, length), length)

    def try_read(self, offset: int, length: int) -> Buffer | None:
        """The bytes when they are in memory or a hole, else None; never blocks."""
        return self._image.try_read(self._place(offset, length), length)

    def read_unless_reserved(self, offset: int, length: int) -> Buffer | None:
        """As `read`; None where it would wait for a thread that decodes the same bytes."""
        return self._image.read_unless_reserved(self._place(offset, length), length)

    def raw_fd(self) -> int | None:
        """None: no descriptor begins where the slice does."""
        return None

    def prefetch(self, extent: Extent) -> None:
        """Make a later `read` of the extent cheap; reports no damage."""
        length = min(extent.length, self._size - extent.offset)
        if length > 0:
            self._image.prefetch(Extent(self._start + extent.offset, length))

    def close(self) -> None:
        """Nothing: the image is not ours."""

    def _place(self, offset: int, length: int) -> int:
        if offset < 0 or length < 0 or offset + length > self._size:
            raise ValueError(f"bytes {offset}+{length} lie outside the slice's {self._size}")
        return self._start + offset


class WritableSlice(SliceImage):
    """A slice of an image that can be written to."""

    def __init__(self, image: WritableImage, start: int, size: int) -> None:
        super().__init__(image, start, size)
        self._writable = image

    def write(self, offset: int, data: Buffer) -> None:
        """Replace bytes. ValueError outside the slice; OSError, ENOSPC when nothing is left."""
        self._writable.write(self._place(offset, len(data)), data)

    def flush(self) -> None:
        """Have errors of earlier writes told. OSError."""
        self._writable.flush()


def readable(image: StoredImage, digest: str, cache: FrameCache) -> DiskImage:
    """An image of either format with what suits it: frames cached, or the file as it is."""
    fd = image.raw_fd()
    return CachedImage(image, digest, cache) if fd is None else RawImage(image, fd)


Key = tuple[str, str, str, bool]
"""Directory of the repository, revision, disk, and whether frames are checked."""


class OpenImages:
    """All images of one process, by repository, revision and disk."""

    def __init__(
        self,
        cache: FrameCache,
        *,
        linger_s: float = LINGER_S,
        images_max: int = IMAGES_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cache = cache
        self._images = SharedImages[Key, DiskImage](
            images_max=images_max, linger_s=lambda image: linger_s, clock=clock
        )

    def __len__(self) -> int:
        return len(self._images)

    def open(
        self, repository: Repository, record: Record, disk: str, *, check: bool = False
    ) -> Lease[DiskImage]:
        """A lease of a disk. NoRevision, Corrupt; OSError ENFILE when too many are open.

        `check`: verify every frame that is read; without it a cow image's bytes are what its file
        system returns (packs frames are always verified).
        """

        def make() -> DiskImage:
            stored = repository.open_disk(record, disk, check=check)
            stored.hold()
            return readable(stored, record.disks[disk].digest, self.cache)

        return self._images.open((str(repository.path), record.id, disk, check), make)

    def sweep(self) -> None:
        """Close what nobody has used for `linger_s`."""
        self._images.sweep()

    def close(self) -> None:
        """Close all images, leased or not; for the end of the process."""
        self._images.close()
