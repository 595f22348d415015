"""Copies revisions into another repository, oldest first, converting between formats.

Each revision is replayed on top of the target's newest one: disks are compared by the hashes both
stores keep, only frames that differ are read, and the digests must agree before it is published.
Id, time, tags, trust, consistency and sources stay as they are.

The order of the target must stay that of the source, so only revisions after the newest common
one are copied: what was expired in the target does not come back, and a copy that was interrupted
goes on where it ended. One that is gone from the target counts as common while others there rest
on what it stored: its files have names that follow from its id, and would be replaced.

The writer's lock of the target is held for one revision at a time, and what is due is decided anew
where others wrote to it in between. The source goes on as ever: it is read with a reader's lock on
one revision, and what is removed before its turn is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import dropwhile

import trio

from backyfs.engine.locking import writing
from backyfs.engine.pipeline import Job, asked, in_thread, run_jobs
from backyfs.engine.plan import in_batches, size_of
from backyfs.engine.progress import QUIET, Phase, Progress
from backyfs.engine.readback import stored_jobs
from backyfs.errors import BackyfsError, Corrupt, NoRevision, UsageError
from backyfs.extents import joined, union
from backyfs.model import FRAME, Extent
from backyfs.store.contract import DiskWriter, StoredImage
from backyfs.store.digest import FAN_OUT, HASH, ZERO_HASH, frame_count
from backyfs.store.record import Draft, Record, State
from backyfs.store.repository import Repository
from backyfs.store.staging import Staging

_GROUP_BYTES = FAN_OUT * FRAME


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copy did: ids, in order. `present`: were there, or had been and were removed; or
    somebody else copied them. `removed`: are gone from the source since the copy began.
    `unreadable`: those of the source that it could not see, with the reason.
    """

    copied: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unreadable: dict[str, BackyfsError] = field(default_factory=dict)


async def copy(
    source: Repository,
    target: Repository,
    *,
    wait_s: float = 0.0,
    progress: Progress = QUIET,
    result: Copied | None = None,
) -> Copied:
    """Copy all revisions of `source` that come after the newest one `target` has.

    Raises UsageError when the two are the same repository or have nothing to do with each other,
    Busy, NoSpace, and Corrupt at the first revision that cannot be read completely; those before
    it are in the target by then. What was done is entered in `result`, which is returned.
    """
    if source.path == target.path:
        raise UsageError(f"{source.path}: source and target are the same repository")
    result = result or Copied()
    records, unreadable = await trio.to_thread.run_sync(source.listing)
    result.unreadable.update(unreadable)
    there = await trio.to_thread.run_sync(target.revisions)
    due = missing(records, there, await trio.to_thread.run_sync(target.origins))
    result.present.extend(record.id for record in records if record not in due)
    known = {record.id for record in there}
    for record in due:
        still_due = partial(_is_due, target, record, records, known)
        try:
            made = await _copy_revision(source, target, record, still_due, wait_s, progress)
        except (Corrupt, NoRevision):
            if not await trio.to_thread.run_sync(_is_gone, source, record):
                raise
            result.removed.append(record.id)
        else:
            (result.copied if made else result.present).append(record.id)
    return result


def _is_due(target: Repository, record: Record, records: Sequence[Record], known: set[str]) -> bool:
    """Whether a revision is still to be copied, for who holds the writer's lock and will do it.

    `known`: the ids that the target has unless others wrote to it since this was asked last.
    """
    there = target.revisions()
    ids = {record.id for record in there}
    if ids != known and record not in missing(records, there, target.origins()):
        return False
    known.clear()
    known.update(ids, [record.id])
    return True


def _is_gone(source: Repository, record: Record) -> bool:
    """Whether a revision was removed. Corrupt where all of the repository is gone."""
    try:
        source.record(record.id)
    except NoRevision:
        return True
    return False


def missing(
    records: Sequence[Record], there: Sequence[Record], origins: Collection[str] = ()
) -> list[Record]:
    """The records to copy to a repository that has the revisions `there`; both oldest first.

    Those after the newest common one; without a common one, from the first on that is later than
    all that is there or was built on one of them (clocks are set back). UsageError if there are
    earlier ones then, and nothing says that it is the same history. `origins`: ids of revisions
    that stored what those that are there need; they are common, too.
    """
    if not there:
        return list(records)
    ids = {record.id for record in there}
    common = [record.seq for record in records if record.id in ids or record.id in origins]
    if common:
        return [record for record in records if record.seq > common[-1]]
    newest = max(record.time for record in there)
    later = list(dropwhile(lambda r: r.time <= newest and r.parent not in ids, records))
    if len(later) < len(records) and not any(record.parent in ids for record in records):
        raise UsageError(
            "the target has newer revisions, and none of them is of this source",
            hint="copy into a directory of its own",
        )
    return later


