"""The catalog: which VMs a base directory holds and which revisions they have, as frozen views.

The base directory is either one VM's directory or a directory of many. Nothing is read before it
is asked for: the names of VMs cost two stats each, the revisions of a VM their records, and no map
or pack file is ever opened. What was read stays valid until its directory's time stamps change;
they are looked at again when the last look is older than `refresh_s`.

Invariants: a view never changes; a name outside the grammar of model.py is never shown; a record
that cannot be read is logged once and left out; the number of records kept is bounded.

Safe from many threads. With `wait=False` no call does input or output: it answers from what is at
hand, or raises BlockingIOError when the caller should ask again from a thread that may block.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

from backyfs.errors import BackyfsError, Corrupt, NoRepository
from backyfs.model import is_name, vm_name
from backyfs.store.format import Damage
from backyfs.store.fs import is_medium_error
from backyfs.store.layout import RECORD_SUFFIX, STATE_SUFFIX, Layout
from backyfs.store.record import Record, State
from backyfs.store.repository import Repository, is_repository, may_be_repository

log = logging.getLogger(__name__)

REFRESH_S = 0.5
_LISTING_S = 2.0
"""A look at all VMs that takes longer hangs in the file system of one."""
REVISIONS_MAX = 16384
"""Records kept in memory, all VMs together (about 3 KiB each); the VM asked for always fits."""

_SETTLED_NS = 2_000_000_000
"""A directory changed less than this ago may change again without a new time stamp (NFS)."""

_serial = itertools.count(1)
_GONE = (FileNotFoundError, NotADirectoryError)


@dataclass(frozen=True, slots=True)
class Revision:
    """A readable revision: its record, and its state as it was when the directory was read.

    `time_ns` is the record's time (Unix time), `record_bytes` the size of its file, `state_ns` when
    the state was last set (Unix time; 0 = never).
    """

    record: Record
    state: State
    time_ns: int
    record_bytes: int
    state_ns: int


@dataclass(frozen=True, slots=True)
class Vm:
    """One VM as it was when its directory was read.

    `revisions` are the readable ones by id, oldest first; `changed_ns` is when one last came, went
    or got another state (Unix time); `quarantine_ns` when a frame of the VM was last found damaged
    or healed (0 = no frame is known to be damaged). A later view has a higher `serial`.
    """

    serial: int
    name: str
    repository: Repository
    revisions: MappingProxyType[str, Revision]
    changed_ns: int
    quarantine_ns: int
    _damage: dict[str, tuple[Damage, ...]] = field(default_factory=dict, compare=False, repr=False)
    _tagged: list[Mapping[str, tuple[Revision, ...]]] = field(
        default_factory=list, compare=False, repr=False
    )

    @property
    def latest(self) -> Revision | None:
        """The revision that was published last; None without a readable one."""
        newest = next(reversed(self.revisions), None)
        return None if newest is None else self.revisions[newest]

    @property
    def tagged(self) -> Mapping[str, tuple[Revision, ...]]:
        """By tag, sorted: the revisions that have it, oldest first; computed when first asked."""
        if not self._tagged:
            found: dict[str, list[Revision]] = {}
            for revision in self.revisions.values():
                for tag in revision.state.tags:
                    found.setdefault(tag, []).append(revision)
            # In one step: another thread sees all of it or computes the same.
            self._tagged.append({tag: tuple(found[tag]) for tag in sorted(found)})
        return self._tagged[0]

    def damage(self, record: Record, *, wait: bool = True) -> tuple[Damage, ...]:
        """What is known to be damaged in a revision; computed when first asked for."""
        if not self.quarantine_ns:
            return ()
        known = self._damage.get(record.id)
        if known is None:
            if not wait:
                raise BlockingIOError
            known = self._damage[record.id] = tuple(self.repository.damage_of(record))
        return known


@dataclass(frozen=True, slots=True)
class _Stamp:
    """Time stamps that change whenever a VM's records, states or known damage do.

    `identity` changes when another repository takes the place of this one. `names` is of those in
    the two directories: some file systems (rclone, S3) never change a directory's time.
    """

    identity: tuple[int, int]
    revisions_ns: int
    quarantine_ns: int
    names: int

    @property
    def settled(self) -> bool:
        newest = max(self.revisions_ns, self.quarantine_ns)
        return newest + _SETTLED_NS < time.time_ns()


class _Entry:
    """What the catalog remembers of one VM. `scanning` is held by the thread that reads it."""

    def __init__(self) -> None:
        self.scanning = threading.Lock()
        self.view: Vm | None = None
        self.stamp: _Stamp | None = None
        self.checked = float("-inf")
        self.unreadable: dict[str, str] = {}


class Catalog:
    """The VMs and revisions below `base`. NoRepository when there is no such directory."""

    def __init__(
        self,
        base: Path,
        *,
        refresh_s: float = REFRESH_S,
        revisions_max: int = REVISIONS_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not base.is_dir():
            raise NoRepository(
                f"no directory {base}", hint="name the base directory, or one VM's, with -b DIR"
            )
        self.base = base.resolve()
        self._identity = _identity(os.stat(self.base))
        self._single = vm_name(self.base.name) if is_repository(self.base) else ""
        self._refresh_s, self._revisions_max, self._clock = refresh_s, revisions_max, clock
        self._lock = threading.Lock()
        self._listing = threading.Lock()
        self._names: Mapping[str, int] = MappingProxyType({})
        self._listed, self._looking_since = float("-inf"), float("inf")
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    # The VMs

    @property
    def only(self) -> str:
        """The VM's name where `base` is one VM's directory, else ""."""
        return self._single

    def names(self, *, wait: bool = True) -> Mapping[str, int]:
        """Every VM's name, sorted, with the time its revisions last changed (Unix time, ns).

        As they were before, where somebody has been looking at them for seconds: one VM's file
        system does not answer, and all others shall be found.
        """
        if self._names_fresh() or self._listing_hangs():
            return self._names
        if not wait:
            raise BlockingIOError
        while not self._listing.acquire(timeout=_LISTING_S):
            if self._listing_hangs():
                return self._names
        try:
            if not self._names_fresh():
                self._looking_since = started = self._clock()
                self._names = MappingProxyType(dict(sorted(self._list())))
                self._listed = started
        finally:
            self._looking_since = float("inf")
            self._listing.release()
        return self._names

    def _listing_hangs(self) -> bool:
        """Whether somebody else waits for a file system; not before there was a list."""
        hangs = self._clock() - self._looking_since > _LISTING_S
        return hangs and self._listed > float("-inf")

    def _names_fresh(self) -> bool:
        return self._clock() - self._listed < self._refresh_s

    def changed_ns(self, name: str, *, wait: bool = True) -> int:
        """As in `names`, for one VM, without a look at the others. NoRepository."""
        if self._names_fresh():
            if name not in self._names:
                raise NoRepository(f"{self.base}: no VM {name!r}")
            return self._names[name]
        directory = self._directory(name)
        if not wait:
            raise BlockingIOError
        if not may_be_repository(directory):
            self._require_base()
            raise NoRepository(f"{self.base}: no VM {name!r}")
        return _changed_ns(directory)

    def _list(self) -> list[tuple[str, int]]:
        if self._single:
            return [(self._single, _changed_ns(self.base))]
        identity, names = _listed(self.base)
        found = []
        for name in filter(is_name, names):
            directory = self.base / name
            if may_be_repository(directory):
                found.append((name, _changed_ns(directory)))
        if not found and identity != self._identity:
            raise OSError(
                errno.EIO,
                "empty, and not the directory it was: is its file system mounted?",
                str(self.base),
            )
        self._identity = identity
        return found

    def _require_base(self) -> None:
        """OSError where all is gone, not just one VM: the base, or the file system it lay on."""
        if _identity(os.stat(self.base)) != self._identity:
            self._list()

    def _directory(self, name: str) -> Path:
        if self._single:
            if name == self._single:
                return self.base
        elif is_name(name):
            return self.base / name
        raise NoRepository(f"{self.base}: no VM {name!r}")

    # The revisions of a VM

    def vm(self, name: str, *, wait: bool = True, any_age: bool = False) -> Vm:
        """A VM's revisions, at most `refresh_s` old (any_age: as old as they may be at hand).

        Raises NoRepository when there is no such VM; Unsupported or Corrupt when it cannot be
        read as a whole.
        """
        entry = self._entry(name)
        view = entry.view
        if view is not None and (any_age or self._fresh(entry)):
            return view
        if not wait:
            raise BlockingIOError
        with entry.scanning:
            view = entry.view
            if view is None or not self._fresh(entry):
                view = self._refreshed(name, entry)
        return view

    def _fresh(self, entry: _Entry) -> bool:
        return self._clock() - entry.checked < self._refresh_s

    def _entry(self, name: str) -> _Entry:
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                self._directory(name)  # refuses what can be no VM
                entry = self._entries[name] = _Entry()
            else:
                self._entries.move_to_end(name)
            return entry

    def _refreshed(self, name: str, entry: _Entry) -> Vm:
        started = self._clock()
        directory = self._directory(name)
        try:
            stamp = _stamp(directory)
            view = entry.view
            if view is None or stamp != entry.stamp or not stamp.settled or entry.unreadable:
                view = self._read(name, directory, entry, stamp)
        except _GONE as exc:
            self._forget(name)
            if is_repository(directory):  # half copied, half removed: not what `gone` means
                raise Corrupt(f"{name}: the directory revisions/ is missing") from exc
            if may_be_repository(directory):
                raise Corrupt(f"{name} has revisions, but no repository.json") from exc
            self._require_base()
            raise NoRepository(f"{self.base}: no VM {name!r}") from exc
        except BackyfsError:
            self._forget(name)
            raise
        new = view is not entry.view
        entry.view, entry.stamp, entry.checked = view, stamp, started
        if new:
            self._bound(name)
        return view

    def _read(self, name: str, directory: Path, entry: _Entry, stamp: _Stamp) -> Vm:
        repository = _known(entry, stamp) or Repository.open(directory)
        revisions, skipped = _revisions(repository)
        _report(name, entry, repository if skipped else None)
        bad = bool(repository.quarantine.bad())
        return Vm(
            next(_serial),
            name,
            repository,
            MappingProxyType(revisions),
            stamp.revisions_ns,
            stamp.quarantine_ns if bad else 0,
        )

    def _forget(self, name: str) -> None:
        with self._lock:
            self._entries.pop(name, None)

    def _bound(self, keep: str) -> None:
        """Drop the VMs not asked for longest, until few enough records are kept."""
        with self._lock:
            kept = sum(len(e.view.revisions) for e in self._entries.values() if e.view)
            for name, entry in list(self._entries.items()):
                if kept <= self._revisions_max:
                    return
                if name != keep and entry.view is not None:
                    kept -= len(entry.view.revisions)
                    del self._entries[name]


def _known(entry: _Entry, stamp: _Stamp) -> Repository | None:
    """The repository as opened before, unless another one took its place."""
    if entry.view is None or entry.stamp is None or entry.stamp.identity != stamp.identity:
        return None
    return entry.view.repository


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _listed(directory: Path) -> tuple[tuple[int, int], list[str]]:
    """Which directory it is at this moment, and the names in that one."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return _identity(os.fstat(fd)), os.listdir(fd)
    finally:
        os.close(fd)


