"""The directory of one VM: records, states, locks and order; the bytes are a Format's.

Invariants: a revision exists from the rename of its record to the unlink of its record; nothing a
readable record names is ever removed; only the holder of the writer's lock creates or removes
revisions; reading needs no lock but the one on the file that is read.

Safe from many threads, except that `Staging` belongs to one task.
"""

from __future__ import annotations

import contextlib
import logging
import time as clock
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from backyfs.errors import BackyfsError, Corrupt, NoRevision, Unsupported, UsageError
from backyfs.model import new_revision_id
from backyfs.store import lock, space
from backyfs.store.choice import choose_store
from backyfs.store.contract import StoredImage
from backyfs.store.format import Damage, Format, GcReport, Place
from backyfs.store.fs import SYSTEM, Fs, ReadOnly, is_named, publish_new, real_path
from backyfs.store.identity import COW, PACKS, Identity, lost_in, read_identity
from backyfs.store.layout import RECORD_SUFFIX, STATE_SUFFIX, TEMPORARY_SUFFIX, Layout, owner
from backyfs.store.ledger import Ledger
from backyfs.store.meter import Meter, Reading
from backyfs.store.quarantine import Quarantine
from backyfs.store.record import Record, State
from backyfs.store.removal import Removal, Remover
from backyfs.store.reports import Reports
from backyfs.store.staging import Staging

log = logging.getLogger(__name__)

STRAY_AGE_S = 24 * 3600.0
"""Unowned files younger than this are left alone: another host's rsync may be at work."""


def is_repository(path: Path) -> bool:
    """Whether `path` is the directory of one VM (it may still be unusable).

    OSError where that cannot be told: a dead network file system, no permission.
    """
    return Layout(path).identity.is_file()


def may_be_repository(path: Path) -> bool:
    """As `is_repository`, for lists: what cannot be looked into counts, and hides no other.

    So do revisions whose repository.json was lost: who lists VMs must hear of them.
    """
    try:
        return is_repository(path) or lost_in(path)
    except OSError:
        return path.name != "lost+found"  # which nobody but root may look into


# The formats are imported by need: most of what a command imports is the one it works with.


def _format(store: str, place: Place) -> Format:
    if store == PACKS:
        from backyfs.store.packs.strategy import PacksFormat

        return PacksFormat(place)
    from backyfs.store.cow.strategy import CowFormat

    return CowFormat(place)


def _prepare_directory(store: str, layout: Layout, fs: Fs) -> None:
    """Make what a format needs beside revisions/. UsageError where it cannot work."""
    if store == PACKS:
        fs.mkdir(layout.packs)
    else:
        from backyfs.store.cow.reflink import prepare_directory

        prepare_directory(layout, fs)


