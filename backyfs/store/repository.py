"""The directory of one VM: records, states, locks and order; the bytes are a Format's.

Invariants: a revision exists from the rename of its record to the unlink of its record; nothing a
readable record names is ever removed; only the holder of the writer's lock creates or removes
revisions; reading needs no lock but the one on the file that is read.

Safe from many threads, except that `Staging` belongs to one task.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time as clock
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import UUID

from backyfs import __version__
from backyfs.errors import BackyfsError, Corrupt, NoRevision, Unsupported, UsageError
from backyfs.model import Extent, is_name, is_revision_id, new_revision_id
from backyfs.store import cow, lock, packs, space
from backyfs.store.contract import DiskWriter, StoredImage
from backyfs.store.format import Damage, Format, GcReport, Place, Stage
from backyfs.store.fs import SYSTEM, Fs, publish
from backyfs.store.identity import COW, PACKS, Identity, read_identity
from backyfs.store.layout import RECORD_SUFFIX, STATE_SUFFIX, TEMPORARY_SUFFIX, Layout, owner
from backyfs.store.quarantine import Quarantine
from backyfs.store.record import DiskRecord, Draft, Record, State

STRAY_AGE_S = 24 * 3600.0
"""Unowned files younger than this are left alone: another host's rsync may be at work."""


@dataclass(frozen=True, slots=True)
class Removal:
    """What `remove` did: ids that are gone, ids that stay because a reader has them open."""

    removed: list[str] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


def is_repository(path: Path) -> bool:
    """Whether `path` is the directory of one VM (it may still be unusable)."""
    return Layout(path).identity.is_file()


def choose_store(path: Path) -> str:
    """What `auto` means for a repository in directory `path`: cow on btrfs, packs elsewhere."""
    return COW if cow.is_btrfs(path) else PACKS


