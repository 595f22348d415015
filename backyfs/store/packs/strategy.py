"""The Format of `packs`: opening, staging, damage and garbage."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from backyfs.errors import Corrupt, NoRevision
from backyfs.extents import merged
from backyfs.model import FRAME, Extent
from backyfs.store.format import GcReport, Place, Stage
from backyfs.store.fs import allocated, is_named
from backyfs.store.layout import owner
from backyfs.store.packs.extents import ExtentMap
from backyfs.store.packs.image import PackImage, gone, load_map, map_path
from backyfs.store.packs.library import Library
from backyfs.store.packs.reach import Reach
from backyfs.store.quarantine import Bad
from backyfs.store.record import DiskRecord, Record


class PacksFormat:
    """Format: see backyfs.store.format."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._library = Library(place.layout.packs)
        self._known = threading.local()

    def open(self, record: Record, disk: DiskRecord, *, check: bool = True) -> PackImage:
        """Open a disk; frames are always checked, whatever `check` says."""
        what = f"{self._place.name}/{record.id}/{disk.name}"
        try:
            path = map_path(self._place, disk.files)
            extent_map, fd = load_map(path, disk, what)
        except Corrupt as exc:
            if not is_named(self._place.layout.record(record.id)):
                raise gone(what) from exc
            raise Corrupt(
                exc.reason, vm=self._place.name, revision=record.id, disk=disk.name
            ) from exc
        try:
            if not is_named(self._place.layout.record(record.id)):
                raise gone(what)
            library = self._lasting()
        except BaseException:
            os.close(fd)
            raise
        return PackImage(
            extent_map,
            library,
            self._place.quarantine,
            vm=self._place.name,
            revision=record.id,
            disk=disk.name,
            digest=disk.digest,
            fd=fd,
            map_name=path.name,
        )

    def _lasting(self) -> Library:
        """The library for what is opened now: not the one that keeps removed files for others."""
        if self._library.outlived():
            self._library = Library(self._place.layout.packs)
        return self._library

    def stage(self, revision: str, parent: Record | None) -> Stage:
        """Start a revision on top of `parent`; all of a disk that cannot be opened is required."""
        # Most commands only read: writing is imported by those that write.
        from backyfs.store.packs.writer import PackStage, ParentDisk

        parents: dict[str, ParentDisk] = {}
        for disk in parent.disks.values() if parent else ():
            assert parent is not None
            with contextlib.suppress(Corrupt, NoRevision):
                image = self.open(parent, disk)
                parents[disk.name] = ParentDisk(image, disk.files, self._bad_frames(image))
        lost = parent.disks.keys() - parents.keys() if parent else ()
        return PackStage(self._place, self._library, revision, parents, lost)

    # Damage

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Keep pack files open between calls, and remember what was found in them."""
        with self._reaching():
            yield

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[Reach]:
        """What this thread knows of segments, in a `holding` of its own at least."""
        outer: Reach | None = getattr(self._known, "reach", None)
        if outer is not None:
            yield outer
            return
        library = self._library
        library.acquire()
        try:
            self._known.reach = Reach(library)
            yield self._known.reach
        finally:
            del self._known.reach
            library.release()

    def structure(self, disk: DiskRecord) -> Iterator[str]:
        """The map must be as recorded, and every segment it needs present with its root."""
        try:
            extent_map = self._map(disk)
        except (Corrupt, NoRevision) as exc:
            yield str(exc.args[0])
            return
        with self._reaching() as reach:
            broken = reach.broken(extent_map)
            yield from broken.values()
            for name in sorted(reach.lost_bases(extent_map) - broken.keys()):
                yield f"segment {name} is missing, which frames are patches against"

    def _map(self, disk: DiskRecord) -> ExtentMap:
        path = map_path(self._place, disk.files)
        extent_map, fd = load_map(path, disk, path.name)
        os.close(fd)
        return extent_map

    def flaws(self, disk: DiskRecord) -> Iterator[str]:
        """None: what its files say is said once."""
        return iter(())

    def bad_extents(self, disk: DiskRecord) -> list[Extent]:
        """Extents that reach a quarantined frame, by themselves or through a patch's base."""
        if not self._place.quarantine.bad():
            return []
        extent_map = self._map(disk)
        image = PackImage(
            extent_map, self._library, self._place.quarantine, vm="", revision="", disk=disk.name
        )
        try:
            frames = self._bad_frames(image)
        finally:
            image.close()
        return list(
            merged(Extent(frame * FRAME, min(FRAME, disk.size - frame * FRAME)) for frame in frames)
        )

    def _bad_frames(self, image: PackImage) -> dict[int, Bad | None]:
        """Frames that are, or rest on, what is in quarantine or missing, and where they lie."""
        with self._reaching() as reach:
            return dict(reach.bad_frames(image.map, self._place.quarantine.bad()))

    # Files

    def files(self, disk: DiskRecord) -> list[Path]:
        """The disk's map."""
        return [self._place.layout.revisions / name for name in disk.files]

    def lockable(self, disk: DiskRecord) -> Path | None:
        """Readers lock the map."""
        with contextlib.suppress(Corrupt):
            return map_path(self._place, disk.files)
        return None

    def discard(self, revision: str) -> None:
        """Remove the packs and maps of an unpublished revision."""
        for directory in (self._place.layout.packs, self._place.layout.revisions):
            for path in directory.iterdir():
                if owner(path.name) == revision:
                    self._place.fs.unlink(path)

    def gc(self, records: list[Record], *, dry_run: bool) -> GcReport:
        """One step; see packs.gc."""
        from backyfs.store.packs.gc import Collector

        collector = Collector(self._place, self._maps(records))
        try:
            return collector.step(dry_run=dry_run)
        finally:
            collector.close()

    def _maps(self, records: Iterable[Record]) -> Iterator[ExtentMap]:
        seen: set[Path] = set()
        for record in records:
            for disk in record.disks.values():
                path = map_path(self._place, disk.files)
                if path not in seen:
                    seen.add(path)
                    yield self._map(disk)

    def origins(self, records: Sequence[Record]) -> set[str]:
        """Of all segments that frames lie in or rest on, as far as they can be found."""
        pending: set[str] = set()
        for disk in (disk for record in records for disk in record.disks.values()):
            with contextlib.suppress(Corrupt, NoRevision):
                pending.update(ref.name for ref in self._map(disk).segments)
        seen: set[str] = set()
        with self.holding():
            while pending:
                name = pending.pop()
                seen.add(name)
                with contextlib.suppress(Corrupt):
                    pending |= self._library.segment(name).bases() - seen
        return set(map(owner, seen))

    def occupied(self, records: Sequence[Record]) -> int:
        """Blocks of all packs and maps; what gc has not freed yet is among them."""
        maps = {path for record in records for d in record.disks.values() for path in self.files(d)}
        with contextlib.suppress(FileNotFoundError):
            maps |= set(self._place.layout.packs.iterdir())
        return sum(map(allocated, maps))

    def exclusive(self, records: Sequence[Record]) -> Mapping[str, int]:
        """Frames (what gc would free at once or later) and maps that no other revision needs."""
        from backyfs.store.packs import occupancy

        naming: dict[Path, list[int]] = {}
        named: dict[Path, DiskRecord] = {}
        for number, record in enumerate(records[: occupancy.OWNERS_MAX], 1):
            for disk in record.disks.values():
                path = map_path(self._place, disk.files)
                naming.setdefault(path, []).append(number)
                named[path] = disk
        with self.holding():
            maps = ((numbers, self._map(named[path])) for path, numbers in naming.items())
            frames = occupancy.exclusive(self._library, maps)
        own = dict.fromkeys((record.id for record in records), 0)
        for number, size in frames.items():
            own[records[number - 1].id] += size
        for path, numbers in naming.items():
            if len(numbers) == 1:
                own[records[numbers[0] - 1].id] += path.stat().st_size
        return own

    def fsck(self, records: list[Record]) -> Iterator[str]:
        """See packs.fsck. Maps that cannot be read are reported by the structure check."""
        from backyfs.store.packs.fsck import check_packs

        maps: dict[Path, ExtentMap] = {}
        for disk in (disk for record in records for disk in record.disks.values()):
            with contextlib.suppress(Corrupt, NoRevision):
                path = map_path(self._place, disk.files)
                maps[path] = maps.get(path) or self._map(disk)
        with self.holding():
            yield from check_packs(self._place.layout.packs, maps.values())
