"""Pack files in the making, and the segments a revision appends its frames to.

A segment is one file while it is written: at most 1 GiB of stored frames, then the next begins.
Appending is serialised by a lock; everything expensive happened before, in the caller's thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from backyfs.store import space
from backyfs.store.fs import Fs, temporary
from backyfs.store.packs import codec
from backyfs.store.packs.extents import SegmentRef
from backyfs.store.packs.library import PACK_SUFFIX
from backyfs.store.packs.table import (
    ENTRY,
    NAMES_MAX,
    NO_BASE,
    SEGMENT_FRAMES_MAX,
    SegmentTable,
    encode_table,
    pack_header,
)
from backyfs.store.quarantine import Bad

SEGMENT_BYTES_MAX = 1 << 30
DIRTY_BYTES_MAX = 256 << 20
"""Bytes of a pack that may wait in the page cache; beyond that we wait for the older half."""
WRITEBACK_BYTES = 16 << 20
WRITE_BYTES = 1 << 20
"""Bytes that are collected for one call: patches are small, and each comes by itself."""
PIECES_MAX = 64
"""Pieces that are collected: each was compressed in room for a whole frame, and as long as it is in
use, what it left of that is fit for nothing else."""


class PackWriter:
    """A pack file while it is written: header, frames in order, then the table."""

    def __init__(self, target: Path, repository: UUID, fs: Fs) -> None:
        self._target, self._fs = target, fs
        self._tmp = temporary(target)
        self._fd = fs.create(self._tmp)
        self.at = self._written = self._pushed = self._awaited = 0
        self._waiting: list[bytes | bytearray] = []
        self._failure: BaseException | None = None
        try:
            self.write(pack_header(repository, os.urandom(32)))
        except BaseException:
            self.abandon()
            raise

    def write(self, *pieces: bytes | bytearray) -> None:
        """Append bytes at `at`, which must not change any more; some are kept back.

        After a failure nothing more can be written: it would lie at the wrong place. Whoever
        tries, in another thread, fails for the same reason.
        """
        if self._failure is not None:
            raise self._failure
        self._waiting += pieces
        self.at += sum(map(len, pieces))
        if self.at - self._written >= WRITE_BYTES or len(self._waiting) >= PIECES_MAX:
            self._write()

    def _write(self) -> None:
        """Write what was kept back; keeps the amount of unwritten page cache bounded."""
        try:
            self._fs.writev(self._fd, self._waiting, self._target)
        except BaseException as exc:
            self._failure = exc
            self.close()
            raise
        self._waiting, self._written = [], self.at
        if self.at - self._pushed >= WRITEBACK_BYTES:
            self._push()

    def _push(self) -> None:
        """Let the disk work while we compress, so that the fsync at the end is short."""
        self._fs.start_writeback(self._fd, self._pushed, self.at - self._pushed)
        self._pushed = self.at
        if self.at - self._awaited > DIRTY_BYTES_MAX:
            length = self.at - self._awaited - DIRTY_BYTES_MAX // 2
            self._fs.await_writeback(self._fd, self._awaited, length)
            self._awaited += length
            space.ensure(self._target.parent, 0)

    def publish(self, tables: Sequence[SegmentTable], names: Sequence[str]) -> None:
        """Write the table, make all durable and give the file its name (not yet durable)."""
        for piece in encode_table(self.at, tables, names):
            self.write(piece)
        self._write()
        self._fs.fsync(self._fd, self._target)
        self.close()
        self._fs.rename(self._tmp, self._target)

    def close(self) -> None:
        """Close the descriptor; an unfinished file stays for clean-up."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def abandon(self) -> None:
        """Close and remove an unfinished file: its space may be needed at once."""
        self.close()
        with contextlib.suppress(OSError):
            os.unlink(self._tmp)


class Prepared(NamedTuple):
    """A frame ready to be appended: its stored bytes, its hash and, for a patch, its base."""

    stored: bytes
    hash: bytes
    depth: int = 0
    base: Bad | None = None


class SegmentWriter:
    """Appends prepared frames of one revision to as many segments as it takes."""

    def __init__(self, directory: Path, revision: str, repository: UUID, fs: Fs) -> None:
        self._directory, self._revision = directory, revision
        self._repository, self._fs = repository, fs
        self._lock = threading.Lock()
        self._pack: PackWriter | None = None
        self._table = SegmentTable("", [])
        self._indices: dict[str, int] = {}
        self.finished: list[SegmentRef] = []
        self.stored_bytes = 0

    def append(self, frames: Sequence[Prepared]) -> tuple[int, int]:
        """Append frames; returns the segment's index and the first frame's number in it."""
        with self._lock:
            pack = self._room(frames)
            number = self._table.count
            at = pack.at
            pack.write(*[frame.stored for frame in frames])
            for frame in frames:
                self._enter(frame, at)
                at += len(frame.stored)
            return len(self.finished), number

    def _enter(self, frame: Prepared, at: int) -> None:
        table, size = self._table, len(frame.stored)
        if frame.base is None:
            entry = ENTRY.pack(at, size, codec.ZSTD, 0, 0, NO_BASE, 0, 0)
        else:
            index = self._index(frame.base.unit)
            entry = ENTRY.pack(at, size, codec.PATCH, frame.depth, 0, index, 0, frame.base.number)
        table.entries += entry
        table.hashes += frame.hash
        table.stored += size

    def _index(self, name: str) -> int:
        index = self._indices.get(name)
        if index is None:
            index = self._indices[name] = len(self._table.names)
            self._table.names.append(name)
        return index

    def _room(self, frames: Sequence[Prepared]) -> PackWriter:
        table = self._table
        if self._pack is not None and (
            table.stored >= SEGMENT_BYTES_MAX
            or table.count + len(frames) > SEGMENT_FRAMES_MAX
            or len(table.names) + len(frames) > NAMES_MAX
        ):
            self._finish()
        if self._pack is None:
            name = f"{self._revision}-{len(self.finished)}"
            target = self._directory / f"{name}{PACK_SUFFIX}"
            self._pack = PackWriter(target, self._repository, self._fs)
            self._table = SegmentTable(name, [name])
            self._indices = {name: 0}
        return self._pack

    def _finish(self) -> None:
        """Publish the open segment's file; its table leaves memory."""
        if self._pack is None:
            return
        table = self._table
        self._pack.publish([table], table.names)
        self.stored_bytes += self._pack.at
        self.finished.append(SegmentRef(table.name, table.count, table.root))
        self._pack, self._table = None, SegmentTable("", [])

    def finish(self) -> None:
        """Publish what is open and make the names durable."""
        with self._lock:
            self._finish()
            if self.finished:
                self._fs.sync_dir(self._directory)

    def close(self) -> None:
        """Give back the descriptor of an unfinished file."""
        with self._lock:
            if self._pack is not None:
                self._pack.close()