def _changed_ns(directory: Path) -> int:
    try:
        return os.stat(Layout(directory).revisions).st_mtime_ns
    except OSError:
        return 0


def _stamp(directory: Path) -> _Stamp:
    layout = Layout(directory)
    identity = os.stat(layout.identity)
    revisions_ns = os.stat(layout.revisions).st_mtime_ns
    names = os.listdir(layout.revisions)
    try:
        quarantine_ns = os.stat(layout.quarantine).st_mtime_ns
        names += os.listdir(layout.quarantine)
    except FileNotFoundError:
        quarantine_ns = 0
    found = (identity.st_ino, identity.st_mtime_ns)
    return _Stamp(found, revisions_ns, quarantine_ns, hash(frozenset(names)))


def _status(entry: os.DirEntry[str]) -> tuple[int, int]:
    """When a file was changed, and its size. FileNotFoundError: it was removed.

    Zeros where its inode is damaged: the ledger says more of that.
    """
    try:
        status = entry.stat()
    except OSError as exc:
        if not is_medium_error(exc):
            raise
        return 0, 0
    return status.st_mtime_ns, status.st_size


def _revisions(repository: Repository) -> tuple[dict[str, Revision], bool]:
    """The readable revisions by id, oldest first; and whether there are record files beside."""
    sizes: dict[str, int] = {}
    states: dict[str, int] = {}
    with os.scandir(repository.layout.revisions) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.name.endswith(STATE_SUFFIX):
                    states[entry.name.removesuffix(STATE_SUFFIX)] = _status(entry)[0]
                elif entry.name.endswith(RECORD_SUFFIX):
                    sizes[entry.name.removesuffix(RECORD_SUFFIX)] = _status(entry)[1]
    found = {
        record.id: Revision(
            record,
            repository.state(record) if record.id in states else State.of(record),
            _nanoseconds(record.time),
            sizes[record.id],
            states.get(record.id, 0),
        )
        for record in repository.revisions()
        if record.id in sizes  # else it was published just now: the next look shows it
    }
    return found, len(found) < len(sizes)


def _nanoseconds(time: datetime) -> int:
    seconds = int(time.replace(microsecond=0).timestamp())
    return seconds * 1_000_000_000 + time.microsecond * 1000


def _report(name: str, entry: _Entry, repository: Repository | None) -> None:
    found = repository.unreadable() if repository is not None else {}
    unreadable = {revision: error.message for revision, error in found.items()}
    for revision, message in unreadable.items():
        if entry.unreadable.get(revision) != message:
            log.warning("a revision is left out", {"vm": name, "id": revision, "why": message})
    entry.unreadable = unreadable
