"""A snapshot of all images of a VM, and reading from it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

from backyfs.ceph.failure import explained
from backyfs.errors import SourceUnavailable
from backyfs.model import Consistency, Extent, Quiescing
from backyfs.source.ceph import diff
from backyfs.source.ceph.heads import Head, Taken
from backyfs.source.ceph.points import Point, Snap, snaps
from backyfs.source.contract import Bookmark, Changes

log = logging.getLogger(__name__)


class CephSnapshot:
    """All images at one moment. They are opened when first asked for."""

    frozen = True

    def __init__(
        self,
        taken: Taken,
        disks: Callable[[], Mapping[str, CephDisk]],
        published: Callable[[], None],
    ) -> None:
        self._taken, self._open, self._published = taken, disks, published

    @property
    def consistency(self) -> Consistency:
        """As whoever took the snapshots knows it."""
        return self._taken.consistency

    @property
    def reason(self) -> str:
        """How the snapshots were taken."""
        return self._taken.reason

    @property
    def quiescing(self) -> Quiescing:
        """What came of freezing the guest, if whoever took the snapshots does that."""
        return self._taken.quiescing

    @cached_property
    def disks(self) -> Mapping[str, CephDisk]:
        """By disk name; SourceUnavailable when one cannot be opened."""
        return self._open()

    def published(self) -> None:
        """Keep these snapshots, remove the older ones of the repository. Never fails."""
        self._published()


class CephDisk:
    """An image at a snapshot. Safe from many threads until closed."""

    def __init__(self, head: Head, image: Any, point: Point, base: Point | None) -> None:
        self._head, self._image, self._point, self._base = head, image, point, base
        self._what = f"{head.spec}@{point.snapshot}"
        with self._explained("look at"):
            self.size: int = image.size()
            self._snaps = snaps(image)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, head: Head, name: str, base: Point | None) -> Iterator[CephDisk]:
        """The image at its snapshot `name`, while entered; `base`: what changes are told since."""
        with _opened(head, name) as image:
            with explained(f"look at {head.spec}@{name}", SourceUnavailable):
                point = head.point(Snap(name, image.snap_get_id(name), image.size()))
            yield cls(head, image, point, base)

    def _explained(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return explained(f"{doing} {self._what}", SourceUnavailable)

    @property
    def bookmark(self) -> Bookmark:
        """The snapshot, which must still be there: what was read after it was removed is nothing.

        Asked for when all has been read. SourceUnavailable.
        """
        if not self._there(self._point):
            raise SourceUnavailable(
                f"the snapshot {self._what} was removed while it was read",
                hint="by a copy of this repository, which backs up, too? see: rbd snap ls",
            )
        return self._point._asdict()

    def _there(self, point: Point) -> bool:
        """Whether a snapshot is there now; an image open for reading does not hear of changes."""
        spec = self._head.spec
        with self._head.cluster.image(spec, read_only=True) as image, self._explained("look for"):
            return image.id() == point.image_id and point.snap in snaps(image)

    def data(self) -> Iterator[Extent]:
        """What may be non-zero."""
        with self._explained("list the data of"):
            yield from diff.data(self._image, fast=not self._doubts(None))

    def changed(self) -> Changes | None:
        """What may differ from the base snapshot; None: there is none (any more)."""
        base = self._base
        if base is None:
            return None
        with self._explained(f"tell the changes since {base.snapshot} of"):
            doubts = self._doubts(base.snap)
            extents = diff.changes(self._image, base.snapshot, fast=not doubts)
        if not self._there(base):
            return None
        values = {"image": str(self._head.spec), "extents": len(extents)}
        log.debug("changes", {**values, "fast": doubts or "yes"})
        return Changes(extents)

    def _doubts(self, base: Snap | None) -> str:
        return diff.doubts(self._image, base, self._point.snap, self._snaps)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; SourceUnavailable."""
        if not 0 <= offset <= offset + length <= self.size:
            raise ValueError(f"[{offset}, +{length}) is outside of {self.size} bytes")
        with self._explained("read"):
            data: bytes = self._image.read(offset, length)
        if len(data) != length:
            raise SourceUnavailable(
                f"cannot read {self._what} at byte {offset}: {len(data)} bytes instead of {length}"
            )
        return data


@contextlib.contextmanager
def _opened(head: Head, name: str) -> Iterator[Any]:
    """The image at a snapshot. One that is there and cannot be opened has no object map.

    That is how snapshots turn out that are made while the cluster is full.
    """
    import rbd

    with contextlib.ExitStack() as stack:
        try:
            image = stack.enter_context(
                head.cluster.image(head.spec, snapshot=name, read_only=True)
            )
        except SourceUnavailable as exc:
            if isinstance(exc.__cause__, rbd.ImageNotFound):
                raise SourceUnavailable(
                    f"the snapshot {head.spec}@{name} was made, and cannot be opened",
                    hint="its object map is missing: is the cluster full? see: ceph health detail",
                ) from exc
            raise
        yield image
