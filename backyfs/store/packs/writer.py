"""A packs revision in the making: what differs from the parent becomes frames, patches and a map.

Order of work per frame: zero? hash; equal to the parent's hash? patch or plain; append. Only the
append is under a lock. Nothing is visible, and nothing names the new files, before the record.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from blake3 import blake3

from backyfs.errors import Corrupt, UsageError
from backyfs.extents import merged
from backyfs.model import FRAME, Extent, disk_name
from backyfs.store.contract import Buffer
from backyfs.store.digest import FAN_OUT, HASH, frame_count, group_count
from backyfs.store.format import Place
from backyfs.store.fs import prepare
from backyfs.store.packs import codec
from backyfs.store.packs.extents import ExtentMap, SegmentRef
from backyfs.store.packs.heal import Repairs
from backyfs.store.packs.image import MAP_SUFFIX, ZERO, ZERO_FRAME, PackImage, Standing
from backyfs.store.packs.library import Library
from backyfs.store.packs.rewrite import Replacement
from backyfs.store.packs.runs import GAP, Run, Runs, Scattered, overlaid
from backyfs.store.packs.segment import Prepared, SegmentWriter
from backyfs.store.quarantine import Bad

_LATER = 1 << 30
"""Segment numbers of this revision while writing: above all of the parent's."""


class ParentDisk(NamedTuple):
    """The disk this one continues: its open image, its files, and its known bad frames."""

    image: PackImage
    files: Mapping[str, str]
    bad: Mapping[int, Bad | None]


