"""The two unfinished files of a disk in the making: fresh ones, or clones of the parent's.

Invariant: a zero entry in the table of fresh files means that the frame is a hole. In a clone, and
in a copy that has bad frames, the bytes that are really there are looked at, because damage may
have come with them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable
from pathlib import Path

from backyfs.cancelling import checkpoint
from backyfs.errors import Corrupt
from backyfs.extents import framed
from backyfs.model import FRAME
from backyfs.store import space
from backyfs.store.cow.blocks import (
    BLOCK,
    changed_runs,
    data_runs,
    different,
    frame_hashes,
    runs,
)
from backyfs.store.cow.columns import batches
from backyfs.store.cow.fiemap import extent_count
from backyfs.store.cow.image import CowImage
from backyfs.store.cow.reflink import clone
from backyfs.store.cow.table import Head, group_frames, hash_at, level1_at, table_bytes
from backyfs.store.digest import HASH, frame_count
from backyfs.store.fs import Fs, forget_pages, naming, read_exactly, temporary

SYNC_BYTES = 256 << 20
"""After so many bytes the file is made durable, so that dirty memory stays bounded."""

_MODE = 0o640
_OTHER_BYTE = bytes(255 - value for value in range(256))


class Target:
    """Unfinished .img and .sum of one disk. Safe from many threads on different frames."""

    def __init__(self, fs: Fs, image: Path, table: Path, size: int) -> None:
        self._fs, self._size = fs, size
        self._image, self._table = image, table
        self._lock = threading.Lock()
        self._unsynced = 0
        self._fresh = self._holes_known = True
        self._temporaries = temporary(image), temporary(table)
        self.written = 0
        self.image_fd = self.table_fd = -1
        self.image_fd = fs.create(self._temporaries[0], _MODE)
        try:
            self.table_fd = fs.create(self._temporaries[1], _MODE)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give back the descriptors; the files stay."""
        for fd in (self.image_fd, self.table_fd):
            if fd >= 0:
                os.close(fd)
        self.image_fd = self.table_fd = -1

    # Where it begins

    def start_empty(self) -> None:
        """Begin as a disk of zeros."""
        self._fs.truncate(self.image_fd, self._size, self._image)
        self._fs.truncate(self.table_fd, table_bytes(self._size), self._table)

    def start_clone(self, parent: CowImage, unproven: Collection[int] = ()) -> None:
        """Begin with the parent's blocks, shared, cut or extended to the size.

        `unproven`: groups whose frames are all to be stored again; their hashes are not taken.
        """
        clone(self._fs, parent.fd, self.image_fd, self._image)
        # What is read of it is what changed, here and there: reading ahead would double that.
        os.posix_fadvise(self.image_fd, 0, 0, os.POSIX_FADV_RANDOM)
        self._fresh = self._holes_known = False
        self._start_table(parent, unproven)

    def start_copy(self, parent: CowImage, unproven: Collection[int] = ()) -> list[int]:
        """Begin with a copy of the parent's bytes; return its bad frames.

        A bad frame keeps its bytes and the hash they should have: damage stays visible.
        `unproven`: as of `start_clone`.
        """
        self._fs.truncate(self.image_fd, parent.size, self._image)
        bad: list[int] = []
        for extent in framed(parent.extents(), parent.size):
            for first, end in batches(extent.offset // FRAME, frame_count(extent.end)):
                checkpoint()  # all of it may take hours
                bad += self._copy(parent, first, end)
        self._start_table(parent, unproven)
        self._holes_known = not (bad or unproven)
        return bad

    def _copy(self, parent: CowImage, first: int, end: int) -> list[int]:
        frames = parent.stored(first, end)
        data = b"".join(frame or bytes(FRAME) for frame in frames)
        data = data[: parent.size - first * FRAME]
        self._write(first * FRAME, data, ((*run, False) for run in data_runs(data)))
        forget_pages(parent.fd, first * FRAME, len(data))
        try:
            expected = parent.hashes(first, end - first)
        except Corrupt:
            return list(range(first, end))
        return [first + number for number in different(frame_hashes(data), expected)]

    def _start_table(self, parent: CowImage, unproven: Collection[int]) -> None:
        clone(self._fs, parent.table.fd, self.table_fd, self._table)
        for group in unproven:  # before anything else: who cuts a block reads it, and it may be bad
            first, end = group_frames(group, parent.size)
            self._fs.punch(self.table_fd, hash_at(first), (end - first) * HASH, self._table)
        if parent.size != self._size:
            self._resize(parent)
        elif parent.table.problem:  # level 1 is to be written anew: drop what it was
            self._fs.truncate(self.table_fd, level1_at(self._size), self._table)
            self._fs.truncate(self.table_fd, table_bytes(self._size), self._table)

    def _resize(self, parent: CowImage) -> None:
        common = min(frame_count(parent.size), frame_count(self._size))
        self._fs.truncate(self.image_fd, self._size, self._image)
        # Cut first: what lay behind the frames that stay must read as zeros when it grows again.
        self._fs.truncate(self.table_fd, hash_at(common), self._table)
        self._fs.truncate(self.table_fd, table_bytes(self._size), self._table)
        if self._size < parent.size and self._size % FRAME:
            self._cut_frame(parent, self._size // FRAME)

    def _cut_frame(self, parent: CowImage, number: int) -> None:
        whole = parent.frame(number)
        if whole is None or frame_hashes(whole) != self.hashes(number, 1):
            return  # damaged: a hash made from these bytes would hide it
        cut = whole[: self._size - number * FRAME]
        self._write_table(frame_hashes(cut), hash_at(number))

    # What it holds

    def hashes(self, first: int, count: int) -> bytes:
        """The hashes of frames as they are now."""
        with naming(self._table):
            return read_exactly(self.table_fd, count * HASH, hash_at(first))

    def store(self, first: int, data: bytes, hashes: bytes) -> None:
        """Make the frames from `first` on hold `data`, whose frame hashes are given."""
        offset = first * FRAME
        if self._holes_known and self.hashes(first, len(hashes) // HASH) == bytes(len(hashes)):
            self._write(offset, data, ((*run, False) for run in data_runs(data)))
        else:
            self._write(offset, data, changed_runs(data, self._actual(offset, data)))
        self._write_table(hashes, hash_at(first))

    def _actual(self, offset: int, data: bytes) -> bytes:
        try:
            return read_exactly(self.image_fd, len(data), offset)
        except OSError:  # unreadable: take every block as different
            return data.translate(_OTHER_BYTE)

    def _write(self, offset: int, data: bytes, pieces: Iterable[tuple[int, int, bool]]) -> None:
        view, written = memoryview(data), 0
        for start, end, zero in pieces:
            if zero:
                self._punch(offset + start, offset + end)
            else:
                self._fs.pwrite(self.image_fd, view[start:end], offset + start, self._image)
                written += end - start
        self._count(written)

    def _punch(self, start: int, end: int) -> None:
        # To the end of the last block, though the file may end before: only so it is freed.
        end = -(-end // BLOCK) * BLOCK
        self._fs.punch(self.image_fd, start, end - start, self._image)

    def _write_table(self, data: bytes, offset: int) -> None:
        self._fs.pwrite(self.table_fd, data, offset, self._table)
        self._count(len(data))

    def zero(self, first: int, end: int) -> None:
        """Make frames [first, end) zero."""
        self._punch(first * FRAME, min(end * FRAME, self._size))
        self._fs.punch(self.table_fd, hash_at(first), (end - first) * HASH, self._table)

    def _count(self, written: int) -> None:
        with self._lock:
            self.written += written
            self._unsynced += written
            if self._unsynced < SYNC_BYTES:
                return
            self._unsynced = 0
        self._fs.fdatasync(self.image_fd, self._image)
        forget_pages(self.image_fd)
        space.ensure(self._image.parent, 0)

    # Where it ends

    def finish(self, head: Head, level1: bytes, groups: Iterable[int] | None) -> Head:
        """Make both files durable and give them their names; the directory is not synced.

        `groups`: those whose level-1 hash changed (None: all are to be written). Returns the head
        as written.
        """
        self._fs.fsync(self.image_fd, self._image)
        if self._fresh:
            head = Head(head.repository, head.size, extent_count(self.image_fd))
        if self._fresh or groups is None:
            self._write_table(head.encode(), 0)
        self._write_level1(level1, groups)
        self._fs.fsync(self.table_fd, self._table)
        self._fs.rename(self._temporaries[0], self._image)
        self._fs.rename(self._temporaries[1], self._table)
        return head

    def _write_level1(self, level1: bytes, groups: Iterable[int] | None) -> None:
        base = level1_at(self._size)
        if groups is None:
            pieces = data_runs(level1)
        else:
            pieces = ((first * HASH, end * HASH) for first, end in runs(sorted(groups)))
        for start, end in pieces:
            self._write_table(level1[start:end], base + start)