class Repository:
    """One VM's revisions. Open it with `Repository.open` or make it with `Repository.create`."""

    def __init__(self, path: Path, identity: Identity, fs: Fs = SYSTEM) -> None:
        self.layout = Layout(path)
        self.identity = identity
        self.fs = fs = fs if identity.writable else ReadOnly()
        self.quarantine = Quarantine(self.layout.quarantine, fs)
        self.reports = Reports(self.layout.reports, fs)
        self.place = Place(self.layout, identity.uuid, fs, self.quarantine)
        self.format = _format(identity.store, self.place)
        self.ledger = Ledger(self.layout, fs)
        self.meter = Meter(path)

    @classmethod
    def open(cls, path: Path, *, fs: Fs = SYSTEM) -> Repository:
        """The repository in `path`. NoRepository, Unsupported, Corrupt."""
        path = real_path(path)
        return cls(path, read_identity(Layout(path).identity), fs)

    @classmethod
    def create(cls, path: Path, store: str = "auto", *, fs: Fs = SYSTEM) -> Repository:
        """Make `path` (its parent must exist) a repository. UsageError when it is one already."""
        if is_repository(path):
            raise UsageError(
                f"{path} is a repository already", hint="choose another directory, or just back up"
            )
        existed = path.exists()
        fs.mkdir(path)
        path = real_path(path)
        chosen = choose_store(path, store)
        layout = Layout(path)
        identity = Identity.new(chosen)
        try:
            for directory in (layout.revisions, layout.quarantine):
                fs.mkdir(directory)
            _prepare_directory(chosen, layout, fs)
            if not publish_new(layout.identity, identity.encode(), fs):
                raise UsageError(f"{path} was made a repository by another process meanwhile")
            with contextlib.suppress(PermissionError):  # one may write there, and not read
                fs.sync_dir(path.parent)
        except BaseException:
            _take_back(layout, identity, itself=not existed)
            raise
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

    # Records and states: see Ledger

    def listing(self) -> tuple[list[Record], dict[str, BackyfsError]]:
        """`revisions` and `unreadable`, of one look: for all who rest on there being no others."""
        return self.ledger.listing()

    def revisions(self) -> list[Record]:
        """All readable revisions, oldest first (by seq)."""
        return self.ledger.revisions()

    def unreadable(self) -> dict[str, BackyfsError]:
        """Revisions whose record cannot be read, with the reason."""
        return self.ledger.unreadable()

    def record(self, revision: str) -> Record:
        """The record with this exact id. NoRevision, Corrupt, Unsupported."""
        return self.ledger.record(revision)

    def state(self, record: Record) -> State:
        """Tags and trust as they are now; where the state is damaged, a lasting distrust."""
        return self.ledger.state(record)

    def known_state(self, record: Record) -> State:
        """As `state`; Corrupt where the state is damaged."""
        return self.ledger.known_state(record)

    def state_problem(self, revision: str) -> str:
        """What is wrong with a revision's state file, or ""."""
        return self.ledger.state_problem(revision)

    def update_state(
        self, revision: str, change: Callable[[State], State], *, anew: bool = False
    ) -> State:
        """Replace a revision's state by `change(state)`, atomically; waits for no writer.

        Unsupported; Corrupt where the state is damaged, unless it may be made `anew`.
        """
        self._refuse_newer()
        return self.ledger.update_state(revision, change, anew=anew)

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
        """What keeps a revision's files from being read, found without reading their frames."""
        return [
            Damage(disk.name, None, reason)
            for disk in record.disks.values()
            for reason in self.format.structure(disk)
        ]

    def damage(self) -> dict[str, list[Damage]]:
        """Known damage per revision: unreadable records, broken structure, quarantined frames."""
        records, unreadable = self.listing()
        found = {i: [Damage("", None, e.args[0])] for i, e in unreadable.items()}
        with self.format.holding():
            for record in records:
                items = self.damage_of(record)
                if items:
                    found[record.id] = items
        return found

    def damage_of(self, record: Record) -> list[Damage]:
        """As `damage`, for one revision."""
        items = self.structure(record)
        broken = {item.disk for item in items}
        items += [
            Damage(disk.name, None, reason)
            for disk in record.disks.values()
            for reason in self.format.flaws(disk)
        ]
        if problem := self.state_problem(record.id):
            items.append(Damage("", None, problem))
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
        self._refuse_newer()
        path = self.layout.lock
        busy = f"{self.name} is busy: {lock.holder(path)} is writing to it"
        with lock.exclusive(path, wait_s, busy, hint=lock.WAIT) as fd:
            intent = lock.Intent(fd, path, self.fs)
            self._clean_up(intent)
            yield intent

    def _refuse_newer(self) -> None:
        if not self.identity.writable:
            raise Unsupported(
                f"{self.path} has a feature that allows this program to read only",
                hint="use a newer backyfs to write",
            )

    def _clean_up(self, intent: lock.Intent) -> None:
        unfinished = intent.read()
        with lock.meta(self.layout.meta_lock):
            if unfinished and not is_named(self.layout.record(unfinished)):
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
        if is_named(self.layout.record(revision)):
            raise UsageError(f"{self.name}: revision {revision} exists already")
        space.ensure(self.path, 0)
        intent.write(revision)
        stage = self.format.stage(revision, parent)
        return Staging(
            self.place,
            self.ledger,
            intent,
            stage,
            self.format.discard,
            revision=revision,
            time=time,
            parent=parent,
        )

    def remove(
        self,
        revisions: Iterable[str],
        *,
        force: bool = False,
        wait_s: float = 0.0,
        unless: Callable[[Record, State], bool] = lambda record, state: False,
    ) -> Removal:
        """Remove revisions; those with open readers stay unless `force`.

        `revisions` is asked for them when the writer's lock is held: nobody else makes or removes
        any then. `unless` is asked again under the state's lock: a tag set meanwhile protects.
        """
        with self.writing(wait_s):
            remover = Remover(self.layout, self.ledger, self.format, self.fs)
            for revision in revisions:
                remover.remove(revision, force, unless)
        if remover.done.removed:
            self.note_usage("remove")
        return remover.done

    def format_files(self, record: Record) -> list[Path]:
        """The files in revisions/ a record names."""
        return [path for disk in record.disks.values() for path in self.format.files(disk)]

    def origins(self) -> set[str]:
        """Ids of the revisions that stored what those that are there need; they may be gone."""
        return self.format.origins(self.revisions())

    def gc(self, *, dry_run: bool = False, wait_s: float = 0.0) -> GcReport:
        """Free what no revision needs. Corrupt, with nothing deleted, while anything is unreadable.

        The writer's lock is given up between steps, so that a backup need not wait for all.
        """
        total = GcReport()
        while True:
            with self.writing(wait_s):
                records = self._complete()
                step = self.format.gc(records, dry_run=dry_run)
                strays = [] if dry_run else self._remove_strays(records)
            total = _added(total, step, len(strays))
            if not step.more or dry_run:
                break
        if not dry_run:
            self.note_usage("gc")
        return total

    # Usage

    def occupied(self) -> int:
        """Bytes the stored data takes on the medium, what revisions share counted once."""
        return self.format.occupied(self.revisions())

    def exclusive(self) -> Mapping[str, int]:
        """By revision, the bytes that would be freed if it alone were removed. Corrupt."""
        return self.format.exclusive(self.revisions())

    def note_usage(
        self, event: str, made: Record | None = None, *, time: datetime | None = None
    ) -> None:
        """Read the meter: what is held from now on, and what the event (a backup) has moved.

        Never raises: what was done is done, whether or not it can be noted.
        """
        try:
            newest = next(reversed(self.revisions()), None)
            reading = Reading(
                time or datetime.now(UTC),
                event,
                stored=self._metered(made),
                logical=newest.size if newest else 0,
                read=made.stats.read if made else 0,
                written=made.stats.stored if made else 0,
                revision=made.id if made else "",
            )
        except (OSError, BackyfsError) as exc:
            log.warning("usage is not noted", {"event": event, "reason": str(exc)})
        else:
            self.meter.note(reading)

    def _metered(self, made: Record | None) -> int:
        """What is held now. In cow that is a look at all images: not for every backup."""
        last = self.meter.last() if made and self.store == COW else None
        return last.stored + made.stats.stored if last and made else self.occupied()

    def _complete(self) -> list[Record]:
        """All revisions; Corrupt while anything about one of them cannot be read."""
        records, unreadable = self.listing()
        for revision, error in unreadable.items():
            raise Corrupt(
                f"{error.args[0]}; nothing is deleted while a record is unreadable",
                vm=self.name,
                revision=revision,
            ) from error
        with self.format.holding():
            for record in records:
                self._refuse_incomplete(record)
        return records

    def _refuse_incomplete(self, record: Record) -> None:
        for damage in self.structure(record):
            raise Corrupt(
                f"{damage.reason}; nothing is deleted while a revision's files are incomplete"
                f" (forget -r {record.id} gives it up)",
                vm=self.name,
                revision=record.id,
                disk=damage.disk,
            )

    def _remove_strays(self, records: Sequence[Record]) -> list[Path]:
        """Remove what none of `records`, which are all there are, names."""
        named = {path for record in records for path in self.format_files(record)}
        ids = {record.id for record in records}
        strays = [
            path
            for path in self.layout.revisions.iterdir()
            if path not in named
            and path.suffix != RECORD_SUFFIX
            and owner(path.name)
            and not (path.suffix == STATE_SUFFIX and path.stem in ids)
            and _is_left(path)
        ]
        for path in strays:
            self.fs.unlink(path)
        return strays

    def fsck(self) -> list[str]:
        """Every violated invariant of the store, in words; [] is a sound store. Reads structure."""
        records, unreadable = self.listing()
        problems = [f"record {i}: {e.args[0]}" for i, e in unreadable.items()]
        seqs = [record.seq for record in records]
        if len(set(seqs)) != len(seqs):
            problems.append("two revisions have the same seq")
        with self.format.holding():
            for record in records:
                problems += [f"{record.id}/{d.disk}: {d.reason}" for d in self.structure(record)]
        return problems + list(self.format.fsck(records))