class PackDiskWriter:
    """DiskWriter of the packs format."""

    def __init__(
        self,
        size: int,
        parent: ParentDisk | None,
        segments: SegmentWriter,
        repairs: Repairs,
        *,
        lost: bool = False,
    ) -> None:
        """`lost`: there is a parent disk, but it cannot be opened, so everything is required."""
        self.size = size
        self.parent = parent
        self._lost = lost
        self._segments = segments
        self._repairs = repairs
        self._frames = frame_count(size)
        self._lock = threading.Lock()
        self._changes = Scattered()
        self._repaired: dict[Bad, int] = {}
        self._required = set(self._required_frames())

    def _required_frames(self) -> Iterator[int]:
        if self.parent is None:
            return
        old = self.parent.image.size
        if old != self.size:
            boundary = min(old, self.size) // FRAME
            if boundary < self._frames:
                yield boundary
        yield from (frame for frame in self.parent.bad if frame < self._frames)

    def required(self) -> list[Extent]:
        """Extents that must be written: the boundary after a resize, and damaged frames."""
        if self._lost:
            return [Extent(0, self.size)] if self.size else []
        return list(
            merged(
                Extent(frame * FRAME, min(FRAME, self.size - frame * FRAME))
                for frame in self._required
            )
        )

    def write(self, offset: int, data: Buffer) -> int:
        """Take whole frames from byte `offset`; returns the bytes of those that differ."""
        first, count = self._aligned(offset, len(data))
        data = bytes(data).ljust(count * FRAME, b"\0")  # no copy of bytes that are whole frames
        view = memoryview(data)
        prepared: list[Prepared] = []
        places: list[int] = []
        zeros: list[int] = []
        for number, old in enumerate(self._standing(first, count), first):
            at = (number - first) * FRAME
            if data.startswith(ZERO_FRAME, at):
                if old != ZERO:
                    zeros.append(number)
                continue
            frame = view[at : at + FRAME]
            fresh = blake3(frame).digest()
            if self._kept(number, frame, fresh, old):
                continue
            prepared.append(self._prepared(number, frame, fresh, old))
            places.append(number)
        self._enter(places, prepared, zeros)
        return self._length(places) + self._length(zeros)

    def _length(self, frames: Iterable[int]) -> int:
        return sum(min(FRAME, self.size - frame * FRAME) for frame in frames)

    def _aligned(self, offset: int, length: int) -> tuple[int, int]:
        end = offset + length
        if offset % FRAME or offset < 0 or end > self.size or (end % FRAME and end != self.size):
            raise ValueError(f"bytes {offset}+{length} are not whole frames of {self.size}")
        return offset // FRAME, -(-length // FRAME)

    def _standing(self, first: int, count: int) -> list[Standing | None]:
        """The parent's frames; None for all of them when its table cannot be read."""
        found: list[Standing | None] = []
        if self.parent is not None:
            inside = max(0, min(count, self.parent.image.map.frames - first))
            try:
                found += self.parent.image.standing(first, inside)
            except Corrupt:
                return [None] * count
        return found + [ZERO] * (count - len(found))

    def _kept(self, number: int, frame: memoryview, fresh: bytes, old: Standing | None) -> bool:
        """Whether the parent's stored frame serves: equal, and not damaged or just repaired."""
        if self.parent is not None and number in self.parent.bad:
            place = self.parent.image.locate(number)
            if place is None or not self._repairs.offer(place, frame, fresh):
                return False
            self._repaired[place] = number
            return True
        return old is not None and old.hash == fresh

    def _prepared(
        self, number: int, frame: memoryview, fresh: bytes, old: Standing | None
    ) -> Prepared:
        if self.parent is not None and old is not None and number not in self.parent.bad:
            patch = self._patch(self.parent, number, old, bytes(frame), fresh)
            if patch is not None:
                return patch
        return Prepared(codec.compress(frame), fresh)

    def _patch(
        self, parent: ParentDisk, number: int, old: Standing, frame: bytes, fresh: bytes
    ) -> Prepared | None:
        base = old.place
        below = parent.image.chained(number, old)
        if below is None or base is None:
            return None
        depth = below.depth + 1
        if below.depth >= codec.DEPTH_MAX:
            # Chains stay short: patch against what the parent's frame itself is a patch of.
            assert below.base is not None
            base, depth = below.base, below.depth
            below = parent.image.chained_at(base)
            if below is None:
                return None
        if not codec.related(frame, below.frame):
            return None
        stored = codec.compress_patch(frame, below.frame)
        if len(stored) > codec.PATCH_SURE * below.full_bytes:
            plain = codec.compress(frame)
            if len(stored) >= codec.PATCH_GAIN * len(plain):
                return Prepared(plain, fresh)
        return Prepared(stored, fresh, depth, base)

    def _enter(self, places: list[int], prepared: list[Prepared], zeros: list[int]) -> None:
        changes = [Run(frame, 1, GAP, 0) for frame in zeros]
        if prepared:
            segment, number = self._segments.append(prepared)
            changes += [
                Run(frame, 1, _LATER + segment, number + index)
                for index, frame in enumerate(places)
            ]
        with self._lock:
            self._changes.add(_joined(changes))

    def zero(self, offset: int, length: int) -> int:
        """Make whole frames zero; returns the bytes of those that were not."""
        first, count = self._aligned(offset, length)
        if self.parent is None or not count:
            return 0
        covered = min(first + count, self.parent.image.map.frames)
        removed = [
            Run(run.first, run.span, GAP, 0)
            for run in self.parent.image.map.runs.find(first, covered - first)
            if run.segment != GAP
        ]
        if removed:
            with self._lock:
                self._changes.add(removed)
        return sum(self._length(range(run.first, run.first + run.span)) for run in removed)

    # After all frames are here

    def store_anew(self, frames: Mapping[Bad, Replacement]) -> None:
        """Store those of our frames that were to be put back and could not be."""
        ours = {place: number for place, number in self._repaired.items() if place in frames}
        prepared = [Prepared(frames[place].stored, frames[place].hash) for place in ours]
        self._enter(list(ours.values()), prepared, [])

    def unchanged(self) -> bool:
        """Whether the disk is the parent's, byte for byte."""
        return self.parent is not None and not self._changes and self.size == self.parent.image.size

    def written(self) -> list[Extent]:
        """Frame-aligned extents stored anew, clipped to the size."""
        return list(
            merged(
                Extent(run.first * FRAME, min(run.span * FRAME, self.size - run.first * FRAME))
                for run in self._changes
                if run.segment != GAP
            )
        )

    def new_map(self, finished: list[SegmentRef]) -> ExtentMap:
        """The disk's map, with the parent's level-1 hashes still in place of the changed ones."""
        base = self.parent.image.map if self.parent else ExtentMap(0, (), Runs(), b"")
        runs = overlaid(base.runs, self._changes, self._frames)
        used = list(dict.fromkeys(runs.segments))
        runs.renumber({number: index for index, number in enumerate(used)})
        segments = [
            finished[number - _LATER] if number >= _LATER else base.segments[number]
            for number in used
        ]
        groups = base.groups[: group_count(self.size) * HASH]
        return ExtentMap(
            self.size, segments, runs, groups.ljust(group_count(self.size) * HASH, b"\0")
        )

    def changed_groups(self) -> list[int]:
        """Groups whose level-1 hash must be computed anew."""
        groups = {
            group
            for run in self._changes
            for group in range(run.first // FAN_OUT, (run.first + run.span - 1) // FAN_OUT + 1)
        }
        if self.parent is not None and self.parent.image.size != self.size:
            groups.add(min(self.size, self.parent.image.size) // FRAME // FAN_OUT)
        return sorted(group for group in groups if group < group_count(self.size))


def _joined(runs: list[Run]) -> list[Run]:
    found: list[Run] = []
    for run in runs:
        last = found[-1] if found else None
        if (
            last is not None
            and last.first + last.span == run.first
            and last.segment == run.segment
            and (run.segment == GAP or last.number + last.span == run.number)
        ):
            found[-1] = Run(last.first, last.span + run.span, last.segment, last.number)
        else:
            found.append(run)
    return found


class PackStage:
    """Stage of the packs format: one set of segments for all disks of the revision."""

    def __init__(
        self,
        place: Place,
        library: Library,
        revision: str,
        parents: Mapping[str, ParentDisk],
        lost: Collection[str] = (),
    ) -> None:
        """`lost`: disks of the parent revision that cannot be opened."""
        self._place, self._library, self._revision = place, library, revision
        self._parents, self._lost = parents, lost
        self._segments = SegmentWriter(place.layout.packs, revision, place.uuid, place.fs)
        self._repairs = Repairs(place, library)
        self._disks: dict[str, PackDiskWriter] = {}
        self._images: dict[str, PackImage] = {}
        self._files: dict[str, Mapping[str, str]] = {}
        self._map_bytes = 0
        library.acquire()
        self._open = True

    @property
    def notes(self) -> Sequence[str]:
        """What was healed."""
        return self._repairs.notes()

    @property
    def stored_bytes(self) -> int:
        """Bytes of the pack and map files so far."""
        return self._segments.stored_bytes + self._map_bytes

    def disk(self, name: str, size: int) -> PackDiskWriter:
        """Start a disk."""
        disk_name(name)
        if name in self._disks:
            raise UsageError(f"two disks are called {name}")
        writer = PackDiskWriter(
            size,
            self._parents.get(name),
            self._segments,
            self._repairs,
            lost=name in self._lost,
        )
        self._disks[name] = writer
        return writer

    def seal(self) -> None:
        """Repair what could be repaired; publish packs, then maps."""
        left = self._repairs.apply()
        for writer in self._disks.values():
            writer.store_anew(left)
        self._segments.finish()
        wrote = [self._seal_disk(name, writer) for name, writer in self._disks.items()]
        if any(wrote):
            self._place.fs.sync_dir(self._place.layout.revisions)

    def _seal_disk(self, name: str, writer: PackDiskWriter) -> bool:
        if writer.unchanged():
            assert writer.parent is not None
            self._files[name] = writer.parent.files
            self._images[name] = self._image(name, writer.parent.image.map, "")
            return False
        draft = self._image(name, writer.new_map(self._segments.finished), "")
        groups = bytearray(draft.map.groups)
        for group in writer.changed_groups():
            groups[group * HASH : (group + 1) * HASH] = draft.group_hash(group)
        draft.map.groups = bytes(groups)
        self._images[name] = draft
        self._files[name] = {self._map_name(name): self._publish_map(name, draft.map)}
        return True

    def _map_name(self, disk: str) -> str:
        return f"{self._revision}.{disk}{MAP_SUFFIX}"

    def _publish_map(self, disk: str, extent_map: ExtentMap) -> str:
        data = extent_map.encode(self._place.uuid)
        prepare(self._place.layout.revisions / self._map_name(disk), data, self._place.fs)
        self._map_bytes += len(data)
        return blake3(data).hexdigest()

    def _image(self, disk: str, extent_map: ExtentMap, map_name: str) -> PackImage:
        return PackImage(
            extent_map,
            self._library,
            self._place.quarantine,
            vm=self._place.name,
            revision=self._revision,
            disk=disk,
            map_name=map_name,
        )

    def image(self, name: str) -> PackImage:
        """The disk as stored."""
        return self._images[name]

    def written(self, name: str) -> list[Extent]:
        """What the disk stored anew."""
        return self._disks[name].written()

    def files(self, name: str) -> Mapping[str, str]:
        """The map's file name and hash."""
        return self._files[name]

    def close(self) -> None:
        """Give back descriptors; closing twice is harmless."""
        if not self._open:
            return
        self._open = False
        self._segments.close()
        with contextlib.suppress(OSError):
            for image in self._images.values():
                image.close()
        for parent in self._parents.values():
            parent.image.close()
        self._library.release()
