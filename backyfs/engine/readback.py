"""Verification of a revision before it is published: two questions, each with its own culprit.

Stored bytes against the hashes taken while reading: a difference is a fault of the store, and the
backup fails. The source, read again, against the same hashes: a difference means that the source
changed (or, being a frozen snapshot, does not return the same bytes twice), and the revision is
torn.

What is read again: of a frozen snapshot the frames that were stored anew (all others matched a
recorded hash, which an error while reading cannot do). Of a source that may change under the
backup, everything that was read, and whatever became data meanwhile. Frames that were not read at
all are another matter: of a frozen snapshot, `sampling` looks at some of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from backyfs.engine.pipeline import Job, run_jobs
from backyfs.engine.plan import in_batches, size_of
from backyfs.engine.progress import Phase, Progress
from backyfs.errors import Corrupt
from backyfs.extents import union
from backyfs.model import FRAME, Extent
from backyfs.source.contract import DiskSnapshot, Snapshot
from backyfs.store.contract import StoredImage
from backyfs.store.digest import HASH, frame_count, matches
from backyfs.store.record import Stats
from backyfs.store.staging import Staging

if TYPE_CHECKING:
    from backyfs.engine.sampling import Sampled, Sampling


@dataclass(frozen=True, slots=True)
class Finding:
    """What reading back showed of a revision whose stored bytes are sound.

    `sampled`: what a sample of the frames that were not read showed; None: there was none.
    """

    compared_bytes: int
    torn_frames: int
    frozen: bool
    sampled: Sampled | None = None

    @property
    def wrong(self) -> bool:
        """Whether the revision is known to differ from its source."""
        return self.sampled is not None and self.sampled.wrong_frames > 0

    def noted(self, stats: Stats) -> Stats:
        """`stats` with the numbers of this finding."""
        stats = replace(stats, verified=self.compared_bytes, torn_frames=self.torn_frames)
        if (found := self.sampled) is None:
            return stats
        return replace(
            stats,
            sampled=found.compared_bytes,
            sampled_frames=found.frames,
            sample_cut=found.cut,
            wrong_frames=found.wrong_frames,
        )

    def __str__(self) -> str:
        """The finding in words, for an operator."""
        if self.wrong:
            return str(self.sampled)
        if not self.torn_frames:
            return "the source reads the same again"
        if self.frozen:
            return f"{self.torn_frames} frames of the frozen snapshot read differently again"
        return f"{self.torn_frames} frames changed while they were backed up"


async def read_back(
    staging: Staging,
    snapshot: Snapshot,
    listed: Mapping[str, Sequence[Extent] | None],
    sampling: Sampling | None = None,
    *,
    vm: str,
    progress: Progress,
) -> Finding:
    """Check a sealed revision. `listed`: per disk the extents that were read, None = all data.

    `sampling`: how much of a frozen snapshot that was not read is looked at (None: the usual).

    Raises Corrupt when stored bytes read back wrong, SourceUnavailable when the source fails.
    """
    written = {name: staging.written(name) for name in snapshot.disks}
    await _check_stored(staging, written, vm, progress)
    if not snapshot.frozen:
        return await _compare(staging, snapshot, listed, progress)
    finding = await _compare(staging, snapshot, written, progress)
    sampled = await _sample(staging, snapshot, listed, sampling, progress)
    if sampled is None:
        return finding
    return replace(finding, torn_frames=finding.torn_frames + sampled.unstable, sampled=sampled)


async def _sample(
    staging: Staging,
    snapshot: Snapshot,
    listed: Mapping[str, Sequence[Extent] | None],
    sampling: Sampling | None,
    progress: Progress,
) -> Sampled | None:
    """A sample of what was not read of the disks; None: all was read, or no sample is wanted."""
    unread = {name: extents for name, extents in listed.items() if extents is not None}
    if not unread or (sampling is not None and not sampling.share):
        return None
    from backyfs.engine.sampling import Believed, Sampling, sample  # few backups have any

    disks = [
        Believed(name, staging.image(name), snapshot.disks[name], extents)
        for name, extents in unread.items()
    ]
    return await sample(disks, sampling or Sampling(), progress)


async def _check_stored(
    staging: Staging, written: Mapping[str, Sequence[Extent]], vm: str, progress: Progress
) -> None:
    progress.start(Phase.STORED, sum(map(size_of, written.values())))
    jobs = (
        job
        for name, extents in written.items()
        for job in stored_jobs(staging.image(name), extents, (vm, staging.revision, name))
    )
    await run_jobs(jobs, progress.advance)


async def _compare(
    staging: Staging,
    snapshot: Snapshot,
    known: Mapping[str, Sequence[Extent] | None],
    progress: Progress,
) -> Finding:
    """Compare with the source what is `known` to matter; None: all that is data there or here."""
    compared = torn = 0

    def count(result: tuple[int, int]) -> None:
        nonlocal compared, torn
        compared, torn = compared + result[0], torn + result[1]
        progress.advance(result[0])

    images = {name: staging.image(name) for name in snapshot.disks}
    total = sum(size_of(_expected(known[name], image)) for name, image in images.items())
    progress.start(Phase.SOURCE, total)
    jobs = (
        job
        for name, disk in snapshot.disks.items()
        for job in source_jobs(images[name], disk, _again(disk, images[name], known[name]))
    )
    await run_jobs(jobs, count)
    return Finding(compared, torn, snapshot.frozen)


def _expected(known: Sequence[Extent] | None, image: StoredImage) -> Iterable[Extent]:
    return image.extents() if known is None else known


def _again(
    disk: DiskSnapshot, image: StoredImage, known: Sequence[Extent] | None
) -> Iterable[Extent]:
    """What to compare with the source: `known`, or all that is data there or here."""
    return union(disk.data(), image.extents(), image.size) if known is None else known


def stored_jobs(
    image: StoredImage, written: Iterable[Extent], names: tuple[str, str, str]
) -> Iterator[Job[int]]:
    """Read what was stored, past all caches; a job raises Corrupt at the first bad frame.

    `names` are VM, revision and disk. A job's result is the bytes of the image it looked at.
    """

    def check(batch: tuple[Extent, ...]) -> int:
        if bad := bad_frames(image, batch):
            vm, revision, disk = names
            raise Corrupt(
                f"{len(bad)} of the frames just written read back wrong; nothing is published",
                vm=vm,
                revision=revision,
                disk=disk,
                offset=bad[0] * FRAME,
                length=FRAME,
            )
        return size_of(batch)

    return (partial(check, batch) for batch in in_batches(written))


def bad_frames(image: StoredImage, extents: Iterable[Extent]) -> list[int]:
    """The numbers of the frames of these extents that read badly from the medium."""
    return image.check_all([(e.offset // FRAME, frame_count(e.length)) for e in extents])


def source_jobs(
    image: StoredImage, snapshot: DiskSnapshot, extents: Iterable[Extent]
) -> Iterator[Job[tuple[int, int]]]:
    """Read the source again: bytes compared, and frames that differ from what was stored."""

    def compare(batch: tuple[Extent, ...]) -> tuple[int, int]:
        torn = sum(differing(image, e, snapshot.read(e.offset, e.length)) for e in batch)
        return size_of(batch), torn

    return (partial(compare, batch) for batch in in_batches(extents))


def differing(image: StoredImage, extent: Extent, data: bytes) -> int:
    """How many frames of `data`, which should be the image at `extent`, differ from it."""
    hashes = image.hashes(extent.offset // FRAME, frame_count(extent.length))
    view = memoryview(data)
    return sum(
        not matches(view[at : at + FRAME], hashes[index * HASH : (index + 1) * HASH])
        for index, at in enumerate(range(0, len(data), FRAME))
    )
