"""Tags: why a revision is kept. Which are allowed, and how people change them later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from backyfs.config.schedule import MANUAL, Schedule
from backyfs.errors import UsageError
from backyfs.model import tag_name
from backyfs.store.record import Record, State
from backyfs.store.repository import Repository


def checked_tags(
    tags: Iterable[str], schedule: Schedule | None, *, force: bool = False
) -> tuple[str, ...]:
    """The tags, sorted, each once. UsageError for an impossible or (unless `force`) unknown one.

    Known are the tags of `schedule` (None or empty: any) and all that begin with "manual:".
    """
    checked = tuple(sorted({tag_name(tag) for tag in tags}))
    unknown = [t for t in checked if t not in (schedule or ()) and not t.startswith(MANUAL)]
    if schedule and unknown and not force:
        raise UsageError(
            f"not in the schedule: {', '.join(map(repr, unknown))}",
            hint=f"use {', '.join(schedule)}, or a name that begins with {MANUAL!r}, or --force",
        )
    return checked


def set_tags(
    repository: Repository,
    records: Sequence[Record],
    tags: Iterable[str],
    *,
    expect: Iterable[str] | None = None,
) -> list[State]:
    """Give the revisions exactly these tags; returns their new states.

    With `expect`, a revision whose tags are others by then is left alone: UsageError. So is one
    whose state is damaged: Corrupt.
    """
    new = tuple(sorted(set(tags)))
    return _change(repository, records, lambda old: new, expect)


def add_tags(
    repository: Repository,
    records: Sequence[Record],
    tags: Iterable[str],
    *,
    expect: Iterable[str] | None = None,
) -> list[State]:
    """Add tags to the revisions; otherwise as `set_tags`."""
    more = set(tags)
    return _change(repository, records, lambda old: tuple(sorted(more | set(old))), expect)


def remove_tags(
    repository: Repository,
    records: Sequence[Record],
    tags: Iterable[str],
    *,
    expect: Iterable[str] | None = None,
) -> list[State]:
    """Take tags from the revisions; otherwise as `set_tags`."""
    gone = set(tags)
    return _change(
        repository, records, lambda old: tuple(tag for tag in old if tag not in gone), expect
    )


def _change(
    repository: Repository,
    records: Sequence[Record],
    change: Callable[[tuple[str, ...]], tuple[str, ...]],
    expect: Iterable[str] | None,
) -> list[State]:
    wanted = None if expect is None else set(expect)

    def apply(state: State) -> State:
        if wanted is not None and set(state.tags) != wanted:
            raise UsageError(
                f"the tags are {', '.join(state.tags) or 'none'}, not {', '.join(sorted(wanted))}",
                hint="look at them again with: backyfs status",
            )
        return replace(state, tags=change(state.tags))

    return [repository.update_state(record.id, apply) for record in records]
