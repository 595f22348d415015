"""One backup: all disks of a VM become one revision, or nothing does.

    lock -> base -> begin -> snapshot -> read and write -> seal -> read back -> sample -> commit
    -> published

The base (the revision's parent) is the newest revision whose files are whole; where the source
has lost what it knew of that one, the next older one it still knows. Frames are compared
with it by hash, so a base that is distrusted, torn or damaged in places costs time, never
correctness: only what is *not read* rests on it, and so change lists are used only when the base is
neither distrusted nor torn. Frames known to be damaged are read whatever has changed. Of a frozen
snapshot a sample of what was not read is compared with the source (`sampling`); should it differ,
the revision is published as distrusted (`mismatch`).

Cancelled before the commit nothing stays behind; between evidence and commit nothing is cancelled.
Once the record is written the revision is complete, the source is told, and the record is returned
even to a cancelled caller.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import trio

from backyfs.config.schedule import Schedule
from backyfs.engine.clock import utc_now
from backyfs.engine.locking import writing
from backyfs.engine.partitions import tables
from backyfs.engine.pipeline import Job, asked, in_thread, run_jobs
from backyfs.engine.plan import Batch, Step, batches, reading, scanning, size_of
from backyfs.engine.progress import QUIET, Phase, Progress
from backyfs.engine.tags import checked_tags
from backyfs.errors import BackyfsError, SourceUnavailable, UsageError
from backyfs.extents import whole_frames
from backyfs.model import Consistency, Extent, Trust
from backyfs.source import changes as change_list
from backyfs.source import contract
from backyfs.source.contract import Backups, Bookmark, DiskSnapshot, Session, Snapshot, Source
from backyfs.store.contract import DiskWriter
from backyfs.store.record import Draft, Record, Stats
from backyfs.store.repository import Repository
from backyfs.store.staging import Staging

if TYPE_CHECKING:
    from backyfs.engine.readback import Finding
    from backyfs.engine.sampling import Sampling

log = logging.getLogger(__name__)

ChangeLists = Mapping[str, Sequence[Extent]]


async def back_up(
    repository: Repository,
    source: Source,
    *,
    tags: Sequence[str] = (),
    schedule: Schedule | None = None,
    force: bool = False,
    verify: bool = True,
    sampling: Sampling | None = None,
    changes: ChangeLists | None = None,
    wait_s: float = 0.0,
    progress: Progress = QUIET,
    now: Callable[[], datetime] = utc_now,
) -> Record:
    """Back up all disks of `source` as a new revision and return its record.

    `tags` must be in `schedule` or begin with "manual:", unless `force`. `changes` gives, for
    some disks, all extents that may differ from the newest revision; where it cannot be relied
    on (no sound and trusted newest revision, another size) the disk is read whole. `verify` reads
    back what was stored and reads the source again; a source that changed meanwhile gives a
    revision of consistency "torn", which is no error. `sampling` says how much of what was not read
    is looked at then (None: as much as usual); a revision in which that differs from the source is
    published with trust DISTRUSTED: the caller must tell.

    Raises UsageError, Busy (after `wait_s` seconds), SourceUnavailable, NoSpace, and Corrupt when
    stored bytes read back wrong. Can be cancelled at any point.
    """
    checked = checked_tags(tags, schedule, force=force)
    async with (
        writing(repository, wait_s) as intent,
        in_thread(contract.session(source, backups(repository))) as opened,
    ):
        base = await trio.to_thread.run_sync(choose_base, repository, opened)
        begun = repository.begin(intent, base.record, time=now())
        async with in_thread(begun) as staging:
            backup = _Backup(repository, staging, base, changes or {}, progress)
            record = await backup.run(opened, checked, verify, sampling)
        with trio.CancelScope(shield=True):
            noting = partial(repository.note_usage, "backup", record, time=now())
            await trio.to_thread.run_sync(noting)
        return record


@dataclass(frozen=True, slots=True)
class Base:
    """What a backup builds on: a revision, and how far one may rest on it unread.

    `relied`: the source's changes since then may be used. `newest`: no revision came after it.
    """

    record: Record | None = None
    relied: bool = False
    newest: bool = False

    def bookmarks(self, source_type: str) -> dict[str, Bookmark]:
        """By disk, what a source of this type may rest on."""
        return bookmarks(self.record, source_type) if self.record and self.relied else {}

    def has_disk(self, name: str, size: int) -> bool:
        """Whether the base has this disk, with this size."""
        return self.record is not None and (
            (disk := self.record.disks.get(name)) is not None and disk.size == size
        )


def backups(repository: Repository) -> Backups:
    """What a source is told of the repository it works for."""
    records, unreadable = repository.listing()
    return Backups(repository.uuid, {record.id for record in records} | unreadable.keys())


def choose_base(repository: Repository, source: Source) -> Base:
    """The newest revision whose files are whole; an older one if only that is remembered."""
    records, unreadable = repository.listing()
    for index, record in reversed(list(enumerate(records))):
        if damage := repository.structure(record):
            values = {"revision": record.id, "reason": damage[0].reason}
            log.warning("revision is damaged, building on an older one", values)
            continue
        older = _remembered(repository, source, records[: index + 1])
        if older is not None:
            return Base(older, relied=True)
        newest = index == len(records) - 1 and not unreadable
        return Base(record, _relied(repository, record), newest)
    return Base()


def _remembered(repository: Repository, source: Source, records: Sequence[Record]) -> Record | None:
    """The newest revision the source remembers, unless that is the last of `records`.

    Behind a distrusted or torn one nothing is looked for: what follows that must be read whole.
    """
    if not isinstance(source, Session):
        return None
    for index, record in reversed(list(enumerate(records))):
        if source.remembers(bookmarks(record, source.type)):
            newer = records[index + 1 :]
            good = newer and all(_relied(repository, one) for one in (record, *newer))
            return record if good and not repository.structure(record) else None
    return None


def _relied(repository: Repository, record: Record) -> bool:
    """Whether what is not read may be taken over from a revision."""
    trust = repository.state(record).trust
    return trust is not Trust.DISTRUSTED and record.consistency is not Consistency.TORN


def bookmarks(record: Record, source_type: str) -> dict[str, Bookmark]:
    """By disk, what a source of this type remembered of a revision."""
    return {
        name: disk.source["bookmark"]
        for name, disk in record.disks.items()
        if disk.source.get("type") == source_type and "bookmark" in disk.source
    }


class _Taken(NamedTuple):
    """What one batch came to, in bytes."""

    read: int
    changed: int
    covered: int


@dataclass(frozen=True, slots=True)
class _Disk:
    """One disk between source and store. `listed`: what to read; None = look at all of it."""

    name: str
    source: DiskSnapshot
    writer: DiskWriter
    listed: Sequence[Extent] | None

    @property
    def length(self) -> int:
        """Bytes the steps cover, for progress."""
        return self.source.size if self.listed is None else size_of(self.listed)

    @property
    def believed(self) -> int:
        """Bytes that are not read, but taken over from the base."""
        return self.source.size - self.length

    def jobs(self) -> Iterator[Job[_Taken]]:
        """Everything that is to be read and written, in batches."""
        steps = (
            scanning(self.source.data(), self.source.size)
            if self.listed is None
            else reading(self.listed)
        )
        return (partial(self._take, batch) for batch in batches(steps))

    def _take(self, batch: Batch) -> _Taken:
        read = changed = 0
        for step in batch:
            if step.zero:
                changed += self.writer.zero(step.extent.offset, step.extent.length)
            else:
                read += step.extent.length
                changed += self._copy(step)
        return _Taken(read, changed, sum(step.extent.length for step in batch))

    def _copy(self, step: Step) -> int:
        data = self.source.read(step.extent.offset, step.extent.length)
        return self.writer.write(step.extent.offset, data)


class _Backup:
    """One run, from the empty staging to the published record."""

    def __init__(
        self,
        repository: Repository,
        staging: Staging,
        base: Base,
        changes: ChangeLists,
        progress: Progress,
    ) -> None:
        self._repository, self._vm = repository, repository.name
        self._staging, self._base = staging, base
        self._changes, self._progress = changes, progress
        self._stats = Stats()
        self._started = time.monotonic()

    async def run(
        self, source: Source, tags: tuple[str, ...], verify: bool, sampling: Sampling | None
    ) -> Record:
        """Snapshot the source, store it, publish the revision."""
        published: list[Record] = []
        snapshotting = source.snapshot(self._staging.revision, self._base.bookmarks(source.type))
        try:
            async with in_thread(snapshotting) as snapshot:
                disks = await asked(self._open, snapshot)
                await self._store(disks)
                finding = await self._read_back(snapshot, disks, sampling) if verify else None
                draft = await trio.to_thread.run_sync(
                    self._draft, source.type, snapshot, tags, finding
                )
                with trio.CancelScope(shield=True):
                    published.append(await trio.to_thread.run_sync(self._staging.commit, draft))
                    await trio.to_thread.run_sync(snapshot.published)
        except BackyfsError as exc:
            if not published:
                raise
            # The revision is complete and durable: what the source could not tidy up, it will
            # find again at the next backup.
            log.warning("source not tidied up after the backup", {"reason": exc.message})
        _tell(published[0])
        return published[0]

    def _open(self, snapshot: Snapshot) -> list[_Disk]:
        if not snapshot.disks:
            raise SourceUnavailable(f"{self._vm}: the source has no disks")
        if unknown := self._changes.keys() - snapshot.disks.keys():
            raise UsageError(f"{self._vm}: changes are given for {min(unknown)!r}, no disk of it")
        disks = []
        for name, disk in snapshot.disks.items():
            writer = self._staging.disk(name, disk.size)
            disks.append(_Disk(name, disk, writer, self._listed(name, disk, writer)))
        self._stats = replace(self._stats, believed=sum(disk.believed for disk in disks))
        return disks

    def _listed(self, name: str, disk: DiskSnapshot, writer: DiskWriter) -> Sequence[Extent] | None:
        """The frames to read when it is known what changed; None = all that may hold data."""
        changed: Sequence[Extent] | None = None
        if self._base.record is not None and name in self._base.record.disks and self._base.relied:
            if name in self._changes and self._base.newest and self._base.has_disk(name, disk.size):
                what = f"the change list of {name}"  # one that goes on behind it is of another disk
                changed = change_list.checked(self._changes[name], what, disk.size)
            elif (known := disk.changed()) is not None:
                changed = known.extents
        if changed is None:
            return None
        return list(whole_frames([*changed, *writer.required()], disk.size))

    async def _store(self, disks: Sequence[_Disk]) -> None:
        self._progress.start(Phase.BACKUP, sum(disk.length for disk in disks))
        await run_jobs((job for disk in disks for job in disk.jobs()), self._took)
        await trio.to_thread.run_sync(self._staging.seal)

    def _took(self, taken: _Taken) -> None:
        self._stats = replace(
            self._stats,
            read=self._stats.read + taken.read,
            changed=self._stats.changed + taken.changed,
        )
        self._progress.advance(taken.covered)

    async def _read_back(
        self, snapshot: Snapshot, disks: Sequence[_Disk], sampling: Sampling | None
    ) -> Finding:
        from backyfs.engine.readback import read_back  # not every backup is verified

        return await read_back(
            self._staging,
            snapshot,
            {disk.name: disk.listed for disk in disks},
            sampling,
            vm=self._vm,
            progress=self._progress,
        )

    def _draft(
        self, source_type: str, snapshot: Snapshot, tags: tuple[str, ...], finding: Finding | None
    ) -> Draft:
        """What is to be said of the revision. Evidence against it is kept here: the commit follows
        without a point at which it could be cancelled.
        """
        if wrong := finding is not None and finding.wrong:
            self._denounce(finding)
        torn = finding is not None and finding.torn_frames > 0
        stats = finding.noted(self._stats) if finding else self._stats
        return Draft(
            consistency=Consistency.TORN if torn else snapshot.consistency,
            reason=f"{finding}; {snapshot.reason}" if torn or wrong else snapshot.reason,
            tags=tags,
            trust=Trust.DISTRUSTED if wrong else Trust.TRUSTED,
            stats=replace(stats, seconds=round(time.monotonic() - self._started, 3)),
            verification=self._verification(finding),
            quiescing=contract.quiescing(snapshot),
            sources={
                name: {"type": source_type, "bookmark": disk.bookmark}
                for name, disk in snapshot.disks.items()
            },
            partitions=tables(self._staging, snapshot.disks),
        )

    def _verification(self, finding: Finding | None) -> str:
        if finding is None:
            return "none"
        return "sample" if self._stats.believed else "full"

    def _denounce(self, finding: Finding) -> None:
        from backyfs.engine.mismatch import denounce

        assert self._base.record is not None
        assert finding.sampled is not None
        denounce(self._repository, self._staging, self._base.record, finding.sampled)


def _tell(record: Record) -> None:
    values = {
        "revision": record.id,
        "consistency": str(record.consistency),
        "reason": record.reason,
        "read": record.stats.read,
        "changed": record.stats.changed,
        "stored": record.stats.stored,
        "seconds": record.stats.seconds,
    }
    log.info("revision published", values)