class Repository:
    """One VM's revisions. Open it with `Repository.open` or make it with `Repository.create`."""

    def __init__(self, path: Path, identity: Identity, fs: Fs = SYSTEM) -> None:
        self.layout = Layout(path)
        self.identity = identity
        self.fs = fs
        self.quarantine = Quarantine(self.layout.quarantine, fs)
        place = Place(self.layout, identity.uuid, fs, self.quarantine)
        self.format: Format = (
            packs.PacksFormat(place) if identity.store == PACKS else cow.CowFormat(place)
        )
        self._records: dict[str, tuple[tuple[int, int, int], Record | BackyfsError]] = {}
        self._scan = threading.Lock()

    @classmethod
    def open(cls, path: Path, *, fs: Fs = SYSTEM) -> Repository:
        """The repository in `path`. NoRepository, Unsupported, Corrupt."""
        path = path.resolve()
        return cls(path, read_identity(Layout(path).identity), fs)

    @classmethod
    def create(cls, path: Path, store: str = "auto", *, fs: Fs = SYSTEM) -> Repository:
        """Make `path` (its parent must exist) a repository. UsageError when it is one already."""
        if is_repository(path):
            raise UsageError(
                f"{path} is a repository already", hint="choose another directory, or just back up"
            )
        fs.mkdir(path)
        path = path.resolve()
        chosen = choose_store(path) if store == "auto" else store
        layout = Layout(path)
        for directory in (layout.revisions, layout.quarantine):
            fs.mkdir(directory)
        (packs if chosen == PACKS else cow).prepare_directory(layout, fs)
        identity = Identity.new(chosen)
        publish(layout.identity, identity.encode(), fs)
        return cls(path, identity, fs)

    @property
    def path(self) -> Path:
        """The directory, absolute."""
        return self.layout.path

    @property
    def name(self) -> str:
        """The VM's shown name: the directory's name."""
        return self.layout.path.name

    @property
    def uuid(self) -> UUID:
        """The identity of the repository; copies made by cp or rsync share it."""
        return self.identity.uuid

    @property
    def store(self) -> str:
        """Which format: packs or cow."""
        return self.identity.store

    # Records and states

    def revisions(self) -> list[Record]:
        """All readable revisions, oldest first (by seq)."""
        records = [r for r in self._read_records().values() if isinstance(r, Record)]
        return sorted(records, key=lambda record: (record.seq, record.id))

    def unreadable(self) -> dict[str, BackyfsError]:
        """Revisions whose record cannot be read, with the reason."""
        found = self._read_records()
        return {i: r for i, r in sorted(found.items()) if isinstance(r, BackyfsError)}

    def record(self, revision: str) -> Record:
        """The record with this exact id. NoRevision, Corrupt, Unsupported."""
        found = self._read_records().get(revision)
        if found is None:
            raise NoRevision(
                f"{self.name}: no revision {revision}", hint="see them with: backyfs status"
            )
        if isinstance(found, BackyfsError):
            raise found
        return found

    def next_seq(self) -> int:
        """The seq of a revision that is published now: above all others.

        Unreadable records count as if they were the newest: one may come back.
        """
        newest = max((record.seq for record in self.revisions()), default=0)
        return newest + len(self.unreadable()) + 1

    def _read_records(self) -> dict[str, Record | BackyfsError]:
        with self._scan:
            fresh: dict[str, tuple[tuple[int, int, int], Record | BackyfsError]] = {}
            for entry in self._record_files():
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
                    revision = entry.name.removesuffix(RECORD_SUFFIX)
                    known = self._records.get(revision)
                    same = known is not None and known[0] == stamp
                    fresh[revision] = (
                        known if known is not None and same else (stamp, self._decode(revision))
                    )
            self._records = fresh
            return {revision: item for revision, (_, item) in fresh.items()}

    def _record_files(self) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(self.layout.revisions) as entries:
                for entry in entries:
                    name = entry.name
                    if (
                        name.endswith(RECORD_SUFFIX)
                        and is_revision_id(name[:21])
                        and len(name) == 26
                    ):
                        yield entry
        except FileNotFoundError as exc:
            raise Corrupt(f"{self.name}: the directory revisions/ is missing") from exc

    def _decode(self, revision: str) -> Record | BackyfsError:
        path = self.layout.record(revision)
        what = f"{self.name}: the record of revision {revision}"
        try:
            record = Record.decode(path.read_bytes(), what)
        except (Corrupt, Unsupported) as exc:
            return exc
        except FileNotFoundError:
            raise
        except OSError as exc:
            return Corrupt(f"{what} cannot be read: {exc.strerror}")
        if record.id != revision or not _sound_names(record):
            return Corrupt(f"{what} names another revision or impossible files")
        return record

    def state(self, record: Record) -> State:
        """Tags and trust as they are now; a damaged state counts as none and is reported."""
        try:
            return State.decode(self.layout.state(record.id).read_bytes(), f"state of {record.id}")
        except (FileNotFoundError, Corrupt):
            return State.of(record)

    def update_state(self, revision: str, change: Callable[[State], State]) -> State:
        """Replace a revision's state by `change(state)`, atomically; waits for no writer."""
        with lock.meta(self.layout.meta_lock):
            if not self.layout.record(revision).exists():
                raise NoRevision(f"{self.name}: no revision {revision}")
            record = self.record(revision)
            old = self.state(record)
            new = change(old)
            if new != old:
                publish(self.layout.state(revision), new.encode(), self.fs)
            return new

    # Reading

    def open_disk(self, record: Record, disk: str, *, check: bool = True) -> StoredImage:
        """Open a disk of a revision; holds the reader's lock until closed. NoRevision, Corrupt."""
        try:
            found = record.disks[disk]
        except KeyError:
            names = ", ".join(record.disks)
            raise NoRevision(
                f"{self.name}/{record.id}: no disk {disk!r}", hint=f"its disks: {names}"
            ) from None
        return self.format.open(record, found, check=check)

    def structure(self, record: Record) -> list[Damage]:
        """What is wrong with a revision's files without reading their frames."""
        return [
            Damage(disk.name, None, reason)
            for disk in record.disks.values()
            for reason in self.format.structure(disk)
        ]

    def damage(self) -> dict[str, list[Damage]]:
        """Known damage per revision: unreadable records, broken structure, quarantined frames."""
        found = {i: [Damage("", None, e.args[0])] for i, e in self.unreadable().items()}
        for record in self.revisions():
            items = self.damage_of(record)
            if items:
                found[record.id] = items
        return found

    def damage_of(self, record: Record) -> list[Damage]:
        """As `damage`, for one revision."""
        items = self.structure(record)
        broken = {item.disk for item in items}
        for disk in record.disks.values():
            if disk.name not in broken:
                items += [
                    Damage(disk.name, extent, "frames in quarantine")
                    for extent in self.format.bad_extents(disk)
                ]
        return items

    # Writing

    @contextlib.contextmanager
    def writing(self, wait_s: float = 0.0) -> Iterator[lock.Intent]:
        """Hold the writer's lock; cleans up what a killed writer left. Busy, Unsupported."""
        if not self.identity.writable:
            raise Unsupported(
                f"{self.path} has a feature that allows this program to read only",
                hint="use a newer backyfs to write",
            )
        path = self.layout.lock
        busy = f"{self.name} is busy: {lock.holder(path)} is writing to it"
        with lock.exclusive(path, wait_s, busy) as fd:
            intent = lock.Intent(fd, path, self.fs)
            self._clean_up(intent)
            yield intent

    def _clean_up(self, intent: lock.Intent) -> None:
        unfinished = intent.read()
        with lock.meta(self.layout.meta_lock):
            if unfinished and not self.layout.record(unfinished).exists():
                self.fs.sync_dir(self.layout.revisions)  # a record taken back must stay away
                self.format.discard(unfinished)
            for path in _temporaries(self.layout):
                self.fs.unlink(path)
        if unfinished:
            intent.clear()

    def begin(
        self,
        intent: lock.Intent,
        parent: Record | None,
        *,
        revision: str | None = None,
        time: datetime | None = None,
    ) -> Staging:
        """Start a revision; `intent` is what `writing()` yielded. NoSpace when nearly full."""
        time = time or datetime.now(UTC)
        revision = revision or new_revision_id(time)
        if self.layout.record(revision).exists():
            raise UsageError(f"{self.name}: revision {revision} exists already")
        space.ensure(self.path, 0)
        intent.write(revision)
        stage = self.format.stage(revision, parent)
        return Staging(self, intent, stage, revision, time, parent)

    def remove(
        self,
        revisions: Iterable[str],
        *,
        force: bool = False,
        wait_s: float = 0.0,
        unless: Callable[[Record, State], bool] = lambda record, state: False,
    ) -> Removal:
        """Remove revisions; those with open readers stay unless `force`.

        `unless` is asked again under the state's lock: a tag set meanwhile protects.
        """
        result = Removal()
        with self.writing(wait_s):
            for revision in revisions:
                if not self.layout.record(revision).exists():
                    raise NoRevision(f"{self.name}: no revision {revision}")
                self._remove(revision, force, unless, result)
        return result

    def _remove(
        self,
        revision: str,
        force: bool,
        unless: Callable[[Record, State], bool],
        result: Removal,
    ) -> None:
        record = self._read_records().get(revision)
        owned = self.format_files(record) if isinstance(record, Record) else []
        if isinstance(record, Record) and not force and self._has_readers(record):
            result.in_use.append(revision)
            return
        with lock.meta(self.layout.meta_lock):
            if isinstance(record, Record) and unless(record, self.state(record)):
                result.kept.append(revision)
                return
            self.fs.unlink(self.layout.record(revision))
            self.fs.sync_dir(self.layout.revisions)
            self.fs.unlink(self.layout.state(revision))
        result.removed.append(revision)
        if not self.unreadable():
            still = {path for other in self.revisions() for path in self.format_files(other)}
            for path in owned:
                if path not in still:
                    self.fs.unlink(path)

    def _has_readers(self, record: Record) -> bool:
        return any(lock.has_readers(self.format.lockable(d)) for d in record.disks.values())

    def format_files(self, record: Record) -> list[Path]:
        """The files in revisions/ a record names."""
        return [path for disk in record.disks.values() for path in self.format.files(disk)]

    def gc(self, *, dry_run: bool = False, wait_s: float = 0.0) -> GcReport:
        """Free what no revision needs. Corrupt, with nothing deleted, while anything is unreadable.

        The writer's lock is given up between steps, so that a backup need not wait for all.
        """
        total = GcReport()
        while True:
            with self.writing(wait_s):
                self._fail_closed()
                step = self.format.gc(self.revisions(), dry_run=dry_run)
                strays = [] if dry_run else self._remove_strays()
            total = _added(total, step, len(strays))
            if not step.more or dry_run:
                return total

    def _fail_closed(self) -> None:
        for revision, error in self.unreadable().items():
            raise Corrupt(
                f"{error.args[0]}; nothing is deleted while a record is unreadable",
                vm=self.name,
                revision=revision,
            ) from error
        for record in self.revisions():
            for damage in self.structure(record):
                raise Corrupt(
                    f"{damage.reason}; nothing is deleted while a revision's files are incomplete"
                    f" (forget -r {record.id} gives it up)",
                    vm=self.name,
                    revision=record.id,
                    disk=damage.disk,
                )

    def _remove_strays(self) -> list[Path]:
        named = {path for record in self.revisions() for path in self.format_files(record)}
        ids = {record.id for record in self.revisions()}
        oldest = clock.time() - STRAY_AGE_S
        strays = [
            path
            for path in self.layout.revisions.iterdir()
            if path not in named
            and path.suffix != RECORD_SUFFIX
            and owner(path.name)
            and not (path.suffix == STATE_SUFFIX and path.stem in ids)
            and path.stat().st_mtime < oldest
        ]
        for path in strays:
            self.fs.unlink(path)
        return strays

    def fsck(self) -> list[str]:
        """Every violated invariant of the store, in words; [] is a sound store. Reads structure."""
        problems = [f"record {i}: {e.args[0]}" for i, e in self.unreadable().items()]
        records = self.revisions()
        seqs = [record.seq for record in records]
        if len(set(seqs)) != len(seqs):
            problems.append("two revisions have the same seq")
        for record in records:
            problems += [f"{record.id}/{d.disk}: {d.reason}" for d in self.structure(record)]
        return problems + list(self.format.fsck(records))


