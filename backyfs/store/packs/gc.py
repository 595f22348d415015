"""Garbage collection of pack files: mark from all maps, unlink what is dead, merge what is small.

Bounds after gc: at most 64 + stored / 512 MiB files, and at most 30 % dead bytes. Safe at every
point: a merged pack is published before the packs it replaces are unlinked. One call is one step
(one merged pack at most), so that the caller can give the lock up in between.

Called only when every record and every map is readable (the repository fails closed).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from backyfs.errors import Corrupt, NoSpace
from backyfs.extents import merged
from backyfs.model import Extent
from backyfs.store import space
from backyfs.store.format import GcReport, Place
from backyfs.store.fs import allocated, is_medium_error, open_file
from backyfs.store.packs import codec
from backyfs.store.packs.extents import ExtentMap
from backyfs.store.packs.library import MERGED_PREFIX, PACK_SUFFIX
from backyfs.store.packs.packfile import PackFile, Segment
from backyfs.store.packs.rewrite import Rewriter
from backyfs.store.packs.segment import SEGMENT_BYTES_MAX
from backyfs.store.packs.table import NAMES_MAX
from backyfs.store.quarantine import WHOLE

log = logging.getLogger(__name__)

FILES_BASE = 64
FILE_BYTES = 512 << 20
DEAD_SHARE_MAX = 0.30
_DEAD_SHARE_GOAL = 0.15
ENTRIES_MAX = 1 << 20
"""Table entries of a merged pack, dead ones included, unless two packs alone have more: the table
is in memory while it is written (56 bytes each)."""
_BLOCK = 4096


@dataclass(slots=True)
class PackUse:
    """A pack file with what of it is needed. Bytes of stored frames, tables not counted."""

    pack: PackFile
    segments: list[Segment]
    live: int = 0
    stored: int = 0

    @property
    def dead(self) -> int:
        """Bytes of frames nothing needs."""
        return self.stored - self.live


Marks = dict[str, bytearray]


class Collector:
    """One step of garbage collection over the packs of a repository."""

    def __init__(self, place: Place, maps: Iterable[ExtentMap]) -> None:
        self._place = place
        self._packs, self._unreadable = _open_all(place.layout.packs)
        self._open = [use.pack for use in self._packs]
        self._homes: dict[str, Segment] = {}
        for use in self._packs:
            for segment in use.segments:
                # Two packs hold the same segment only after a crash in a merge. The library takes
                # the first by name: what it may be reading must not be the one we drop.
                self._homes.setdefault(segment.name, segment)
        try:
            self._marks = self._mark(maps)
            for use in self._packs:
                self._weigh(use)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all pack files."""
        for pack in self._open:
            pack.close()

    # Mark

    def _mark(self, maps: Iterable[ExtentMap]) -> Marks:
        marks: Marks = {}
        for extent_map in maps:
            for run in extent_map.runs:
                ref = extent_map.segments[run.segment]
                mark = marks.setdefault(ref.name, bytearray(ref.count))
                mark[run.number : run.number + run.span] = b"\1" * run.span
        self._mark_bases(marks)
        return marks

    def _mark_bases(self, marks: Marks) -> None:
        pending = set(marks)
        while pending:
            name = pending.pop()
            segment = self._homes.get(name)
            if segment is None:
                raise Corrupt(f"segment {name} is missing; nothing is deleted")
            for base, number in _bases(segment, marks[name]):
                home = self._homes.get(base)
                if home is None:
                    raise Corrupt(f"segment {base} is missing; nothing is deleted")
                mark = marks.setdefault(base, bytearray(home.count))
                if number < len(mark) and not mark[number]:
                    mark[number] = 1
                    pending.add(base)

    def _weigh(self, use: PackUse) -> None:
        for segment in use.segments:
            mark = self._marks.get(segment.name) if self._is_home(segment) else None
            for number, entry in enumerate(segment.all_entries()):
                size = segment.stored_bytes(entry)
                use.stored += size
                if mark is not None and mark[number]:
                    use.live += size

    def _is_home(self, segment: Segment) -> bool:
        return self._homes.get(segment.name) is segment

    def _is_live(self, segment: Segment, number: int) -> bool:
        mark = self._marks.get(segment.name)
        return mark is not None and bool(mark[number])

    def _live_segments(self, use: PackUse) -> list[Segment]:
        return [s for s in use.segments if self._is_home(s) and s.name in self._marks]

    # Plan

    def dead_packs(self) -> list[PackUse]:
        """Packs without a single live segment."""
        return [use for use in self._packs if not self._live_segments(use)]

    def merge_group(self) -> list[PackUse]:
        """The packs the next merge should take: small ones, or those with much dead.

        First of all those with a second copy of a segment, which a crash has left: it must be
        gone before the copy that counts moves to another file.
        """
        alive = [use for use in self._packs if self._live_segments(use)]
        doubled = [use for use in alive if not all(map(self._is_home, use.segments))]
        if doubled:
            return _within_limits(doubled)
        group = _within_limits(self._too_many(alive) or self._too_dead(alive))
        # One pack alone is worth rewriting only for what is dead in it.
        return group if len(group) > 1 or any(use.dead for use in group) else []

    def _too_many(self, alive: Sequence[PackUse]) -> list[PackUse]:
        stored = sum(use.stored for use in alive)
        limit = FILES_BASE + stored // FILE_BYTES
        if len(alive) <= limit:
            return []
        surplus = len(alive) - limit // 2 + 1
        return sorted(alive, key=lambda use: use.live)[:surplus]

    def _too_dead(self, alive: Sequence[PackUse]) -> list[PackUse]:
        stored, dead = sum(use.stored for use in alive), sum(use.dead for use in alive)
        if dead <= DEAD_SHARE_MAX * stored:
            return []
        chosen = []
        for use in sorted(alive, key=lambda use: use.dead / max(1, use.stored), reverse=True):
            if not use.dead or dead <= _DEAD_SHARE_GOAL * stored:
                break
            chosen.append(use)
            stored, dead = stored - use.dead, dead - use.dead
        return chosen

    # Act

    def step(self, *, dry_run: bool) -> GcReport:
        """Unlink dead packs, then merge one group; a dry run only says what it would do.

        Where there is no room for a merged pack, dead bytes are punched out instead.
        """
        gone = self.dead_packs()
        # Everything that is needed was found elsewhere, so what cannot be read is not needed.
        paths = [use.pack.path for use in gone] + self._unreadable
        freed = sum(map(allocated, self._unreadable)) + sum(use.pack.bytes for use in gone)
        if not dry_run:
            self._unlink(paths)
        self._packs = [use for use in self._packs if use not in gone]
        group = self.merge_group()
        if not self._has_room(group):
            group = []
            freed += self._punch(dry_run)
        before = sum(use.pack.bytes for use in group)
        if group and dry_run:
            freed += max(0, before - sum(use.live for use in group))
        elif group:
            try:
                freed += max(0, before - self._merge(group))
            except (NoSpace, Corrupt) as exc:
                # A quota, perhaps, that the file system does not show; or a frame that is needed
                # and cannot be read: the packs stay as they are.
                log.warning("packs are not merged", {"reason": exc.args[0]})
                group = []
                freed += self._punch(dry_run)
        if not dry_run:
            self._forget_quarantine()
        return GcReport(
            removed_files=len(paths),
            merged_files=len(group),
            written_files=1 if group else 0,
            freed_bytes=freed,
            dead_bytes=sum(use.dead for use in self._packs),
            stored_bytes=sum(use.pack.bytes for use in self._packs),
            files=len(self._packs),
            more=bool(group),
        )

    def _unlink(self, paths: Iterable[Path]) -> None:
        for path in paths:
            self._place.fs.unlink(path)

    def _has_room(self, group: Sequence[PackUse]) -> bool:
        """Whether the file system has its reserve beside what a merge of `group` would take."""
        directory = self._place.layout.packs
        need = sum(use.live + use.pack.bytes - use.stored for use in group)
        return space.free_bytes(directory) >= need + space.reserve_bytes(directory)

    def _merge(self, group: Sequence[PackUse]) -> int:
        """Write the group's live frames to one new pack; returns its size."""
        directory = self._place.layout.packs
        target = directory / f"{MERGED_PREFIX}{os.urandom(8).hex()}{PACK_SUFFIX}"
        segments = [segment for use in group for segment in self._live_segments(use)]
        Rewriter(self._place, target).write(segments, self._is_live, {})
        self._place.fs.sync_dir(directory)
        self._unlink(use.pack.path for use in group)
        self._packs = [use for use in self._packs if use not in group]
        merged = PackFile(target)
        self._open.append(merged)
        live = sum(use.live for use in group)
        self._packs.append(PackUse(merged, [], live, live))
        return merged.bytes

    def _punch(self, dry_run: bool) -> int:
        """Give the blocks of dead frames back in place; returns their bytes.

        No map reaches these bytes, so nobody loses them.
        """
        freed = 0
        for use in self._packs:
            ranges = list(self._dead_ranges(use)) if use.dead else []
            if dry_run:
                freed += sum(end - start for start, end in ranges)
            elif ranges:
                freed += self._punch_out(use.pack.path, ranges)
        return freed

    def _punch_out(self, path: Path, ranges: Iterable[tuple[int, int]]) -> int:
        fd = open_file(path, os.O_RDWR)
        try:
            before = os.fstat(fd).st_blocks
            for start, end in ranges:
                self._place.fs.punch(fd, start, end - start, path)
            self._place.fs.fsync(fd, path)
            return max(0, before - os.fstat(fd).st_blocks) * 512
        except OSError as exc:
            if exc.errno != errno.EOPNOTSUPP:
                raise
            return 0  # a file system without holes: this space has to wait for a merge
        finally:
            os.close(fd)

    def _dead_ranges(self, use: PackUse) -> Iterator[tuple[int, int]]:
        """Whole blocks of dead frames that no live frame claims, however damaged the table is.

        A second copy of a live segment stays: somebody may be reading it.
        """
        dead: list[Extent] = []
        live: list[Extent] = []
        for segment in use.segments:
            for number, entry in enumerate(segment.all_entries()):
                if size := segment.stored_bytes(entry):
                    found = live if self._is_live(segment, number) else dead
                    found.append(Extent(entry[0], size))
        for extent in merged(_without(dead, live)):
            low, high = -(-extent.offset // _BLOCK) * _BLOCK, extent.end // _BLOCK * _BLOCK
            if high > low:
                yield low, high

    def _forget_quarantine(self) -> None:
        """Drop records of frames that nothing needs any more."""
        for bad in self._place.quarantine.bad():
            mark = self._marks.get(bad.unit)
            whole = bad.number == WHOLE
            if mark is None or (not whole and (bad.number >= len(mark) or not mark[bad.number])):
                self._place.quarantine.clear(bad)


def _bases(segment: Segment, mark: bytearray) -> Iterator[tuple[str, int]]:
    for number, entry in enumerate(segment.all_entries()):
        if mark[number] and entry[2] == codec.PATCH:
            with contextlib.suppress(ValueError):  # a damaged entry: its frame is lost already
                yield segment.base_name(entry[5]), entry[7]


def _without(some: Iterable[Extent], others: Iterable[Extent]) -> Iterator[Extent]:
    """The bytes of `some` extents that are in none of the `others`, in pieces."""
    edges = [(e.offset, 1, 0) for e in some] + [(e.offset, 0, 1) for e in others]
    edges += [(e.end, -1, 0) for e in some] + [(e.end, 0, -1) for e in others]
    inside = outside = before = 0
    for at, enter, leave in sorted(edges):
        if inside and not outside and at > before:
            yield Extent(before, at - before)
        inside, outside, before = inside + enter, outside + leave, at


def _open_all(directory: Path) -> tuple[list[PackUse], list[Path]]:
    """The packs in the order the library looks for segments, and those that cannot be read."""
    uses: list[PackUse] = []
    unreadable: list[Path] = []
    try:
        for path in sorted(directory.glob(f"*{PACK_SUFFIX}")):
            try:
                pack = PackFile(path)
            except (Corrupt, OSError) as exc:
                if isinstance(exc, OSError) and not is_medium_error(exc):
                    raise
                unreadable.append(path)
                continue
            segments = [Segment(pack, descriptor) for descriptor in pack.footer.segments]
            uses.append(PackUse(pack, [s for s in segments if not s.cut_off]))
    except BaseException:
        for use in uses:
            use.pack.close()
        raise
    return uses, unreadable


def _within_limits(chosen: Sequence[PackUse]) -> list[PackUse]:
    """As many packs, from the first on, as fit into one merged file."""
    taken: list[PackUse] = []
    size = 0
    entries = 0
    names: set[str] = set()
    for use in chosen:
        more = names | set(use.pack.footer.names)
        entries += sum(segment.count for segment in use.segments)
        full = size + use.live > SEGMENT_BYTES_MAX or len(more) > NAMES_MAX
        if (taken and full) or (len(taken) > 1 and entries > ENTRIES_MAX):
            break
        taken.append(use)
        size, names = size + use.live, more
    return taken
