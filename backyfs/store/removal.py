"""Removing revisions: the record first, then the files that no other revision names.

What the records say is read once for all that are removed: only the holder of the writer's lock,
which whoever removes is, makes or removes revisions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from backyfs.errors import NoRevision
from backyfs.store import lock
from backyfs.store.format import Format
from backyfs.store.fs import Fs, is_named
from backyfs.store.layout import Layout
from backyfs.store.ledger import Ledger
from backyfs.store.record import Record, State


@dataclass(frozen=True, slots=True)
class Removal:
    """What was done: ids that are gone, ids that stay because a reader has them open."""

    removed: list[str] = field(default_factory=list)
    in_use: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


class Remover:
    """Removes revisions of a repository, whose writer's lock is held; notes it in `done`."""

    def __init__(self, layout: Layout, ledger: Ledger, form: Format, fs: Fs) -> None:
        self.done = Removal()
        self._layout, self._ledger, self._format, self._fs = layout, ledger, form, fs
        entries = ledger.entries()
        self._records = {i: found for i, found in entries.items() if isinstance(found, Record)}
        self._unreadable = entries.keys() - self._records.keys()
        self._uses = Counter(
            path for record in self._records.values() for path in self._files(record)
        )

    def remove(self, revision: str, force: bool, unless: Callable[[Record, State], bool]) -> None:
        """Remove one, but not where somebody reads it (`force`: even then). NoRevision, OSError."""
        if not is_named(self._layout.record(revision)):
            raise NoRevision(f"{self._ledger.name}: no revision {revision}")
        record = self._records.get(revision)
        with lock.meta(self._layout.meta_lock):
            if record is not None and unless(record, self._ledger.state(record)):
                self.done.kept.append(revision)
                return
            # A reader looks for the record once it has its lock: either it is seen here, or it
            # sees that the revision is gone.
            with lock.no_readers([] if force else self._lockable(record)) as free:
                if not free:
                    self.done.in_use.append(revision)
                    return
                self._fs.unlink(self._layout.record(revision))
            self._fs.sync_dir(self._layout.revisions)
            self._fs.unlink(self._layout.state(revision))
        self.done.removed.append(revision)
        self._unreadable.discard(revision)
        self._drop_files(self._records.pop(revision, None))

    def _drop_files(self, record: Record | None) -> None:
        """Remove the files that only this record named. An unreadable one may name any."""
        owned = self._files(record) if record is not None else []
        self._uses.subtract(owned)
        for path in owned:
            if not self._unreadable and not self._uses[path]:
                self._fs.unlink(path)

    def _lockable(self, record: Record | None) -> list[Path]:
        disks = record.disks.values() if record is not None else ()
        return [path for disk in disks if (path := self._format.lockable(disk))]

    def _files(self, record: Record) -> set[Path]:
        return {path for disk in record.disks.values() for path in self._format.files(disk)}
