"""Writing one disk of a revision: what differs from the parent, and nothing else.

The clone is made at the first frame that differs: an unchanged disk makes no file. Frames are
compared by hash, 4 KiB blocks of a differing frame by their bytes. Damage never passes from the
parent unseen: its table is checked before anything is compared with it, and frames known to be
bad are `required()` from the source and heal the older images on their way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from backyfs.errors import Corrupt, NoSpace
from backyfs.extents import merged
from backyfs.model import FRAME, Extent
from backyfs.store import space
from backyfs.store.contract import Buffer
from backyfs.store.cow import damage
from backyfs.store.cow.blocks import different, frame_hashes, runs
from backyfs.store.cow.deferred import DeferredTarget
from backyfs.store.cow.fiemap import extent_count
from backyfs.store.cow.healing import Healer, mend_hashes
from backyfs.store.cow.image import CowImage
from backyfs.store.cow.table import (
    Head,
    checksum,
    group_frames,
    hash_at,
    level1_of,
    nonzero_frames,
)
from backyfs.store.cow.target import Target
from backyfs.store.digest import FAN_OUT, HASH, digest, frame_count, group_count
from backyfs.store.format import Place
from backyfs.store.fs import allocated, naming, read_exactly
from backyfs.store.quarantine import Bad
from backyfs.store.record import DiskRecord


class CowDiskWriter:
    """DiskWriter of one disk."""

    def __init__(
        self,
        place: Place,
        image: Path,
        table: Path,
        disk: str,
        size: int,
        parent: CowImage | None,
        *,
        lost: bool,
        extents_max: int,
        note: Callable[[str], None],
    ) -> None:
        """`lost`: there is a parent, but nothing can be taken from it."""
        self._place, self._image, self._table = place, image, table
        self._disk, self._size, self._parent = disk, size, parent
        self._lost, self._extents_max, self._note = lost, extents_max, note
        self._lock, self._healing = threading.Lock(), threading.Lock()
        self._target = DeferredTarget(self._make_target)
        self._changed: dict[int, int] = {}  # group -> bit mask of its frames
        self._unproven: set[int] = set()  # frames of the parent whose hash nothing confirms
        self._sick = self._check_table()  # frames not to be shared without a look
        self._healer = Healer(place, disk)
        self._sick |= self._healer.frames
        self._anew: set[int] = set()  # sick frames that were stored again
        self._record: DiskRecord | None = None
        if parent is None or parent.size != size or parent.table.problem or self._unproven:
            self._target.apply(lambda _: None)

    def _check_table(self) -> set[int]:
        """Bad frames of groups of the parent whose hashes fail level 1; they are recorded.

        Hashes that cannot be read are written anew, or the clone would share the bad block.
        """
        if self._parent is None:
            return set()
        found: set[int] = set()
        for group in self._parent.table.bad_groups():
            first, end = group_frames(group, self._parent.size)
            mend_hashes(self._place, self._parent, group)
            bad = self._parent.check(first, end - first)
            found.update(bad)
            if len(bad) == end - first:
                self._unproven.update(n for n in bad if n < frame_count(self._size))
        return found

    # Contract

    @property
    def size(self) -> int:
        return self._size

    @property
    def stored_bytes(self) -> int:
        """Bytes written so far."""
        return target.written if (target := self._target.made) else 0

    def required(self) -> list[Extent]:
        if self._lost:
            return [Extent(0, self._size)] if self._size else []
        frames = {n for n in self._sick if n < frame_count(self._size)}
        if self._parent is not None and self._parent.size != self._size:
            edge = min(self._parent.size, self._size) // FRAME
            frames |= {edge} if edge < frame_count(self._size) else set()
        return list(merged(self._extent(first, end) for first, end in runs(sorted(frames))))

    def _extent(self, first: int, end: int) -> Extent:
        return Extent(first * FRAME, min(end * FRAME, self._size) - first * FRAME)

    def write(self, offset: int, data: Buffer) -> int:
        data = bytes(data)  # no copy when it is bytes already
        first, end = self._frames(offset, len(data))
        hashes = frame_hashes(data)
        sick = self._treat(first, end, data)
        wrong = different(hashes, self._hashes(first, end - first))
        for start, stop in runs(sorted({*wrong, *sick})):
            self._store(
                first + start,
                data[start * FRAME : stop * FRAME],
                hashes[start * HASH : stop * HASH],
            )
        self._mark(first + number for number in wrong)
        return sum(self._extent(first + n, first + n + 1).length for n in wrong)

    def _store(self, first: int, data: bytes, hashes: bytes) -> None:
        self._target.apply(lambda target: target.store(first, data, hashes), len(data))

    def zero(self, offset: int, length: int) -> int:
        position, end = self._frames(offset, length)
        zeroed = 0
        for number in self._sick_within(position, end):
            zeroed += self._clear(position, number)
            extent = self._extent(number, number + 1)
            zeroed += self.write(extent.offset, bytes(extent.length))
            position = number + 1
        return zeroed + self._clear(position, end)

    def _clear(self, first: int, end: int) -> int:
        """Make frames zero that are not sick; the bytes of those that were not."""
        zeroed = 0
        for start, stop in nonzero_frames(self._table_fd(), first, end):
            self._punch(start, stop)
            self._mark(range(start, stop))
            zeroed += self._extent(start, stop).length
        return zeroed

    def _punch(self, first: int, end: int) -> None:
        self._target.apply(lambda target: target.zero(first, end))

    def _sick_within(self, first: int, end: int) -> list[int]:
        frames, sick = range(first, end), self._sick
        # Either may be millions. Both ways are one step to other threads, which may add to `_sick`.
        if len(frames) < len(sick):
            return sorted(sick.intersection(frames))
        return sorted(filter(frames.__contains__, tuple(sick)))

    def _frames(self, offset: int, length: int) -> tuple[int, int]:
        """The frames of a byte range; ValueError when these are not whole frames of the disk."""
        end = offset + length
        if offset % FRAME or offset < 0 or length < 0 or end > self._size:
            raise ValueError(f"[{offset}, +{length}) are no whole frames of {self._size} bytes")
        if end % FRAME and end != self._size:
            raise ValueError(f"[{offset}, +{length}) ends within a frame")
        return offset // FRAME, frame_count(end)

    # The clone

    def _make_target(self) -> Target:
        target = Target(self._place.fs, self._image, self._table, self._size)
        try:
            if self._parent is None:
                target.start_empty()
            elif self._fragmented(self._parent):
                for number in target.start_copy(self._parent, self._unproven_groups()):
                    self._sick.add(number)
                    self._parent.check(number, 1)  # records it
            else:
                target.start_clone(self._parent, self._unproven_groups())
        except BaseException:
            target.close()
            raise
        return target

    def _unproven_groups(self) -> set[int]:
        return {number // FAN_OUT for number in self._unproven}

    def _fragmented(self, parent: CowImage) -> bool:
        extents = extent_count(parent.fd)
        # A fresh file that had as many (a compressing file system) would not gain by another.
        if extents <= max(self._extents_max, 2 * parent.table.head.fresh_extents):
            return False
        try:
            space.ensure(self._image.parent, allocated(parent.files.image))
        except NoSpace as exc:  # a clone is slow, no backup is worse
            self._note(f"disk {self._disk}: the parent has {extents} extents, no fresh file: {exc}")
            return False
        self._note(f"disk {self._disk}: written as a fresh file, the parent has {extents} extents")
        return True

    def _hashes(self, first: int, count: int) -> bytes:
        old = None if self._target.made else self._parent
        with naming(old.files.table if old else self._table):
            return read_exactly(self._table_fd(), count * HASH, hash_at(first))

    def _table_fd(self) -> int:
        """The table that says what frames nobody wrote yet hold: the parent's as well as ours."""
        if target := self._target.made:
            return target.table_fd
        assert self._parent is not None  # without a parent there is a target from the start
        return self._parent.table.fd

    def _mark(self, numbers: Iterable[int]) -> None:
        with self._lock:
            for number in numbers:
                group, bit = divmod(number, FAN_OUT)
                self._changed[group] = self._changed.get(group, 0) | 1 << bit

    def _was_stored(self, number: int) -> bool:
        group, bit = divmod(number, FAN_OUT)
        return bool(self._changed.get(group, 0) >> bit & 1)

    # Damage

    def _treat(self, first: int, end: int, data: bytes) -> list[int]:
        """Heal with frames of `data` what is recorded; which to store though they seem equal."""
        again = []
        for number in self._sick_within(first, end):
            at = (number - first) * FRAME
            with self._healing:
                self._healer.heal(number, data[at : at + FRAME])
                if not self._parent_is_sound(number):
                    self._anew.add(number)
                    again.append(number - first)
        return again

    def _parent_is_sound(self, number: int) -> bool:
        """Whether no clone was begun yet and the parent's frame reads well."""
        parent = self._parent
        if parent is None or self._target.begun or number >= frame_count(parent.size):
            return False
        return parent.check(number, 1) == []

    def _pass_on_records(self) -> None:
        """Record frames the clone shares with the parent and nobody stored again."""
        if self._parent is None:
            return
        for number in sorted(damage.frames_of(self._place, self._parent.unit) - self._anew):
            if 0 <= number < frame_count(self._size) and not self._was_stored(number):
                reason, offset = f"as in {self._parent.unit}", number * FRAME
                bad = Bad(self._image.name.removesuffix(".img"), number)
                self._place.quarantine.add(bad, reason, disk=self._disk, offset=offset)

    # The end

    def seal(self) -> bool:
        """Finish; whether files were made (their directory is to be synced)."""
        target = self._target.made
        if self._unproven - self._anew and target is not None:
            raise Corrupt(
                "frames whose hashes were damaged in the parent were not stored again",
                vm=self._place.name,
                disk=self._disk,
            )
        if target is None:
            assert self._parent is not None
            self._record = self._parent.disk
            return False
        self._record = self._publish(target)
        target.close()
        self._pass_on_records()
        return True

    def _publish(self, target: Target) -> DiskRecord:
        parent, size = self._parent, self._size
        level1 = bytearray(group_count(size) * HASH)
        groups = self._unproven_groups() | set(self._changed)
        resized = parent is None or parent.size != size
        if parent is not None:
            common = min(len(level1), len(parent.groups()))
            level1[:common] = parent.groups()[:common]
            if resized and common:
                groups.add(common // HASH - 1)
        for group in groups:
            level1[group * HASH : (group + 1) * HASH] = level1_of(target.table_fd, size, group)
        extents = parent.table.head.fresh_extents if parent else 0
        anew = resized or (parent is not None and parent.table.problem)
        head = target.finish(
            Head(self._place.uuid, size, extents), bytes(level1), None if anew else groups
        )
        files = {self._image.name: "", self._table.name: checksum(head.encode(), bytes(level1))}
        return DiskRecord(
            self._disk, size, digest(size, bytes(level1)), files, data=self._data(target)
        )

    def _data(self, target: Target) -> int:
        """Bytes of frames that are not zero, as the table has them: an image is slow to ask."""
        frames = nonzero_frames(target.table_fd, 0, frame_count(self._size))
        return sum(self._extent(first, end).length for first, end in frames)

    def sealed(self) -> DiskRecord:
        """Size, digest and files of the disk, after seal."""
        assert self._record is not None
        return self._record

    def written(self) -> list[Extent]:
        """Frames that were stored, after seal."""
        numbers = (
            group * FAN_OUT + bit
            for group, mask in sorted(self._changed.items())
            for bit in range(FAN_OUT)
            if mask >> bit & 1
        )
        return [self._extent(first, end) for first, end in runs(numbers)]

    def close(self) -> None:
        """Give back descriptors and locks."""
        self._healer.close()
        self._target.close()