class Staging:
    """A revision in the making (RevisionWriter). Leaving it without `commit` removes its files."""

    def __init__(
        self,
        repository: Repository,
        intent: lock.Intent,
        stage: Stage,
        revision: str,
        time: datetime,
        parent: Record | None,
    ) -> None:
        self._repository = repository
        self._intent = intent
        self._stage = stage
        self._disks: dict[str, DiskWriter] = {}
        self._sealed = self._done = False
        self.revision = revision
        self.time = time.astimezone(UTC)
        self.parent = parent

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stage.close()
        if not self._done:
            with contextlib.suppress(OSError, BackyfsError):  # the next writer cleans up
                self._withdraw()

    def _withdraw(self) -> None:
        layout, fs = self._repository.layout, self._repository.fs
        if layout.record(self.revision).exists():
            # Named, but not durably so. First the record: it must never name files that are gone.
            fs.unlink(layout.record(self.revision))
            fs.sync_dir(layout.revisions)
        self._repository.format.discard(self.revision)
        self._intent.clear()

    @property
    def stored_bytes(self) -> int:
        """Bytes added to the store's files so far."""
        return self._stage.stored_bytes

    def disk(self, name: str, size: int) -> DiskWriter:
        """Start a disk; its parent is the disk of that name in the parent revision, if any."""
        writer = self._stage.disk(name, size)
        self._disks[name] = writer
        return writer

    def seal(self) -> None:
        """Make all data durable, not yet visible."""
        self._stage.seal()
        self._sealed = True

    def image(self, name: str) -> StoredImage:
        """The disk as stored, after `seal`; closed with the staging."""
        return self._stage.image(name)

    def written(self, name: str) -> list[Extent]:
        """Frame-aligned extents of a disk this revision stored anew, after `seal`."""
        return self._stage.written(name)

    def commit(self, draft: Draft) -> Record:
        """Publish the revision: from the moment this returns it exists, durably.

        When it raises nothing is published, unless the medium refuses even to take the record's
        name back: then the revision is there, complete.
        """
        if not self._sealed:
            self.seal()
        repository = self._repository
        record = self._record(draft)
        # The record's rename is the commit point; everything it names is durable already.
        publish(repository.layout.record(self.revision), record.encode(), repository.fs)
        self._done = True
        with contextlib.suppress(OSError, BackyfsError):
            self._intent.clear()  # if not, the next writer finds the record and does it
        return record

    def _record(self, draft: Draft) -> Record:
        disks = {
            name: self._disk_record(name, writer, draft) for name, writer in self._disks.items()
        }
        return Record(
            seq=self._repository.next_seq(),
            id=self.revision,
            time=self.time,
            parent=self.parent.id if self.parent else "",
            tool=draft.tool or f"backyfs {__version__}",
            consistency=draft.consistency,
            reason=draft.reason,
            tags=tuple(draft.tags),
            trust=draft.trust,
            verification=draft.verification,
            stats=replace(draft.stats, stored=self.stored_bytes),
            disks=disks,
        )

    def _disk_record(self, name: str, writer: DiskWriter, draft: Draft) -> DiskRecord:
        image = self._stage.image(name)
        return DiskRecord(
            name=name,
            size=writer.size,
            digest=image.digest,
            data=sum(extent.length for extent in image.extents()),
            files=self._stage.files(name),
            source=draft.sources.get(name, {}),
            partitions=draft.partitions.get(name, ()),
        )


def _sound_names(record: Record) -> bool:
    return all(
        is_name(name) and all(owner(file) and "/" not in file for file in disk.files)
        for name, disk in record.disks.items()
    )


def _temporaries(layout: Layout) -> list[Path]:
    """Unfinished files nobody works on. Damage and configuration are written without our locks."""
    oldest = clock.time() - STRAY_AGE_S
    return [
        path
        for directory in (layout.revisions, layout.packs, layout.quarantine, layout.path)
        if directory.is_dir()
        for path in directory.glob(f"*{TEMPORARY_SUFFIX}")
        if directory in (layout.revisions, layout.packs) or path.stat().st_mtime < oldest
    ]


def _added(total: GcReport, step: GcReport, strays: int) -> GcReport:
    return replace(
        step,
        removed_files=total.removed_files + step.removed_files + strays,
        merged_files=total.merged_files + step.merged_files,
        written_files=total.written_files + step.written_files,
        freed_bytes=total.freed_bytes + step.freed_bytes,
    )
