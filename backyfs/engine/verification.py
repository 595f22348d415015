"""Verification of published revisions: every frame is read from the medium and checked.

Never waits for a writer and changes nothing but quarantine records and states. What is found bad
goes into quarantine, which makes every revision that reaches it damaged; what reads well again is
taken out. A frame that several revisions share is read once where the store can tell.

Beside the frames, the tree of hashes is computed again up to the digest in the record: a map that
names the wrong frames would pass a check frame by frame.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

import trio

from backyfs.engine.clock import utc_now
from backyfs.engine.coverage import Share, shares
from backyfs.engine.pipeline import Job, run_jobs
from backyfs.engine.plan import in_batches, size_of
from backyfs.engine.progress import QUIET, Phase, Progress
from backyfs.engine.readback import bad_frames
from backyfs.engine.scrub_position import note_damage
from backyfs.engine.trust import verified
from backyfs.errors import BackyfsError, Corrupt, NoRevision, NoSpace, Unsupported
from backyfs.extents import merged
from backyfs.model import FRAME, Extent
from backyfs.store.contract import StoredImage
from backyfs.store.digest import FAN_OUT, HASH, ZERO_HASH, digest, frame_count, node
from backyfs.store.format import Damage
from backyfs.store.fs import why_unwritten
from backyfs.store.record import Record
from backyfs.store.repository import Repository


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of a revision after verification.

    `removed`: it went away meanwhile. `unrecorded`: why the store does not know of it, or "".
    """

    record: Record
    damage: list[Damage] = field(default_factory=list)
    removed: bool = False
    unrecorded: str = ""

    @property
    def sound(self) -> bool:
        """Whether all of the revision was there and as recorded."""
        return not (self.damage or self.removed)


async def verify(
    repository: Repository,
    records: Sequence[Record],
    *,
    quick: bool = False,
    progress: Progress = QUIET,
    now: Callable[[], datetime] = utc_now,
) -> list[Verdict]:
    """Read these revisions completely and say of each, in order of `seq`, what is damaged.

    Sound revisions become trusted as verified, but for a lasting distrust. `quick` looks at the
    structure of the files and at known damage only, and changes nothing. Can be cancelled; what
    was found stays recorded. A store that is full or read-only is read as well; its verdicts say
    that they are not recorded.
    """
    found: Findings = defaultdict(list)
    if not quick:
        progress.start(Phase.VERIFY, await trio.to_thread.run_sync(_bytes, repository, records))
        await _read(repository, records, progress, found)
    verdicts = []
    with repository.format.holding():  # else each opens the files again that all rest on
        for record in sorted(records, key=lambda record: record.seq):
            judge = partial(_judge, repository, record, found[record.id], None if quick else now())
            verdicts.append(await trio.to_thread.run_sync(judge))
    if not quick:
        await trio.to_thread.run_sync(_note, repository, verdicts)
    return verdicts


def _note(repository: Repository, verdicts: Sequence[Verdict]) -> None:
    """For those who do not look themselves; a store that takes no writes has its say elsewhere."""
    with contextlib.suppress(OSError, BackyfsError):
        note_damage(repository, {verdict.record.id: verdict.damage for verdict in verdicts})


Findings = defaultdict[str, list[Damage]]


def _bytes(repository: Repository, records: Sequence[Record]) -> int:
    return sum(size_of(share.extents) for share in shares(repository, records))


async def _read(
    repository: Repository, records: Sequence[Record], progress: Progress, found: Findings
) -> None:
    bad: defaultdict[str, set[int]] = defaultdict(set)  # by disk, of the latest revision
    with closing(shares(repository, records)) as row:
        while share := await trio.to_thread.run_sync(next, row, None):
            here = await trio.to_thread.run_sync(inherited, share, bad[share.disk])

            def took(checked: Checked, here: set[int] = here) -> None:
                here.update(checked.bad)
                progress.advance(checked.length)

            await run_jobs(check_jobs(share, in_batches(share.extents)), took)
            bad[share.disk] = here
            found[share.record.id] += damage_at(share, here)
            found[share.record.id] += await trio.to_thread.run_sync(wrong_hashes, share)


@dataclass(frozen=True, slots=True)
class Checked:
    """What checking a part of an image showed: bytes looked at, numbers of bad frames."""

    length: int
    bad: list[int]


def check_jobs(share: Share, batches: Iterable[tuple[Extent, ...]]) -> Iterator[Job[Checked]]:
    """A job for each batch of extents (whole frames) of a share: check its frames.

    The store itself keeps in quarantine what is bad.
    """

    def check(batch: tuple[Extent, ...]) -> Checked:
        return Checked(size_of(batch), bad_frames(share.image, batch))

    return (partial(check, batch) for batch in batches)


