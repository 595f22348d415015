"""A disk of a revision: a sparse raw file, and the table that proves its bytes.

Invariants: what `read` of a checked image returns has the recorded hash; an unchecked image hands
out what the file system returns. Where only the table's frame hashes are hit, they are computed
again from the image and count when level 1 confirms them: then the data is proven, too.

Safe from many threads. Whoever finds a bad frame records it in the quarantine.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from backyfs.errors import BackyfsError, Corrupt
from backyfs.extents import framed, joined
from backyfs.model import FRAME, Extent
from backyfs.store.contract import StoredImage
from backyfs.store.cow import damage
from backyfs.store.cow.blocks import different, frame_hashes, runs
from backyfs.store.cow.checking import Checker
from backyfs.store.cow.columns import Columns
from backyfs.store.cow.fiemap import apart
from backyfs.store.cow.files import Files, become_reader, gone, open_image, open_table
from backyfs.store.cow.reflink import data_extents
from backyfs.store.cow.table import Table, group_frames, nonzero_frames
from backyfs.store.digest import FAN_OUT, HASH, ZERO_HASH, frame_count
from backyfs.store.format import Place
from backyfs.store.fs import forget_pages, is_named, read_exactly
from backyfs.store.record import DiskRecord


class CowImage:
    """StoredImage over the two files of a disk. Made by `open`."""

    def __init__(
        self,
        place: Place,
        revision: str,
        disk: DiskRecord,
        files: Files,
        fd: int,
        table: Table,
        check: bool,
    ) -> None:
        self._place, self._revision, self._check = place, revision, check
        self.disk, self.files, self.fd, self.table = disk, files, fd, table
        self._columns = Columns(table, self.stored)
        self._checker = Checker(fd, table, self._columns, self.stored)
        self._closing = threading.Lock()

    @classmethod
    def open(
        cls,
        place: Place,
        revision: str,
        disk: DiskRecord,
        *,
        check: bool,
        published: bool = True,
    ) -> CowImage:
        """Open a disk. Corrupt, NoRevision, Unsupported, Busy.

        `published`: as a reader, with its lock; else as somebody who knows that nobody removes
        the files, or does not care.
        """
        try:
            return cls._open(place, revision, disk, check, published)
        except FileNotFoundError as exc:
            if published and not is_named(place.layout.record(revision)):
                raise gone(place, revision) from exc
            missing = f"revisions/{Path(exc.filename).name} is missing"
            raise Corrupt(missing, vm=place.name, revision=revision, disk=disk.name) from exc
        except Corrupt as exc:
            raise Corrupt(exc.reason, vm=place.name, revision=revision, disk=disk.name) from exc

    @classmethod
    def _open(
        cls, place: Place, revision: str, disk: DiskRecord, check: bool, published: bool
    ) -> CowImage:
        files = Files.of(place, disk)
        fd = open_image(files.image, disk.size)
        try:
            if published:
                become_reader(fd, place, revision)
            table = open_table(files, disk)
        except BaseException:
            os.close(fd)
            raise
        return cls(place, revision, disk, files, fd, table, check)

    def close(self) -> None:
        with self._closing:
            open_fds = [fd for fd in (self.fd, self.table.fd) if fd >= 0]
            self.fd = self.table.fd = -1
        for fd in open_fds:
            os.close(fd)

    # What the image is

    @property
    def size(self) -> int:
        return self.disk.size

    @property
    def digest(self) -> str:
        return self.disk.digest

    @property
    def data(self) -> int:
        return self.disk.data

    @property
    def unit(self) -> str:
        """The quarantine's name of this image."""
        return self.files.unit

    def groups(self) -> bytes:
        return self.table.level1

    def hold(self) -> None:
        """Nothing: its files are open."""

    def raw_fd(self) -> int | None:
        # Bytes read from a descriptor go past the check.
        return None if self._check else self.fd

    def shared_with(self, other: StoredImage) -> bool:
        return isinstance(other, CowImage) and os.path.samestat(
            os.fstat(self.fd), os.fstat(other.fd)
        )

    def unshared(self, other: StoredImage) -> Iterator[Extent]:
        if not isinstance(other, CowImage):
            return self.extents()
        if self.shared_with(other):
            return iter(())
        streams = (
            self._placed_apart(other),
            self._placed_there(other),
            self._of_other_content(other),
            map(self._group_extent, self.table.bad_groups_apart(other.table)),
        )
        return framed(heapq.merge(*streams), self.size)

    def _placed_apart(self, other: CowImage) -> Iterator[Extent]:
        return (e for e in apart(self.fd, other.fd, self.size) if e.offset < self.size)

    def _placed_there(self, other: CowImage) -> Iterator[Extent]:
        """Frames that should hold data and do in `other`, but not here in the same place."""
        for extent in framed(apart(other.fd, self.fd, self.size), self.size):
            yield from self._lost(extent.offset // FRAME, frame_count(extent.end))

    def _of_other_content(self, other: CowImage) -> Iterator[Extent]:
        """Frames whose content is not `other`'s: a hole there is no place to compare."""
        common = min(frame_count(self.size), frame_count(other.size))
        for group in range(-(-common // FAN_OUT)):
            if self.table.recorded(group) != other.table.recorded(group):
                yield from self._differing(other, group, common)

    def _differing(self, other: CowImage, group: int, common: int) -> Iterator[Extent]:
        first, end = group * FAN_OUT, min((group + 1) * FAN_OUT, common)
        try:
            mine, theirs = self.hashes(first, end - first), other.hashes(first, end - first)
        except Corrupt:
            yield Extent(first * FRAME, (end - first) * FRAME)
            return
        for number in different(mine, theirs):
            if not mine.startswith(ZERO_HASH, number * HASH):
                yield Extent((first + number) * FRAME, FRAME)

    # Reading

    def read(self, offset: int, length: int) -> bytes:
        self._require_range(offset, length)
        if not length:
            return b""
        if not self._check:
            return self._bytes(offset, length)
        first, end = offset // FRAME, -(-(offset + length) // FRAME)
        data = self._checked_frames(first, end)
        at = offset - first * FRAME
        return data if len(data) == length else data[at : at + length]

    def read_sound(self, offset: int, length: int) -> bytes | None:
        """None: it cannot tell."""
        return None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read(offset, len(buffer))

    def try_read(self, offset: int, length: int) -> bytes | None:
        self._require_range(offset, length)
        if self._check or not length:
            return None if length else b""
        buffer = bytearray(length)
        try:
            done = os.preadv(self.fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError:  # would block, or the file system cannot tell: `read` will know
            return None
        return bytes(buffer) if done == length else None

    def _require_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(
                f"[{offset}, +{length}) is not within the {self.size} bytes of the disk"
            )

    def _bytes(self, offset: int, length: int) -> bytes:
        try:
            return read_exactly(self.fd, length, offset)
        except (OSError, EOFError) as exc:
            first, end = offset // FRAME, -(-(offset + length) // FRAME)
            bad = [frame for frame in range(first, end) if self.frame(frame) is None]
            if not bad:  # it reads well now
                return read_exactly(self.fd, length, offset)
            raise self._bad(bad, f"cannot be read: {exc}") from exc

    def _checked_frames(self, first: int, end: int) -> bytes:
        expected = self.hashes(first, end - first)
        data = self._bytes(first * FRAME, min(end * FRAME, self.size) - first * FRAME)
        wrong = different(frame_hashes(data), expected)
        if not wrong:
            return data
        # Once more, from the medium: healing may be writing this very frame.
        forget_pages(self.fd, first * FRAME, len(data))
        data = self._bytes(first * FRAME, len(data))
        wrong = different(frame_hashes(data), expected)
        if wrong:
            raise self._bad([first + number for number in wrong], "fails its checksum")
        return data

    def _bad(self, frames: list[int], reason: str) -> Corrupt:
        """Record bad frames; the error for the first run of them."""
        for number in frames:
            self._report(number, reason)
        first, end = next(runs(frames))
        offset = first * FRAME
        return self._corrupt(reason, offset, min(end * FRAME, self.size) - offset)

    def _corrupt(self, reason: str, offset: int, length: int) -> Corrupt:
        return Corrupt(
            reason,
            vm=self._place.name,
            revision=self._revision,
            disk=self.disk.name,
            offset=offset,
            length=length,
        )

    def _report(self, number: int, reason: str) -> None:
        # A reader of a store it may not write to, or a full one, can only say so.
        with contextlib.suppress(OSError, BackyfsError):
            damage.report(self._place, self.files.image, self.fd, number, reason, self._revision)

    # Holes

    def extents(self) -> Iterator[Extent]:
        data = data_extents(self.fd, 0, self.size)
        if not self._check:
            return data
        return joined(heapq.merge(self._checked_extents(data), self._unproven()))

    def _checked_extents(self, data: Iterator[Extent]) -> Iterator[Extent]:
        """Whole frames, because a check reads these; also those that should not be holes.

        Reading such a frame is an error; left out, it would pass for zeros.
        """
        position = 0
        for extent in framed(data, self.size):
            yield from self._lost(position // FRAME, extent.offset // FRAME)
            yield extent
            position = extent.end
        yield from self._lost(frame_count(position), frame_count(self.size))

    def _lost(self, first: int, end: int) -> Iterator[Extent]:
        for start, stop in nonzero_frames(self.table.fd, first, end):
            yield Extent(start * FRAME, min(stop * FRAME, self.size) - start * FRAME)

    def _unproven(self) -> Iterator[Extent]:
        """Groups whose hashes nothing proves: a hole in them, and in the table, may be a loss."""
        for group in self.table.bad_groups():
            if self._columns.get(group) is None:
                yield self._group_extent(group)

    def _group_extent(self, group: int) -> Extent:
        first, end = group_frames(group, self.size)
        return Extent(first * FRAME, min(end * FRAME, self.size) - first * FRAME)

    # Hashes

    def hashes(self, first: int, count: int) -> bytes:
        if first < 0 or count < 0 or first + count > frame_count(self.size):
            raise ValueError(f"frames [{first}, +{count}) are not all in the disk")
        if not count:
            return b""
        groups = range(first // FAN_OUT, (first + count - 1) // FAN_OUT + 1)
        column = b"".join(self.column(group) for group in groups)
        at = (first - groups[0] * FAN_OUT) * HASH
        return column[at : at + count * HASH]

    def column(self, group: int) -> bytes:
        """The frame hashes of a group. Corrupt when nothing proves them."""
        column = self._columns.get(group)
        if column is None:
            raise self._corrupt("the frame hashes fail their checksum", *self._group_extent(group))
        return column

    # Frames as they are stored

    def frame(self, number: int) -> bytes | None:
        """The stored bytes of a frame as they are, None when they cannot be read."""
        offset = number * FRAME
        try:
            return read_exactly(self.fd, min(FRAME, self.size - offset), offset)
        except (OSError, EOFError):
            return None

    def stored(self, first: int, end: int) -> list[bytes | None]:
        """Frames as stored, None where one cannot be read."""
        offset = first * FRAME
        try:
            data = read_exactly(self.fd, min(end * FRAME, self.size) - offset, offset)
        except (OSError, EOFError):
            return [self.frame(number) for number in range(first, end)]
        return [data[at : at + FRAME] for at in range(0, len(data), FRAME)]

    # Checking

    def check(self, first: int, count: int) -> list[int]:
        if first < 0 or count < 0 or first + count > frame_count(self.size):
            raise ValueError(f"frames [{first}, +{count}) are not all in the disk")
        bad = list(self._checker.bad(first, first + count))
        self._remember(first, first + count, bad)
        return bad

    def check_all(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        return [number for first, count in ranges for number in self.check(first, count)]

    def _remember(self, first: int, end: int, bad: list[int]) -> None:
        """Record bad frames; forget records of frames that read well."""
        for number in bad:
            self._report(number, "fails its checksum")
        listed = damage.recorded(self._place, self.unit, first, end)
        for number in sorted(listed - set(bad)):
            with contextlib.suppress(OSError, BackyfsError):
                damage.clear(self._place, self.unit, number)
