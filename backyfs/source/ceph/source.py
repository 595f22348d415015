"""The source: the images of a VM, and a session with their cluster for one backup.

What stays at the images: one snapshot per repository, that of its newest revision. A backup that
fails takes its own snapshots back; what one leaves that was killed, or that the cluster does not
let go, goes when the next backup is published. Snapshots of other names are never touched.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from uuid import UUID

from backyfs.ceph.cluster import Cluster, connected
from backyfs.ceph.failure import timed_out
from backyfs.errors import BackyfsError
from backyfs.source.ceph.config import Config, read_config
from backyfs.source.ceph.heads import Head, Take, opened, take
from backyfs.source.ceph.points import Kind, Point, Snap, point_of, prefix, revision_of
from backyfs.source.ceph.snapshot import CephDisk, CephSnapshot
from backyfs.source.contract import Backups, Bookmark

log = logging.getLogger(__name__)

TYPE = "ceph-rbd"

_NOBODY = Backups(UUID(int=0), ())


class CephSource:
    """The RBD images of one VM, by disk name. `take` makes the snapshots."""

    def __init__(self, config: Config, *, kind: str = TYPE, take: Take = take) -> None:
        self.type = kind
        self._config, self._take = config, take

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> CephSource:
        """The source a job's `source` section describes (without `type`); ConfigError."""
        return cls(read_config(settings))

    def disks(self) -> Sequence[str]:
        """Names of the disks; SourceUnavailable unless each image can be opened."""
        images = self._config.images
        with connected(self._config.cluster) as cluster, opened(cluster, images, read_only=True):
            return tuple(images)

    @contextlib.contextmanager
    def session(self, backups: Backups) -> Iterator[CephSession]:
        """Connected, with all images open."""
        images = self._config.images
        with connected(self._config.cluster) as cluster, contextlib.ExitStack() as stack:
            heads = stack.enter_context(opened(cluster, images))
            yield CephSession(self, self._config, self._take, cluster, heads, backups, stack.close)

    @contextlib.contextmanager
    def snapshot(self, revision: str, since: Mapping[str, Bookmark]) -> Iterator[CephSnapshot]:
        """A snapshot for no repository: it leaves nothing behind."""
        with self.session(_NOBODY) as session, session.snapshot(revision, since) as snapshot:
            yield snapshot


class CephSession:
    """The source at work for one backup of a repository."""

    def __init__(
        self,
        source: CephSource,
        config: Config,
        take: Take,
        cluster: Cluster,
        heads: Mapping[str, Head],
        backups: Backups,
        close_heads: Callable[[], None],
    ) -> None:
        self.type = source.type
        self._images = config.images
        self._take, self._cluster, self._heads = take, cluster, heads
        self._close_heads = close_heads
        self._keeps = backups is not _NOBODY and not config.full_always
        self._prefix = prefix(backups.repository)
        self._snaps = {disk: head.snaps() for disk, head in heads.items()}
        self._kept = ""
        self._warn_of_a_copy(backups)

    def _warn_of_a_copy(self, backups: Backups) -> None:
        """Tell of a copy of the repository that backs up, too, and removes our snapshots.

        What a killed backup left is of no revision either, but leaves ours in place.
        """
        for disk, snaps in self._snaps.items():
            taken_for = {revision_of(s.name, self._prefix) for s in snaps if s.kind is Kind.USER}
            taken_for.discard(None)
            if taken_for and backups.revisions and taken_for.isdisjoint(backups.revisions):
                values = {
                    "image": str(self._images[disk]),
                    "revisions": sorted(map(str, taken_for)),
                }
                log.warning("snapshots are of revisions unknown here: does a copy back up?", values)

    def disks(self) -> Sequence[str]:
        return tuple(self._images)

    def remembers(self, since: Mapping[str, Bookmark]) -> bool:
        """Whether the snapshots of these bookmarks are there."""
        disks = since.keys() & self._images.keys()
        return bool(disks) and all(self._base(disk, since[disk]) for disk in disks)

    def _base(self, disk: str, bookmark: Bookmark | None) -> Point | None:
        """The snapshot a bookmark speaks of, if it is there and one of this image."""
        point = point_of(bookmark)
        if point is None or not self._keeps or point.snap not in self._snaps[disk]:
            return None
        return point if point.same_image(self._heads[disk].point(point.snap)) else None

    @contextlib.contextmanager
    def snapshot(self, revision: str, since: Mapping[str, Bookmark]) -> Iterator[CephSnapshot]:
        """A snapshot of all images, taken on entering; what else is to be done comes later."""
        name = self._prefix + revision
        bases = {disk: self._base(disk, since.get(disk)) for disk in self._images}
        with self._taken_back(name), contextlib.ExitStack() as stack:
            taken = self._take(self._heads, name)

            def disks() -> dict[str, CephDisk]:
                self._tell(since, bases)
                self._close_heads()  # whoever starts the VM now need not ask us for its lock
                return {
                    disk: stack.enter_context(CephDisk.opened(head, name, bases[disk]))
                    for disk, head in self._heads.items()
                }

            yield CephSnapshot(taken, disks, lambda: self._published(name))

    def _tell(self, since: Mapping[str, Bookmark], bases: Mapping[str, Point | None]) -> None:
        """Say why an image is read whole although there was a backup."""
        for disk, base in bases.items():
            point = point_of(since.get(disk))
            if point is None or base is not None or not self._keeps:
                continue
            values = {"image": str(self._images[disk]), "snapshot": point.snapshot}
            if point.same_image(self._heads[disk].point(point.snap)):
                log.warning("the last backup's snapshot is gone: the image is read whole", values)
            else:
                log.warning("the image is not that of the last backup: it is read whole", values)

    @contextlib.contextmanager
    def _taken_back(self, name: str) -> Iterator[None]:
        """Unless it was published, remove a snapshot in the end; not from a cluster that hangs."""
        try:
            yield
        except BaseException as exc:
            if not timed_out(exc) and self._kept != name:
                self._remove(lambda snap: snap.name == name)
            raise
        if self._kept != name:
            self._remove(lambda snap: snap.name == name)

    def _published(self, name: str) -> None:
        """Keep this snapshot, and none but this, of those that are ours."""
        if self._keeps:
            self._kept = name
        self._remove(lambda snap: snap.name != name and self._is_ours(snap))

    def _is_ours(self, snap: Snap) -> bool:
        return snap.kind is not Kind.OTHER and revision_of(snap.name, self._prefix) is not None

    def _remove(self, which: Callable[[Snap], bool]) -> None:
        """Remove snapshots of each image; what cannot be removed now is for another time."""
        for disk, spec in self._images.items():
            try:
                with opened(self._cluster, {disk: spec}) as heads:
                    heads[disk].remove([snap for snap in heads[disk].snaps() if which(snap)])
            except BackyfsError as exc:
                log.warning("snapshots stay for now", {"image": str(spec), "reason": exc.message})
                if timed_out(exc):
                    return