def inherited(share: Share, bad: set[int]) -> set[int]:
    """Those bad frames of the disk before that this disk shares.

    The quarantine would say it, too, but on a read-only or full medium there may be none. Those
    that were bad for want of a hash are read again: this disk has hashes of its own.
    """
    if share.before is None or not bad:
        return set()
    own = [(extent.offset // FRAME, frame_count(extent.end)) for extent in share.extents]
    shared = {
        number
        for number in bad
        if number < frame_count(share.image.size)
        and not any(first <= number < end for first, end in own)
        and _hash(share.image, number) != ZERO_HASH
    }
    doubtful = {number for number in shared if _hash(share.before, number) is None}
    return shared - doubtful | set(share.image.check_all([(n, 1) for n in sorted(doubtful)]))


def _hash(image: StoredImage, number: int) -> bytes | None:
    """The hash of a frame; None where nothing proves it."""
    try:
        return image.hashes(number, 1)
    except Corrupt:
        return None


def damage_at(share: Share, bad: set[int]) -> list[Damage]:
    """The damage that these bad frames of a disk are."""
    size = share.image.size
    extents = (Extent(n * FRAME, min(FRAME, size - n * FRAME)) for n in bad)
    return [Damage(share.disk, extent, "fails its checksum") for extent in merged(extents)]


def wrong_hashes(share: Share) -> list[Damage]:
    """Where the hashes of the frames do not lead to the digest in the record."""
    image, disk = share.image, share.record.disks[share.disk]
    try:
        groups = image.groups()
        if digest(image.size, groups) != disk.digest:
            return [Damage(disk.name, None, "the group hashes do not lead to the digest")]
        before = share.before.groups() if share.before is not None else b""
        return [
            Damage(disk.name, _group_extent(group, image.size), problem)
            for group in _groups(share.extents, groups, before)
            if (problem := _wrong_group(share, group, groups))
        ]
    except (BackyfsError, OSError) as exc:
        return [Damage(disk.name, None, str(exc))]


def _groups(extents: Sequence[Extent], groups: bytes, before: bytes) -> list[int]:
    """Groups that hold one of these extents, or that differ from those of the disk before."""
    length = FAN_OUT * FRAME
    touched = {
        group
        for extent in extents
        for group in range(extent.offset // length, -(-extent.end // length))
    }
    differ = {
        at // HASH
        for at in range(0, len(groups), HASH)
        if groups[at : at + HASH] != before[at : at + HASH]
    }
    return sorted(touched | differ)


def _wrong_group(share: Share, group: int, groups: bytes) -> str:
    first = group * FAN_OUT
    count = min(FAN_OUT, frame_count(share.image.size) - first)
    try:
        hashes = share.image.hashes(first, count)
    except Corrupt as exc:
        return exc.reason
    recorded = groups[group * HASH : group * HASH + HASH]
    return "" if node(hashes) == recorded else "the frame hashes do not lead to the digest"


def _group_extent(group: int, size: int) -> Extent:
    offset = group * FAN_OUT * FRAME
    return Extent(offset, min(FAN_OUT * FRAME, size - offset))


def _judge(
    repository: Repository, record: Record, found: list[Damage], at: datetime | None
) -> Verdict:
    """The verdict; `at` is the time to enter in the state of a sound revision, if any."""
    try:
        repository.record(record.id)
        damage = found + [item for item in repository.damage_of(record) if is_new(item, found)]
        if damage or at is None:
            return Verdict(
                record, damage, unrecorded=repository.quarantine.refused if found else ""
            )
        return Verdict(record, unrecorded=_unrecorded(repository, record, at))
    except NoRevision:
        return Verdict(record, removed=True)
    except Corrupt as exc:
        return Verdict(record, [Damage("", None, exc.reason)])


def _unrecorded(repository: Repository, record: Record, at: datetime) -> str:
    """Enter in the state of a revision that it is sound; why that could not be done, or ""."""
    try:
        verified(repository, record, at)
    except (OSError, NoSpace) as exc:
        return why_unwritten(exc)
    except Unsupported as exc:
        return exc.message
    return ""


def is_new(item: Damage, found: list[Damage]) -> bool:
    """Whether `item` says more than what was found already."""
    return item.extent is None or not any(
        known.disk == item.disk
        and known.extent is not None
        and known.extent.offset <= item.extent.offset
        and item.extent.end <= known.extent.end
        for known in found
    )