async def _copy_revision(
    source: Repository,
    target: Repository,
    record: Record,
    still_due: Callable[[], bool],
    wait_s: float,
    progress: Progress,
) -> bool:
    """Copy one; False if that is `still_due` no more when the target can be written to."""
    async with writing(target, wait_s) as intent:
        if not await trio.to_thread.run_sync(still_due):
            return False
        state = await trio.to_thread.run_sync(source.state, record)
        parent = await trio.to_thread.run_sync(_parent, target)
        begun = target.begin(intent, parent, revision=record.id, time=record.time)
        async with in_thread(begun) as staging, in_thread(ExitStack()) as opened:
            disks = await asked(_open, source, target, record, parent, staging, opened)
            progress.start(Phase.COPY, sum(size_of(disk.extents) for disk in disks))
            jobs = (job for disk in disks for job in disk.jobs())
            await run_jobs(jobs, progress.advance)
            await trio.to_thread.run_sync(staging.seal)
            await _check(staging, source, record, progress)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_publish, target, staging, record, state)
        await trio.to_thread.run_sync(target.note_usage, "copy")
    return True


def _parent(target: Repository) -> Record | None:
    sound = (record for record in reversed(target.revisions()) if not target.structure(record))
    return next(sound, None)


def _open(
    source: Repository,
    target: Repository,
    record: Record,
    parent: Record | None,
    staging: Staging,
    opened: ExitStack,
) -> list[_Disk]:
    disks = []
    for name, disk in record.disks.items():
        image = source.open_disk(record, name)
        opened.callback(image.close)
        base = None
        if parent is not None and name in parent.disks:
            base = target.open_disk(parent, name)
            opened.callback(base.close)
        writer = staging.disk(name, disk.size)
        different = union(differences(image, base), writer.required(), disk.size)
        disks.append(_Disk(image, writer, tuple(different)))
    return disks


@dataclass(frozen=True, slots=True)
class _Disk:
    image: StoredImage
    writer: DiskWriter
    extents: tuple[Extent, ...]

    def jobs(self) -> Iterator[Job[int]]:
        """Everything that differs, in batches; a result is the bytes of one."""
        return (partial(self._take, batch) for batch in in_batches(self.extents))

    def _take(self, batch: tuple[Extent, ...]) -> int:
        for extent in batch:
            self.writer.write(extent.offset, self.image.read(extent.offset, extent.length))
        return size_of(batch)


def differences(image: StoredImage, base: StoredImage | None) -> Iterator[Extent]:
    """Where `image` differs from `base` (None: nothing but zeros), in whole frames, sorted.

    From the hashes alone; groups of frames that are equal are not looked into.
    """
    return joined(_different_frames(image, base))


def _different_frames(image: StoredImage, base: StoredImage | None) -> Iterator[Extent]:
    mine, theirs = image.groups(), base.groups() if base is not None else b""
    for group in range(len(mine) // HASH):
        at = slice(group * HASH, group * HASH + HASH)
        if mine[at] == (theirs[at] or ZERO_HASH):
            continue
        first = group * FAN_OUT
        new = _hashes(image, first)
        old = _hashes(base, first).ljust(len(new), b"\0") if base is not None else bytes(len(new))
        for index in range(0, len(new), HASH):
            if new[index : index + HASH] != old[index : index + HASH]:
                offset = (first + index // HASH) * FRAME
                yield Extent(offset, min(FRAME, image.size - offset))


def _hashes(image: StoredImage, first: int) -> bytes:
    """The hashes of the frames of one group that the image has."""
    count = min(FAN_OUT, frame_count(image.size) - first)
    return image.hashes(first, count) if count > 0 else b""


async def _check(staging: Staging, source: Repository, record: Record, progress: Progress) -> None:
    """Raise Corrupt unless what was stored reads back well and has the digests of the record."""
    written = {name: staging.written(name) for name in record.disks}
    progress.start(Phase.STORED, sum(map(size_of, written.values())))
    stored = (
        job
        for name, extents in written.items()
        for job in stored_jobs(staging.image(name), extents, (source.name, record.id, name))
    )
    await run_jobs(stored, progress.advance)
    for name, disk in record.disks.items():
        if staging.image(name).digest != disk.digest:
            raise Corrupt(
                "the copy has another digest than its original; nothing of it is published",
                vm=source.name,
                revision=record.id,
                disk=name,
            )


def _publish(target: Repository, staging: Staging, record: Record, state: State) -> None:
    draft = Draft(
        consistency=record.consistency,
        reason=record.reason,
        tags=state.tags,
        trust=state.trust,
        stats=record.stats,
        tool=record.tool,
        verification=record.verification,
        quiescing=record.quiescing,
        sources={name: disk.source for name, disk in record.disks.items()},
        partitions={name: disk.partitions for name, disk in record.disks.items()},
    )
    copied = staging.commit(draft)
    # A crash may have left the state of a revision of this id that was removed.
    if target.state(copied) != state:
        target.update_state(copied.id, lambda _: state, anew=True)
