"""A disk of a packs revision, open for reading. Every frame is checked against its hash.

A frame that cannot be read raises Corrupt with its place in the image and leaves a quarantine
record behind, so that the next backup can heal it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from backyfs.errors import BackyfsError, Corrupt, NoRevision
from backyfs.extents import merged
from backyfs.log import TOLD
from backyfs.model import FRAME, Extent
from backyfs.store import lock
from backyfs.store.contract import StoredImage
from backyfs.store.digest import FAN_OUT, HASH, ZERO_HASH, digest, frame_count
from backyfs.store.format import Place
from backyfs.store.fs import is_medium_error, naming, open_file, read_exactly
from backyfs.store.packs.extents import ExtentMap, SegmentRef
from backyfs.store.packs.library import PIECE_FRAMES, BadFrame, Chained, Frame, Library, Part
from backyfs.store.packs.packfile import without_waiting
from backyfs.store.packs.runs import GAP, Run
from backyfs.store.quarantine import WHOLE, Bad, Quarantine
from backyfs.store.record import DiskRecord

log = logging.getLogger(__name__)

MAP_SUFFIX = ".map"
_PIECES = 64
"""Pieces of a disk that are checked at a time."""
ZERO_FRAME = bytes(FRAME)
_MUCH_ZERO = bytes(1 << 20)
"""What who reads a hole in sequence asks for: made once, not for each request."""


def map_path(place: Place, files: Mapping[str, str]) -> Path:
    """The path of a disk's map, as its record names it."""
    for name in files:
        if name.endswith(MAP_SUFFIX):
            return place.layout.revisions / name
    raise Corrupt("the record names no map")


def load_map(path: Path, disk: DiskRecord, what: str) -> tuple[ExtentMap, int]:
    """A disk's map checked against its recorded hash, and a descriptor with the reader's lock.

    NoRevision when the file was removed meanwhile, Corrupt when it is not what was recorded, Busy.
    """
    try:
        fd = open_file(path)
    except FileNotFoundError as exc:
        raise Corrupt(f"the map {path.name} is missing") from exc
    except OSError as exc:
        raise _unreadable(path.name, exc) from exc
    try:
        lock.share(fd, what)
        with naming(path):
            status = os.fstat(fd)
        if status.st_nlink == 0:
            raise gone(what)
        if status.st_size > _map_bytes_max(disk.size):
            raise Corrupt(f"the map {path.name} has {status.st_size} bytes, which is impossible")
        data = _content(fd, status.st_size, path.name)
        if blake3(data).hexdigest() != disk.files[path.name]:
            raise Corrupt(f"the map {path.name} does not match its checksum")
        found = ExtentMap.decode(data, path.name, section_max=_map_bytes_max(disk.size))
        if found.size != disk.size:
            raise Corrupt(f"the map {path.name} is of {found.size} bytes, the disk of {disk.size}")
        return found, fd
    except BaseException:
        os.close(fd)
        raise


def gone(what: str) -> NoRevision:
    """The error for a revision that vanished while it was being opened."""
    return NoRevision(f"{what} was just removed", hint="see: backyfs status")


def _content(fd: int, size: int, name: str) -> bytes:
    try:
        return read_exactly(fd, size, 0)
    except EOFError as exc:
        raise Corrupt(f"the map {name} is being cut off") from exc
    except OSError as exc:
        raise _unreadable(name, exc) from exc


def _unreadable(name: str, exc: OSError) -> Corrupt:
    """The damage that an error of the system says a map has; raises one that says nothing of it."""
    if not is_medium_error(exc):
        raise exc  # too many open files, no permission
    return Corrupt(f"the map {name} cannot be read: {exc.strerror}")


def _map_bytes_max(size: int) -> int:
    """More than any map of a disk of `size` bytes has; a frame needs 97 bytes at most."""
    return (1 << 20) + 128 * frame_count(size)


class Standing(NamedTuple):
    """A frame of a disk as it stands: where it is stored (None: it is zero) and its hash."""

    place: Bad | None
    hash: bytes


ZERO = Standing(None, ZERO_HASH)


