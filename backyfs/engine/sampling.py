"""Verification by sample: frames that a backup took over unread are read from the source after all.

A change list is believed: what it does not name is not read. One that leaves something out makes
a revision that looks whole and is wrong, and nothing that is stored can tell. So, of a frozen
snapshot, a random sample of the frames that were *not* read is compared with what the revision
holds. Frames that were read need none.

There are two kinds of them, each with its own sample, because most of a thin disk is hole: those
that hold data in the revision, and those that are zero in it. Of either the share that is asked
for is read, and at least FRAMES_MIN, so that a small disk gets a real check. Zero frames are worth
less (a hole costs a request, too, and says little), so no more of them are read than of the
others, unless all are asked for.

Frames are drawn in a random order without repetition, kinds and disks in step, so that a sample
the time limit cuts short is a random sample still. Memory is bounded: no list of frames is made.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NamedTuple

import trio
from blake3 import blake3

from backyfs.engine.pipeline import Job, run_jobs
from backyfs.engine.progress import Phase, Progress
from backyfs.engine.shuffle import shuffled
from backyfs.extents import framed, gaps, joined, union
from backyfs.model import FRAME, Extent
from backyfs.source.contract import DiskSnapshot
from backyfs.store.contract import StoredImage
from backyfs.store.digest import ZERO_HASH, frame_count, matches

FRAMES_MIN = 1024
"""Frames of each kind and disk that are read if there are so many, however small the share."""

FRAMES_BATCH = 32
"""Frames of one job: 2 MiB of the source, at as many places."""

DRAWS_BATCH = 4096
"""Draws for one batch, candidates or not: a job never keeps a cancelled backup waiting."""

GRANULES = 1 << 17
"""Parts of a disk that Runs tells apart; up to 8 GiB a part is one frame."""

KEPT_MAX = 64
"""Wrong frames that are remembered; all are counted."""

CONTENT_MAX = 16
"""Of these, frames whose content is remembered, too: 1 MiB."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How much is sampled: a share (0..1; 0 = nothing) of the frames, `budget_s` seconds at most.

    `clock` and `rng` are for tests.
    """

    share: float = 0.01
    budget_s: float = 300.0
    clock: Callable[[], float] = time.monotonic
    rng: random.Random = field(default_factory=random.SystemRandom)

    def quota(self, candidates: int, other: int | None = None) -> int:
        """How many of so many candidates to read; `other`: the quota of the kind before it."""
        wanted = math.ceil(candidates * self.share)
        if other is not None and self.share < 1:
            wanted = min(wanted, other)
        return min(candidates, max(wanted, FRAMES_MIN)) if self.share else 0


class Wrong(NamedTuple):
    """A frame the source has otherwise; hashes in hex. `content`: the source's (b"" = not kept)."""

    disk: str
    extent: Extent
    stored: str
    source: str
    content: bytes


@dataclass(slots=True)
class Sampled:
    """What a sample showed. `cut`: the time limit ended it before all was read.

    `unstable`: frames that read differently twice, the second time as the revision has them.
    """

    compared_bytes: int = 0
    frames: int = 0
    cut: bool = False
    unstable: int = 0
    wrong_frames: int = 0
    wrong: list[Wrong] = field(default_factory=list)

    def add(self, other: Sampled) -> None:
        """Count in what one batch showed."""
        self.compared_bytes += other.compared_bytes
        self.frames += other.frames
        self.unstable += other.unstable
        self.wrong_frames += other.wrong_frames
        for item in other.wrong[: KEPT_MAX - len(self.wrong)]:
            kept = len(self.wrong) < CONTENT_MAX
            self.wrong.append(item if kept else item._replace(content=b""))

    def __str__(self) -> str:
        """What is wrong, for an operator."""
        return f"{self.wrong_frames} of {self.frames} sampled frames differ from the source"