def _take_back(layout: Layout, identity: Identity, *, itself: bool) -> None:
    """Take back what there is of a repository that could not be made: nothing of another's."""
    with contextlib.suppress(OSError):
        if layout.identity.read_bytes() == identity.encode():
            layout.identity.unlink()
    if layout.identity.exists():
        return
    for directory in (layout.revisions, layout.quarantine, layout.packs, layout.path):
        if itself or directory != layout.path:
            with contextlib.suppress(OSError):
                directory.rmdir()


def _temporaries(layout: Layout) -> list[Path]:
    """Unfinished files nobody works on. Damage and configuration are written without our locks."""
    return [
        path
        for directory in (
            layout.revisions,
            layout.packs,
            layout.quarantine,
            layout.reports,
            layout.path,
        )
        if directory.is_dir()
        for path in directory.glob(f"*{TEMPORARY_SUFFIX}")
        if directory in (layout.revisions, layout.packs) or _is_left(path)
    ]


def _is_left(path: Path) -> bool:
    """Whether nobody works on a file any more; not so if it goes while we look."""
    try:
        return path.lstat().st_mtime < clock.time() - STRAY_AGE_S
    except FileNotFoundError:
        return False


def _added(total: GcReport, step: GcReport, strays: int) -> GcReport:
    return replace(
        step,
        removed_files=total.removed_files + step.removed_files + strays,
        merged_files=total.merged_files + step.merged_files,
        written_files=total.written_files + step.written_files,
        freed_bytes=total.freed_bytes + step.freed_bytes,
    )