class PackImage:
    """StoredImage over an extent map and the library of packs."""

    def __init__(
        self,
        extent_map: ExtentMap,
        library: Library,
        quarantine: Quarantine,
        *,
        vm: str,
        revision: str,
        disk: str,
        digest: str = "",
        fd: int = -1,
        map_name: str = "",
    ) -> None:
        self.map = extent_map
        self.map_name = map_name
        self._library = library
        self._quarantine = quarantine
        self._place = (vm, revision, disk)
        self._digest = digest
        self._fd = fd
        self._open = threading.Lock()
        library.acquire()

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.map.size

    @property
    def digest(self) -> str:
        """Hex digest of size and content."""
        return self._digest or digest(self.map.size, self.map.groups)

    @property
    def data(self) -> int:
        """Bytes of the frames the map places somewhere."""
        return sum(extent.length for extent in self.extents())

    def close(self) -> None:
        """Give back the lock and the library; closing twice is harmless."""
        if self._open.acquire(blocking=False):
            self._library.release()
            if self._fd >= 0:
                os.close(self._fd)

    def raw_fd(self) -> int | None:
        """None: the bytes are compressed."""
        return None

    def hold(self) -> None:
        """Have the packs open that hold its frames, and what their patches rest on."""
        self._library.hold(ref.name for ref in self.map.segments)

    # Content

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`. ValueError outside the disk, Corrupt."""
        return self._read(offset, length)

    def read_sound(self, offset: int, length: int) -> bytes | None:
        """As `read`; None where a frame is damaged (no word of it), or not in memory."""
        try:
            with without_waiting():
                return self._read(offset, length, quiet=True)
        except (BadFrame, BlockingIOError):
            return None

    def _read(self, offset: int, length: int, *, quiet: bool = False) -> bytes:
        """`quiet`: a damaged frame is a BadFrame, and nothing else."""
        self._check_range(offset, length)
        if not length:
            return b""
        first, end = offset // FRAME, -(-(offset + length) // FRAME)
        frames = self._frames(first, end - first, quiet=quiet)
        skip, surplus = offset - first * FRAME, end * FRAME - offset - length
        if surplus:
            frames[-1] = frames[-1][:-surplus]
        if skip:
            frames[0] = frames[0][skip:]
        return bytes(frames[0]) if len(frames) == 1 else b"".join(frames)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As `read`, into `buffer`: whole frames are decoded where they shall be."""
        self._check_range(offset, len(buffer))
        end = offset + len(buffer)
        first, stop = -(-offset // FRAME), end // FRAME
        if stop <= first:
            buffer[:] = self.read(offset, len(buffer))
            return
        head, tail = first * FRAME - offset, stop * FRAME - offset
        if head:
            buffer[:head] = self.read(offset, head)
        self._frames(first, stop - first, buffer[head:tail])
        if tail < len(buffer):
            buffer[tail:] = self.read(stop * FRAME, len(buffer) - tail)

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"bytes {offset}+{length} lie outside the disk's {self.size}")

    def _frames(
        self, first: int, count: int, place: memoryview | None = None, *, quiet: bool = False
    ) -> list[Frame]:
        """Frames [first, first + count) in pieces; with `place` in there, and parts of it."""
        frames: list[Frame] = []
        runs = list(self.map.runs.find(first, count))
        if place is not None and self._library.read_elsewhere(self._parts(first, runs), place):
            return [place]
        for run in runs:
            skip = run.first - first
            where = place and place[skip * FRAME : (skip + run.span) * FRAME]
            if run.segment != GAP:
                frames += self._stored(run, where, quiet)
            elif where is None:
                frames += [ZERO_FRAME] * run.span
            else:
                where[:] = bytes(len(where))
                frames.append(where)
        return frames

    def _parts(self, first: int, runs: Iterable[Run]) -> list[Part]:
        """The stored ones among runs of a place that begins with frame `first`."""
        segments = self.map.segments
        return [
            Part(ref.name, ref.root.hex(), run.number, run.span, run.first - first)
            for run in runs
            if run.segment != GAP
            for ref in [segments[run.segment]]
        ]

    def _stored(self, run: Run, place: memoryview | None, quiet: bool) -> list[Frame]:
        ref = self.map.segments[run.segment]
        try:
            return self._library.read(ref.name, ref.root, run.number, run.span, place=place)
        except BadFrame:
            if quiet:
                raise
            return self._one_by_one(ref, run, place)

    def _one_by_one(self, ref: SegmentRef, run: Run, place: memoryview | None) -> list[Frame]:
        frames: list[Frame] = []
        for index in range(run.span):
            where = place and place[index * FRAME : (index + 1) * FRAME]
            number = run.number + index
            try:
                frames += self._library.read(ref.name, ref.root, number, 1, place=where)
            except BadFrame as exc:
                raise self._corrupt(exc, run.first + index) from exc
        return frames

    def _corrupt(self, exc: BadFrame, frame: int) -> Corrupt:
        vm, revision, disk = self._place
        offset = frame * FRAME
        self.report(exc, frame)
        return Corrupt(
            exc.reason,
            vm=vm,
            revision=revision,
            disk=disk,
            offset=offset,
            length=min(FRAME, self.size - offset),
        )

    def report(self, exc: BadFrame, frame: int) -> None:
        """Leave a quarantine record for the culprit, where the store can be written."""
        _, revision, disk = self._place
        offset = frame * FRAME
        with contextlib.suppress(OSError, BackyfsError):
            if self._quarantine.add(
                exc.bad, exc.reason, revision=revision, disk=disk, offset=offset
            ):
                values = {"revision": revision, "disk": disk, "offset": offset}
                log.warning("damaged frame", {**values, "reason": exc.reason}, extra=TOLD)

    def try_read(self, offset: int, length: int) -> bytes | None:
        """Zeros when the range is a hole, else None."""
        self._check_range(offset, length)
        first, end = offset // FRAME, -(-(offset + length) // FRAME)
        run = next(self.map.runs.find(first, end - first), None)
        if run is None or (run.segment == GAP and run.span == end - first):
            return _MUCH_ZERO if length == len(_MUCH_ZERO) else bytes(length)
        return None

    def extents(self) -> Iterator[Extent]:
        """Extents of whole frames that are stored, clipped to the size."""
        start = end = 0
        for run in self.map.runs:
            if run.first != end:
                if end > start:
                    yield Extent(start * FRAME, (end - start) * FRAME)
                start = run.first
            end = run.first + run.span
        if end > start:
            yield Extent(start * FRAME, min(end * FRAME, self.size) - start * FRAME)

    # What the store knows of frames

    def hashes(self, first: int, count: int) -> bytes:
        """Hashes of frames, 32 bytes each; zeros for zero frames. Corrupt."""
        parts = []
        for run in self.map.runs.find(first, count):
            if run.segment == GAP:
                parts.append(bytes(run.span * HASH))
            else:
                ref = self.map.segments[run.segment]
                parts.append(self._library.hashes(ref.name, ref.root, run.number, run.span))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def groups(self) -> bytes:
        """Level-1 hashes."""
        return self.map.groups

    def check(self, first: int, count: int) -> list[int]:
        """Numbers of the bad frames among [first, first + count), read from the medium."""
        return self.check_all([(first, count)])

    def check_all(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """As `check`, of several ranges."""
        pieces = (
            piece
            for first, count in ranges
            for run in self.map.runs.find(first, count)
            if run.segment != GAP
            for piece in _pieces(run)
        )
        bad: list[int] = []
        while some := list(itertools.islice(pieces, _PIECES)):
            if not self._library.sound_elsewhere(self._parts(0, some)):
                bad += [frame for piece in some for frame in self._check_run(piece)]
        for first, count in ranges:
            self._pardon(first, count, set(bad))
        return bad

    def _check_run(self, run: Run) -> list[int]:
        ref = self.map.segments[run.segment]
        try:
            self._library.read(ref.name, ref.root, run.number, run.span, fresh=True)
        except BadFrame as exc:
            if exc.bad == Bad(ref.name, WHOLE):
                self.report(exc, run.first)
                return list(range(run.first, run.first + run.span))
            if run.span == 1:
                self.report(exc, run.first)
                return [run.first]
            return [
                bad
                for index in range(run.span)
                for bad in self._check_run(
                    Run(run.first + index, 1, run.segment, run.number + index)
                )
            ]
        return []

    def _pardon(self, first: int, count: int, bad: set[int]) -> None:
        """Forget quarantine records of frames, and of their bases, that read well again."""
        known = self._quarantine.bad()
        for frame in range(first, first + count) if known else ():
            place = self.locate(frame)
            if place is None or frame in bad:
                continue
            with contextlib.suppress(BadFrame, Corrupt, ValueError, OSError, BackyfsError):
                for stored in (place, *self._library.chain(place)):
                    for item in known & {stored, Bad(stored.unit, WHOLE)}:
                        self._library.checked(stored)
                        self._quarantine.clear(item)

    def unshared(self, other: StoredImage) -> Iterator[Extent]:
        """Extents stored elsewhere than `other`'s."""
        if not isinstance(other, PackImage):
            return self.extents()
        runs = (part for run in self.map.runs for part in self._apart(run, other))
        clipped = (
            Extent(run.first * FRAME, min(run.span * FRAME, self.size - run.first * FRAME))
            for run in runs
        )
        return merged(clipped)

    def _apart(self, run: Run, other: PackImage) -> Iterator[Run]:
        """The parts of one of our runs that `other` does not have in the same place."""
        name = self.map.segments[run.segment].name
        for theirs in other.map.runs.find(run.first, run.span):
            number = run.number + theirs.first - run.first
            if (
                theirs.segment == GAP
                or theirs.number != number
                or other.map.segments[theirs.segment].name != name
            ):
                yield Run(theirs.first, theirs.span, run.segment, number)

    def shared_with(self, other: StoredImage) -> bool:
        """Whether both are read through the same map file."""
        return (
            isinstance(other, PackImage)
            and bool(self.map_name)
            and other.map_name == self.map_name
            and other._library is self._library
        )

    # For the writer

    def locate(self, frame: int) -> Bad | None:
        """Where a frame is stored; None when it is zero."""
        run = next(self.map.runs.find(frame, 1))
        return None if run.segment == GAP else Bad(self.map.segments[run.segment].name, run.number)

    def standing(self, first: int, count: int) -> Iterator[Standing]:
        """Frames [first, first + count) as they stand in the disk. Corrupt."""
        for run in self.map.runs.find(first, count):
            if run.segment == GAP:
                yield from itertools.repeat(ZERO, run.span)
                continue
            ref = self.map.segments[run.segment]
            hashes = self._library.hashes(ref.name, ref.root, run.number, run.span)
            for index in range(run.span):
                place = Bad(ref.name, run.number + index)
                yield Standing(place, hashes[index * HASH : (index + 1) * HASH])

    def chained(self, frame: int, standing: Standing) -> Chained | None:
        """A frame with its chain, as a base for a patch; None when it is zero or damaged."""
        if standing.place is None:
            return None
        try:
            return self._library.checked(standing.place, standing.hash)
        except BadFrame as exc:
            self.report(exc, frame)
            return None
        except Corrupt:
            return None

    def chained_at(self, place: Bad) -> Chained | None:
        """A stored frame with its chain, as a base for a patch; None when it is damaged."""
        try:
            return self._library.checked(place)
        except (BadFrame, Corrupt):
            return None

    def group_hash(self, group: int) -> bytes:
        """The level-1 hash of a group, computed from its frames' hashes."""
        count = min(FAN_OUT, self.map.frames - group * FAN_OUT)
        hashes = self.hashes(group * FAN_OUT, count)
        return blake3(hashes).digest() if hashes != bytes(len(hashes)) else ZERO_HASH


def _pieces(run: Run) -> Iterator[Run]:
    for skip in range(0, run.span, PIECE_FRAMES):
        count = min(PIECE_FRAMES, run.span - skip)
        yield Run(run.first + skip, count, run.segment, run.number + skip)