class Runs:
    """Frames by rank, in at most 1 MiB: runs of frames, with gaps in them where runs are many.

    `frames` counts those that were given, `span` those there are ranks for, gaps included.
    """

    def __init__(self, extents: Iterable[Extent], size: int) -> None:
        """From sorted, disjoint extents of whole frames of a disk of `size` bytes."""
        self.frames = self.span = 0
        self._firsts, self._ranks = array("Q"), array("Q")
        granule = FRAME * max(1, -(-frame_count(size) // GRANULES))
        for run in joined(self._widened(extents, granule)):
            self._firsts.append(run.offset // FRAME)
            self._ranks.append(self.span)
            self.span += frame_count(min(run.end, size) - run.offset)

    def _widened(self, extents: Iterable[Extent], granule: int) -> Iterator[Extent]:
        for extent in extents:
            self.frames += frame_count(extent.length)
            start = extent.offset - extent.offset % granule
            yield Extent(start, -(-extent.end // granule) * granule - start)

    def __getitem__(self, rank: int) -> int:
        """The number of the frame with this rank, 0 <= rank < span."""
        at = bisect_right(self._ranks, rank) - 1
        return self._firsts[at] + rank - self._ranks[at]


@dataclass(frozen=True, slots=True)
class Believed:
    """A disk that was not read but for `listed` (sorted extents of whole frames)."""

    name: str
    image: StoredImage
    source: DiskSnapshot
    listed: Sequence[Extent]

    def data(self) -> Runs:
        """Unread frames that hold data in the revision."""
        size = self.image.size
        holes = gaps(framed(self.image.extents(), size), size)
        return Runs(gaps(union(self.listed, holes, size), size), size)

    def zeros(self) -> Runs:
        """Unread frames that are zero in the revision."""
        size = self.image.size
        return Runs(gaps(union(self.listed, self.image.extents(), size), size), size)

    def has(self, number: int, zero: bool) -> bool:
        """Whether a frame was not read, and is zero (or not) in the revision."""
        offset = number * FRAME
        at = bisect_right(self.listed, Extent(offset, self.image.size))
        after = self.listed[at].offset if at < len(self.listed) else self.image.size
        before = self.listed[at - 1].end if at else 0
        unread = before <= offset < after
        return unread and (self.image.hashes(number, 1) == ZERO_HASH) == zero

    def compare(self, numbers: Sequence[int]) -> Sampled:
        """Read these frames, in ascending order, and compare them."""
        size, found = self.image.size, Sampled(frames=len(numbers))
        for extent in joined(Extent(n * FRAME, min(FRAME, size - n * FRAME)) for n in numbers):
            found.compared_bytes += extent.length
            data = memoryview(self.source.read(extent.offset, extent.length))
            for at in range(0, extent.length, FRAME):
                frame = data[at : at + FRAME]
                self._compare(Extent(extent.offset + at, len(frame)), frame, found)
        return found

    def _compare(self, extent: Extent, frame: memoryview, found: Sampled) -> None:
        """What differs is read once more: is the frame wrong, or is the source unstable?"""
        expected = self.image.hashes(extent.offset // FRAME, 1)
        if matches(frame, expected):
            return
        again = self.source.read(*extent)
        if matches(memoryview(again), expected):
            found.unstable += 1
            return
        found.wrong_frames += 1
        digest = blake3(again.ljust(FRAME, b"\0")).digest() if any(again) else ZERO_HASH
        found.wrong.append(Wrong(self.name, extent, expected.hex(), digest.hex(), again))


@dataclass(frozen=True, slots=True)
class _Draw:
    """The sample of one kind of frames of one disk."""

    disk: Believed
    zero: bool
    runs: Runs
    quota: int

    def batches(self, rng: random.Random) -> Iterator[tuple[float, Job[Sampled]]]:
        """How far the draw is (0..1) and a job, until the quota is met."""
        order, left = map(self.runs.__getitem__, shuffled(self.runs.span, rng)), self.quota
        while left > 0:
            numbers, drawn = self._next(order, min(left, FRAMES_BATCH))
            if not drawn:
                return
            yield 1 - left / self.quota, partial(self.disk.compare, numbers)
            left -= len(numbers)

    def _next(self, order: Iterator[int], count: int) -> tuple[list[int], int]:
        """The next `count` candidates, sorted (fewer after many draws); and how many draws."""
        numbers: list[int] = []
        drawn = 0
        for number in islice(order, DRAWS_BATCH):
            drawn += 1
            if self.disk.has(number, self.zero):
                numbers.append(number)
                if len(numbers) == count:
                    break
        return sorted(numbers), drawn


async def sample(disks: Sequence[Believed], sampling: Sampling, progress: Progress) -> Sampled:
    """Compare a sample of the frames of these disks that were not read with the source.

    SourceUnavailable; Corrupt when the hashes of a frame cannot be read.
    """
    draws = await trio.to_thread.run_sync(_draws, disks, sampling)
    found = Sampled()

    def add(batch: Sampled) -> None:
        found.add(batch)
        progress.advance(batch.compared_bytes)

    progress.start(Phase.SAMPLE, sum(draw.quota for draw in draws) * FRAME)
    await run_jobs(_in_time(_in_step(draws, sampling.rng), sampling, found), add)
    return found


def _draws(disks: Sequence[Believed], sampling: Sampling) -> list[_Draw]:
    draws = []
    for disk in disks:
        data, zeros = disk.data(), disk.zeros()
        quota = sampling.quota(data.frames)
        draws.append(_Draw(disk, False, data, quota))
        draws.append(_Draw(disk, True, zeros, sampling.quota(zeros.frames, quota)))
    return draws


def _in_step(draws: Sequence[_Draw], rng: random.Random) -> Iterator[Job[Sampled]]:
    """The jobs of all draws, merged so that all are equally far at any time."""
    streams = (draw.batches(rng) for draw in draws)
    return (job for _, job in heapq.merge(*streams, key=lambda item: item[0]))


def _in_time(
    jobs: Iterator[Job[Sampled]], sampling: Sampling, found: Sampled
) -> Iterator[Job[Sampled]]:
    """The jobs that come up within the time limit; one that is left out makes it a cut."""
    end = sampling.clock() + sampling.budget_s
    for job in jobs:
        if sampling.clock() >= end:
            found.cut = True
            return
        yield job
