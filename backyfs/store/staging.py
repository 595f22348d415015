"""A revision in the making, in either format: from the intent to the record, or back to nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from backyfs import __version__
from backyfs.errors import BackyfsError
from backyfs.log import one_line
from backyfs.model import Extent
from backyfs.store import lock
from backyfs.store.contract import DiskWriter, StoredImage
from backyfs.store.format import Place, Stage
from backyfs.store.fs import is_named, publish
from backyfs.store.ledger import Ledger
from backyfs.store.record import DiskRecord, Draft, Record


class Staging:
    """A revision in the making (RevisionWriter). Leaving it without `commit` removes its files."""

    def __init__(
        self,
        place: Place,
        ledger: Ledger,
        intent: lock.Intent,
        stage: Stage,
        discard: Callable[[str], None],
        *,
        revision: str,
        time: datetime,
        parent: Record | None,
    ) -> None:
        """`discard` removes the files of a revision that has no record."""
        self._place, self._ledger = place, ledger
        self._intent = intent
        self._stage = stage
        self._discard = discard
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
        layout, fs = self._place.layout, self._place.fs
        if is_named(layout.record(self.revision)):
            # Named, but not durably so. First the record: it must never name files that are gone.
            fs.unlink(layout.record(self.revision))
            fs.sync_dir(layout.revisions)
        self._discard(self.revision)
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
        record = self._record(draft)
        # The record's rename is the commit point; everything it names is durable already.
        publish(self._place.layout.record(self.revision), record.encode(), self._place.fs)
        self._done = True
        with contextlib.suppress(OSError, BackyfsError):
            self._intent.clear()  # if not, the next writer finds the record and does it
        return record

    def _record(self, draft: Draft) -> Record:
        disks = {
            name: self._disk_record(name, writer, draft) for name, writer in self._disks.items()
        }
        return Record(
            seq=self._ledger.next_seq(),
            id=self.revision,
            time=self.time,
            parent=self.parent.id if self.parent else "",
            tool=draft.tool or f"backyfs {__version__}",
            consistency=draft.consistency,
            reason=one_line("; ".join(filter(None, [draft.reason, *self._stage.notes]))),
            tags=tuple(draft.tags),
            trust=draft.trust,
            verification=draft.verification,
            stats=replace(draft.stats, stored=self.stored_bytes),
            disks=disks,
            quiescing=draft.quiescing,
        )

    def _disk_record(self, name: str, writer: DiskWriter, draft: Draft) -> DiskRecord:
        image = self._stage.image(name)
        return DiskRecord(
            name=name,
            size=writer.size,
            digest=image.digest,
            data=image.data,
            files=self._stage.files(name),
            source=draft.sources.get(name, {}),
            partitions=draft.partitions.get(name, ()),
        )
