"""The waist of the store: what engine, reader and restore may rely on in either format.

Synchronous, safe from many threads, without trio. `packs` and `cow` both pass
tests/store/test_contract.py, which is this file in executable form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from backyfs.model import Extent

Buffer = bytes | bytearray | memoryview


class Image(Protocol):
    """The bytes of one disk in one revision: immutable while open, safe from many threads."""

    @property
    def size(self) -> int:
        """Bytes of the disk; need not be a multiple of anything."""

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes at byte `offset`; holes read as zeros.

        Raises ValueError outside 0 <= offset <= offset + length <= size, Corrupt (with the
        frame's offset and length) when stored bytes fail their checksum.
        """

    def read_sound(self, offset: int, length: int) -> bytes | None:
        """As `read`, but None where bytes are damaged, or not in memory; never blocks.

        Nothing is recorded of damage: it takes a write to the store, which may have to wait for
        long.
        """

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As `read`, filling a writable `buffer` of bytes: saves a copy where much is read.

        After an error its content is undefined.
        """

    def try_read(self, offset: int, length: int) -> bytes | None:
        """As `read` when no input, output or decoding is needed, else None; never blocks."""

    def extents(self) -> Iterator[Extent]:
        """Sorted, disjoint, touching-free extents that hold data; the rest are holes."""

    def raw_fd(self) -> int | None:
        """A descriptor whose bytes are the image's (cow), or None; closed with the image."""

    def close(self) -> None:
        """Give back descriptors and the reader's lock; closing twice is harmless."""


class StoredImage(Image, Protocol):
    """An image with what its store knows of each frame: hashes, digest and damage."""

    @property
    def digest(self) -> str:
        """Hex digest of size and content (docs/format.md, section 2), equal in all formats."""

    @property
    def data(self) -> int:
        """Bytes of the frames that are not zero."""

    def hashes(self, first: int, count: int) -> bytes:
        """BLAKE3 of frames [first, first + count), 32 bytes each; a zero frame is 32 zero bytes.

        Raises Corrupt where the table that holds them is unreadable.
        """

    def groups(self) -> bytes:
        """Level-1 hashes of the digest tree: 32 bytes per 1024 frames."""

    def check(self, first: int, count: int) -> list[int]:
        """Read frames [first, first + count) from the medium; return the numbers of bad ones.

        Puts bad ones into quarantine and takes out those that read well again. Does not use or
        fill caches. Holes cost nothing.
        """

    def check_all(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """As `check`, of several ranges (first, count), ascending and apart."""

    def hold(self) -> None:
        """Have open what reading needs: whoever removes the revision by force takes nothing away.

        Leaves out what cannot be opened: reading it says why.
        """

    def shared_with(self, other: StoredImage) -> bool:
        """Whether both are certain to hold the same bytes without comparing (same stored file)."""


@runtime_checkable
class SharingImage(StoredImage, Protocol):
    """An image whose store can tell which of its frames are those of another image, too."""

    def unshared(self, other: StoredImage) -> Iterator[Extent]:
        """Sorted extents of whole frames that hold data and are not stored as `other`'s are.

        What is left out lies in the same stored place as in `other`, at the same offset: if it
        reads well in one, it does in both.
        """


class DiskWriter(Protocol):
    """Takes the frames of one disk, in any order, from many threads, each frame at most once.

    Frames never written keep the parent disk's content (zeros without a parent).
    """

    @property
    def size(self) -> int:
        """Bytes of the new disk."""

    def required(self) -> list[Extent]:
        """Extents (frame-aligned, clipped to size) that must be written whatever changed.

        The frame at the end of the smaller disk after a change of size, and frames whose stored
        copy is known to be damaged.
        """

    def write(self, offset: int, data: Buffer) -> int:
        """Take whole frames starting at byte `offset`; return the bytes of frames that differ.

        `offset` is a multiple of FRAME; so is len(data), unless it ends at `size`.
        """

    def zero(self, offset: int, length: int) -> int:
        """Make whole frames zero (rules as `write`); returns the bytes of those that were not.

        Costs what was there.
        """


class RevisionWriter(Protocol):
    """One revision in the making; nothing of it is visible before `commit` returned.

    A context manager: leaving it without `commit` removes what was written. Not thread-safe,
    except that its disk writers are.
    """

    @property
    def revision(self) -> str:
        """Id of the new revision."""

    def disk(self, name: str, size: int) -> DiskWriter:
        """Start a disk. Its parent is the disk of that name in the parent revision, if any."""

    def seal(self) -> None:
        """Make all data durable (not yet visible); after this no disk writer may be used."""

    def image(self, name: str) -> StoredImage:
        """The disk as stored, after `seal`; belongs to the writer, do not close."""

    def written(self, name: str) -> list[Extent]:
        """Frame-aligned extents of a disk this revision stored anew, sorted; after `seal`."""
