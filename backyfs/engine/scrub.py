"""Scrub: over many short runs, reads every stored frame once, oldest revision first.

Where it was is kept (scrub_position.py), so that a run goes on where the last one
stopped, for whatever reason. Bad frames go into quarantine; nothing else is changed, and no writer
is waited for. Revisions that come or go between runs do no harm: what a later revision shares
with one that has been read is not read again in the same pass. A store that is full or read-only
is read as well, but each run begins where the one before did.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice

import trio

from backyfs.engine.clock import utc_now
from backyfs.engine.coverage import Share, shares
from backyfs.engine.pipeline import run_jobs
from backyfs.engine.plan import in_batches, size_of
from backyfs.engine.progress import QUIET, Phase, Progress
from backyfs.engine.scrub_position import Position, note_damage, position, save
from backyfs.engine.verification import (
    Checked,
    Findings,
    check_jobs,
    damage_at,
    inherited,
    is_new,
)
from backyfs.errors import NoSpace
from backyfs.model import Extent
from backyfs.store.format import Damage
from backyfs.store.fs import why_unwritten
from backyfs.store.repository import Repository

SAVE_EVERY = 128
"""Batches of 2 MiB between two saves of the position."""


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """What one run did. `complete`: it reached the end of the pass; `damage`: by revision.

    `unrecorded`: why the store does not know of all this, or "".
    """

    checked_bytes: int
    bad_frames: int
    complete: bool
    position: Position
    damage: dict[str, list[Damage]]
    unrecorded: str = ""


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
    damage = await trio.to_thread.run_sync(_damage, repository, run.found)
    await trio.to_thread.run_sync(run.note, damage)
    return Scrubbed(
        run.checked_bytes,
        run.bad_frames,
        run.complete,
        run.position,
        damage,
        run.unsaved or repository.quarantine.refused,
    )


def _damage(repository: Repository, found: Findings) -> dict[str, list[Damage]]:
    """What the repository knows, and what was found that could not be recorded."""
    damage = repository.damage()
    for record in repository.revisions() if repository.quarantine.refused else ():
        known = damage.get(record.id, [])
        if new := [item for item in found[record.id] if is_new(item, known)]:
            damage[record.id] = known + new
    return damage


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
        self.found: Findings = defaultdict(list)
        self.unsaved = ""
        self._bad: defaultdict[str, set[int]] = defaultdict(set)  # by disk, of the latest revision

    async def go(self, deadline: float | None) -> None:
        """Read shares until the pass or the time is over."""
        self._progress.start(Phase.SCRUB, await trio.to_thread.run_sync(self._ahead))
        with closing(shares(self._repository, self._repository.revisions())) as row:
            while share := await trio.to_thread.run_sync(next, row, None):
                bad = await trio.to_thread.run_sync(inherited, share, self._bad[share.disk])
                in_time = await self._share(share, deadline, bad)
                self._bad[share.disk] = bad
                self.found[share.record.id] += damage_at(share, bad)
                if not in_time:
                    return
        self.complete = True
        self.position = Position(finished=self._now())
        await trio.to_thread.run_sync(self._save)

    def note(self, damage: dict[str, list[Damage]]) -> None:
        """Remember which revisions have damaged files: no others, as all were looked at."""
        before = dict.fromkeys(position(self._repository).damaged, ())
        with self._saving():
            note_damage(self._repository, {**before, **damage})

    def _save(self) -> None:
        """Remember the position."""
        with self._saving():
            save(self._repository, self.position)
            self.unsaved = ""

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Where it cannot be done, only remember why."""
        try:
            yield
        except (OSError, NoSpace) as exc:
            self.unsaved = why_unwritten(exc)

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

    async def _share(self, share: Share, deadline: float | None, bad: set[int]) -> bool:
        """Read what is left of a share, add to its `bad` frames; whether there was time for all."""

        def took(checked: Checked) -> None:
            self.checked_bytes += checked.length
            self.bad_frames += len(checked.bad)
            bad.update(checked.bad)
            self._progress.advance(checked.length)

        ahead = in_batches(self._left(share))
        while batches := list(islice(ahead, SAVE_EVERY)):
            read: list[Batch] = []
            await run_jobs(check_jobs(share, _until(batches, deadline, read)), took)
            if read:
                offset = read[-1][-1].end
                self.position = replace(
                    self.position, seq=share.record.seq, disk=share.disk, offset=offset
                )
                await trio.to_thread.run_sync(self._save)
            if len(read) < len(batches):
                return False
        return True


Batch = tuple[Extent, ...]


def _until(batches: list[Batch], deadline: float | None, read: list[Batch]) -> Iterator[Batch]:
    """The batches there is time for; they are noted in `read`."""
    for batch in batches:
        if deadline is not None and time.monotonic() >= deadline:
            return
        read.append(batch)
        yield batch
