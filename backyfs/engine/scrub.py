"""Scrub: over many short runs, reads every stored frame once, oldest revision first.

Where it was is kept (scrub_position.py), so that a run goes on where the last one
stopped, for whatever reason. Bad frames go into quarantine; nothing else is changed, and no writer
is waited for. Revisions that come or go between runs do no harm: what a later revision shares
with one that has been read is not read again in the same pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice

import trio

from backyfs.engine.clock import utc_now
from backyfs.engine.coverage import Share, shares
from backyfs.engine.pipeline import run_jobs
from backyfs.engine.plan import in_batches, size_of
from backyfs.engine.progress import QUIET, Phase, Progress
from backyfs.engine.scrub_position import Position, position, save
from backyfs.engine.verification import Checked, check_jobs
from backyfs.model import Extent
from backyfs.store.format import Damage
from backyfs.store.repository import Repository

SAVE_EVERY = 128
"""Batches of 2 MiB between two saves of the position."""


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """What one run did. `complete`: it reached the end of the pass; `damage`: by revision."""

    checked_bytes: int
    bad_frames: int
    complete: bool
    position: Position
    damage: dict[str, list[Damage]]


async def scrub(
    repository: Repository,
    budget_s: float | None = None,
    *,
    progress: Progress = QUIET,
    now: Callable[[], datetime] = utc_now,
) -> Scrubbed:
    """Go on with the present pass for `budget_s` seconds (None: to its end). Can be cancelled."""
    run = _Run(repository, await trio.to_thread.run_sync(position, repository), progress, now)
    deadline = None if budget_s is None else time.monotonic() + budget_s
    await run.go(deadline)
    return Scrubbed(
        run.checked_bytes,
        run.bad_frames,
        run.complete,
        run.position,
        await trio.to_thread.run_sync(repository.damage),
    )


class _Run:
    def __init__(
        self,
        repository: Repository,
        start: Position,
        progress: Progress,
        now: Callable[[], datetime],
    ) -> None:
        self._repository, self._progress, self._now = repository, progress, now
        self.position = start if start.seq >= 0 else replace(start, started=now())
        self.checked_bytes = self.bad_frames = 0
        self.complete = False

    async def go(self, deadline: float | None) -> None:
        """Read shares until the pass or the time is over."""
        self._progress.start(Phase.SCRUB, await trio.to_thread.run_sync(self._ahead))
        with closing(shares(self._repository, self._repository.revisions())) as row:
            while share := await trio.to_thread.run_sync(next, row, None):
                if not await self._share(share, deadline):
                    return
        self.complete = True
        self.position = Position(finished=self._now())
        await trio.to_thread.run_sync(save, self._repository, self.position)

    def _ahead(self) -> int:
        row = shares(self._repository, self._repository.revisions())
        return sum(size_of(self._left(share)) for share in row)

    def _left(self, share: Share) -> Iterator[Extent]:
        """The part of a share this pass has not read yet."""
        at, seq = self.position, share.record.seq
        names = list(share.record.disks)
        if seq < at.seq:
            return
        done = 0
        if seq == at.seq and at.disk in names:
            if names.index(share.disk) < names.index(at.disk):
                return
            done = at.offset if share.disk == at.disk else 0
        for extent in share.extents:
            if extent.end > done:
                start = max(extent.offset, done)
                yield Extent(start, extent.end - start)

    async def _share(self, share: Share, deadline: float | None) -> bool:
        """Read what is left of a share; whether there was time for all of it."""
        ahead = in_batches(self._left(share))
        while batches := list(islice(ahead, SAVE_EVERY)):
            read: list[Batch] = []
            await run_jobs(check_jobs(share, _until(batches, deadline, read)), self._took)
            if read:
                offset = read[-1][-1].end
                self.position = replace(
                    self.position, seq=share.record.seq, disk=share.disk, offset=offset
                )
                await trio.to_thread.run_sync(save, self._repository, self.position)
            if len(read) < len(batches):
                return False
        return True

    def _took(self, checked: Checked) -> None:
        self.checked_bytes += checked.length
        self.bad_frames += len(checked.bad)
        self._progress.advance(checked.length)


Batch = tuple[Extent, ...]


def _until(batches: list[Batch], deadline: float | None, read: list[Batch]) -> Iterator[Batch]:
    """The batches there is time for; they are noted in `read`."""
    for batch in batches:
        if deadline is not None and time.monotonic() >= deadline:
            return
        read.append(batch)
        yield batch
