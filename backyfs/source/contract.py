"""The waist of the sources: one VM's disks at a point in time, and what changed since.

Synchronous and thread-safe; the engine calls it from worker threads. Every call is bounded in
time. Each source passes backyfs/testing/source.py (docs/plugins.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable
from uuid import UUID

from backyfs.model import Consistency, Extent, Quiescing

Bookmark = Mapping[str, Any]
"""What a source remembers of a snapshot, as JSON: opaque to all but that source."""


class Changes(NamedTuple):
    """Extents that may differ from a bookmark; what is not listed is certain to be equal.

    Sorted and disjoint. An extent may read as zeros (a discard is a change).
    """

    extents: Sequence[Extent]


class DiskSnapshot(Protocol):
    """One disk at a point in time."""

    @property
    def size(self) -> int:
        """Bytes; any value from 0 on."""

    @property
    def bookmark(self) -> Bookmark:
        """To be stored with the revision and given back as `since` by a later backup."""

    def data(self) -> Iterable[Extent]:
        """Sorted, disjoint extents that may be non-zero; the rest is certain to be zero."""

    def changed(self) -> Changes | None:
        """What may differ from the bookmark given as `since`; None = not known: read all.

        Never an empty guess.
        """

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; SourceUnavailable when they cannot be had. Many threads."""


class Snapshot(Protocol):
    """All disks of a VM at a point in time.

    One whose source freezes the guest itself may also have an attribute `quiescing` (Quiescing).
    """

    @property
    def consistency(self) -> Consistency:
        """What is known of the snapshot itself; the engine lowers it to torn on a mismatch."""

    @property
    def reason(self) -> str:
        """Why the consistency is what it is, in words for an operator."""

    @property
    def frozen(self) -> bool:
        """Whether the bytes are a point in time that nobody can change under the reader."""

    @property
    def disks(self) -> Mapping[str, DiskSnapshot]:
        """By disk name."""

    def published(self) -> None:
        """Called once the record is durable: only now may older base snapshots go."""


def quiescing(snapshot: Snapshot) -> Quiescing:
    """What came of freezing the guest: the snapshot's `quiescing`, which it need not have."""
    found = getattr(snapshot, "quiescing", None)
    return found if isinstance(found, Quiescing) else Quiescing()


class Source(Protocol):
    """Where the bytes of one VM come from."""

    @property
    def type(self) -> str:
        """The name of the source's type, as in the configuration: "file", "ceph-rbd"."""

    def disks(self) -> Sequence[str]:
        """Names of the disks; SourceUnavailable when the source is not there."""

    def snapshot(
        self, revision: str, since: Mapping[str, Bookmark]
    ) -> AbstractContextManager[Snapshot]:
        """Freeze, snapshot all disks, thaw; leaving the context gives temporary snapshots back.

        `since` holds, per disk, the bookmark of the parent revision (absent: none).
        """


class Backups(NamedTuple):
    """For whom a source works: a repository, and the ids of all revisions in it."""

    repository: UUID
    revisions: Collection[str]


@runtime_checkable
class Session(Source, Protocol):
    """A source that can tell what it remembers; usually the `session` of another one."""

    def remembers(self, since: Mapping[str, Bookmark]) -> bool:
        """Whether it can tell the changes since these bookmarks, for all disks still there.

        The engine asks for one revision after the other, the newest first; what `since` lacks is
        read whole anyway. False when there is nothing in it.
        """


@runtime_checkable
class SessionSource(Source, Protocol):
    """A source with something to prepare (a connection), or to leave behind (base snapshots)."""

    def session(self, backups: Backups) -> AbstractContextManager[Source]:
        """The source at work for one backup of this repository. SourceUnavailable.

        Entering does what may take long and should not be done in a frozen guest; leaving never
        fails.
        """


@contextlib.contextmanager
def session(source: Source, backups: Backups) -> Iterator[Source]:
    """The source for one backup: its own session, or itself if it has no such thing."""
    if isinstance(source, SessionSource):
        with source.session(backups) as opened:
            yield opened
    else:
        yield source
