"""What the scheduler knows of a VM's revisions. Pure.

Order is by number, never by time: clocks jump. Times are kept as steady times: a revision that
was seen keeps its age when the clock is set. Of one whose time is in the future when it is first
seen nobody knows how old it is: the next backup is due, and the SLA takes it for made just then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

FUTURE_S = 60.0
"""How far in the future a revision may be and count as made now: clocks are corrected a little."""

_LONG_AGO_S = 100 * 366 * 86_400.0

FAST_S = 600.0
"""A job whose newest backup took less is a fast one."""


@dataclass(frozen=True, slots=True)
class Revision:
    """A revision as the scheduler sees it.

    `time`: wall time of its start. `seconds`: how long the backup took. `good`: neither torn nor
    distrusted nor damaged. `relied`: not distrusted; a torn one is a backup, too, that need not be
    repeated before its time. `lasting`: distrusted, and verifying would not change that.
    """

    id: str
    time: float
    tags: tuple[str, ...]
    seconds: float
    good: bool = True
    relied: bool = True
    lasting: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """A revision and its steady time."""

    id: str
    at: float


@dataclass(frozen=True, slots=True)
class History:
    """The newest revision that can be relied on by tag, the newest good one, and the newest.

    `distrusted`: the id of the newest one that verifying may make trusted, or "".
    """

    newest: Mapping[str, Seen] = field(default_factory=dict)
    good: Seen | None = None
    last: Revision | None = None
    count: int = 0
    manual_tags: tuple[str, ...] = ()
    distrusted: str = ""

    @property
    def fast(self) -> bool:
        """Whether the next backup is expected to be a fast one."""
        return self.last is not None and self.last.seconds < FAST_S

    def wall(self, offset: float) -> dict[str, float]:
        """By tag, the wall time of the newest revision; `offset` = wall minus steady time now."""
        return {tag: seen.at + offset for tag, seen in self.newest.items()}


def observe(
    before: History, revisions: Sequence[Revision], *, steady: float, wall: float
) -> History:
    """The history after a look at all `revisions`, oldest first."""
    known = {seen.id: seen.at for seen in before.newest.values()}

    def seen(revision: Revision) -> Seen:
        at = known.get(revision.id)
        if at is None:
            future = revision.time > wall + FUTURE_S
            at = steady - (_LONG_AGO_S if future else max(0.0, wall - revision.time))
        return Seen(revision.id, at)

    newest: dict[str, Seen] = {}
    good: Seen | None = None
    tags: set[str] = set()
    distrusted = ""
    for revision in reversed(revisions):
        if not revision.relied:
            distrusted = distrusted or ("" if revision.lasting else revision.id)
        else:
            for tag in revision.tags:
                if tag not in newest:
                    newest[tag] = seen(revision)
        if good is None and revision.good:
            good = before.good
            if good is None or good.id != revision.id:
                good = Seen(revision.id, steady - max(0.0, wall - revision.time))
        tags.update(revision.tags)
    return History(
        newest,
        good,
        revisions[-1] if revisions else None,
        len(revisions),
        tuple(sorted(tag for tag in tags if tag.startswith("manual:"))),
        distrusted,
    )
