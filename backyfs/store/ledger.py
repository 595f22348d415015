"""The ledger of a repository: its records and states, as they lie in revisions/.

Records are immutable, so each file is read once; a directory scan notices new and removed ones. A
state is read whenever it is asked for. Safe from many threads and beside any writer.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from backyfs.errors import BackyfsError, Corrupt, NoRevision, Unsupported
from backyfs.model import Trust, is_name, is_revision_id
from backyfs.store import lock
from backyfs.store.fs import Fs, is_medium_error, is_named, publish, read_file
from backyfs.store.layout import RECORD_SUFFIX, STATE_SUFFIX, Layout, owner
from backyfs.store.record import Record, State

_Stamp = tuple[int, int, int]
_NEVER: _Stamp = (0, 0, 0)
_OURS = (RECORD_SUFFIX, STATE_SUFFIX)


class Ledger:
    """Reads records and states, replaces states. `name` is the VM's, for messages."""

    def __init__(self, layout: Layout, fs: Fs) -> None:
        self._layout, self._fs = layout, fs
        self.name = layout.path.name
        self._records: dict[str, tuple[_Stamp, Record | BackyfsError]] = {}
        self._scan = threading.Lock()

    def listing(self) -> tuple[list[Record], dict[str, BackyfsError]]:
        """The readable revisions, oldest first (by seq), and why the others cannot be read.

        Of one look: an error may pass, and a second look would miss what the first one left out.
        """
        found = sorted(self.entries().items())
        records = [item for _, item in found if isinstance(item, Record)]
        unreadable = {i: item for i, item in found if isinstance(item, BackyfsError)}
        return sorted(records, key=lambda record: (record.seq, record.id)), unreadable

    def revisions(self) -> list[Record]:
        """All readable revisions, oldest first (by seq)."""
        return self.listing()[0]

    def unreadable(self) -> dict[str, BackyfsError]:
        """Revisions whose record cannot be read, with the reason."""
        return self.listing()[1]

    def record(self, revision: str) -> Record:
        """The record with this exact id. NoRevision, Corrupt, Unsupported.

        Looks at this one alone: who changes many asks for each of them.
        """
        found = self._one(revision) or self.entries().get(revision)
        if found is None:
            raise NoRevision(
                f"{self.name}: no revision {revision}", hint="see them with: backyfs status"
            )
        if isinstance(found, BackyfsError):
            raise found
        return found

    def _one(self, revision: str) -> Record | BackyfsError | None:
        if not is_revision_id(revision):
            return None
        with self._scan, contextlib.suppress(FileNotFoundError):
            looked_up = self._looked_up(revision, self._layout.record(revision))
            self._records[revision] = looked_up
            return looked_up[1]
        return None

    def next_seq(self) -> int:
        """The seq of a revision that is published now: above all others.

        Unreadable records count as if they were the newest: one may come back.
        """
        records, unreadable = self.listing()
        newest = max((record.seq for record in records), default=0)
        return newest + len(unreadable) + 1

    def entries(self) -> dict[str, Record | BackyfsError]:
        """By id: each record, or why it cannot be read."""
        with self._scan:
            fresh: dict[str, tuple[_Stamp, Record | BackyfsError]] = {}
            for entry in self._files():
                with contextlib.suppress(FileNotFoundError):
                    revision = entry.name.removesuffix(RECORD_SUFFIX)
                    fresh[revision] = self._looked_up(revision, entry)
            self._records = fresh
            return {revision: item for revision, (_, item) in fresh.items()}

    def _files(self) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(self._layout.revisions) as entries:
                for entry in entries:
                    revision = entry.name.removesuffix(RECORD_SUFFIX)
                    if entry.name != revision and is_revision_id(revision):
                        yield entry
        except FileNotFoundError as exc:
            raise Corrupt(f"{self.name}: the directory revisions/ is missing") from exc

    def _looked_up(
        self, revision: str, entry: os.DirEntry[str] | Path
    ) -> tuple[_Stamp, Record | BackyfsError]:
        try:
            status = entry.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            known = self._records.get(revision)
            if known is not None and known[0] == stamp:
                return known
            return stamp, self._decode(revision)
        except OSError as exc:
            if isinstance(exc, FileNotFoundError) and not entry.is_symlink():
                raise  # removed meanwhile
            what = f"{self.name}: the record of revision {revision}"
            # Not remembered: the next attempt may well succeed.
            return _NEVER, Corrupt(f"{what} cannot be read: {exc.strerror}")

    def _decode(self, revision: str) -> Record | BackyfsError:
        path = self._layout.record(revision)
        what = f"{self.name}: the record of revision {revision}"
        try:
            record = Record.decode(read_file(path), what)
        except (Corrupt, Unsupported) as exc:
            return exc
        if record.id != revision or not _sound_names(record):
            return Corrupt(f"{what} names another revision or impossible files")
        return record

    def state(self, record: Record) -> State:
        """Tags and trust as they are now.

        Where the state cannot be read, the record's own tags and a lasting distrust: the revision
        may have been distrusted, and no look at stored bytes would tell.
        """
        try:
            return self.known_state(record)
        except (Corrupt, Unsupported) as exc:
            own = State.of(record)
            return State(own.tags, Trust.DISTRUSTED, why=_reason(exc), lasting=True)

    def known_state(self, record: Record) -> State:
        """As `state`; Corrupt where the state is damaged, Unsupported where it is a newer one."""
        try:
            return self._read_state(record.id) or State.of(record)
        except Corrupt as exc:
            way_out = f"backyfs distrust -r {record.id} (and then perhaps distrust --lift)"
            raise Corrupt(exc.reason, vm=self.name, hint=f"run: {way_out}") from exc

    def state_problem(self, revision: str) -> str:
        """What is wrong with a revision's state file, or "": then what protects it is unknown."""
        try:
            self._read_state(revision)
        except (Corrupt, Unsupported) as exc:
            return _reason(exc)
        return ""

    def _read_state(self, revision: str) -> State | None:
        what = f"the state of revision {revision}"
        try:
            return State.decode(read_file(self._layout.state(revision)), what)
        except FileNotFoundError:
            return None
        except OSError as exc:
            if not is_medium_error(exc):  # it says nothing of the tags: nobody may replace them
                raise
            raise Corrupt(f"{what} cannot be read: {exc.strerror}") from exc

    def update_state(
        self, revision: str, change: Callable[[State], State], *, anew: bool = False
    ) -> State:
        """Replace a revision's state by `change(state)`, atomically; waits for no writer.

        Corrupt where the state is damaged, unless it may be made `anew`: from what `state` says.
        Unsupported, even so, where a newer program has written it.
        """
        with lock.meta(self._layout.meta_lock):
            if not is_named(self._layout.record(revision)):
                raise NoRevision(f"{self.name}: no revision {revision}")
            record = self.record(revision)
            old = self._state_or_none(record) if anew else self.known_state(record)
            new = change(old or self.state(record))
            if new != old:
                publish(self._layout.state(revision), new.encode(), self._fs)
            return new

    def _state_or_none(self, record: Record) -> State | None:
        """As `known_state`; None where the state is damaged."""
        try:
            return self.known_state(record)
        except Corrupt:
            return None


def _reason(exc: Corrupt | Unsupported) -> str:
    return exc.reason if isinstance(exc, Corrupt) else exc.message


def _sound_names(record: Record) -> bool:
    return all(
        is_name(name) and all(map(_may_be_a_disk_s, disk.files))
        for name, disk in record.disks.items()
    )


def _may_be_a_disk_s(file: str) -> bool:
    """Whether a name can be that of a map or image: with the last record it is removed."""
    return bool(owner(file)) and "/" not in file and not file.endswith(_OURS)
