"""The images themselves, as opposed to their snapshots: where snapshots are made and removed."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from backyfs.ceph.cluster import Cluster
from backyfs.ceph.failure import explained
from backyfs.ceph.spec import ImageSpec
from backyfs.errors import SourceUnavailable
from backyfs.model import Consistency, Quiescing
from backyfs.source.ceph.points import Kind, Point, Snap, snaps

log = logging.getLogger(__name__)


class Head:
    """An open image, at no snapshot. `point` describes a snapshot of it."""

    def __init__(self, cluster: Cluster, spec: ImageSpec, image: Any) -> None:
        self.cluster, self.spec, self._image = cluster, spec, image
        with explained(f"look at {spec}", SourceUnavailable):
            self.id: str = image.id()

    def snaps(self) -> list[Snap]:
        """All its snapshots, oldest first, as they are now."""
        with explained(f"list the snapshots of {self.spec}", SourceUnavailable):
            return snaps(self._image)

    def point(self, snap: Snap) -> Point:
        """The snapshot, told from all others."""
        with explained(f"look at {self.spec}", SourceUnavailable):
            pool_id = self.cluster.rados.pool_lookup(self.spec.pool)
            fsid = self.cluster.rados.get_fsid()
        return Point(
            fsid,
            self.spec.pool,
            pool_id,
            self.spec.namespace,
            self.spec.image,
            self.id,
            snap.name,
            snap.id,
            snap.size,
        )

    def create(self, name: str) -> None:
        """Make a snapshot, unless it is there: the name is that of one revision only.

        A client that holds the image's lock and does not answer is waited for, for 30 s.
        """
        import rbd

        with (
            explained(f"make a snapshot of {self.spec}", SourceUnavailable),
            contextlib.suppress(rbd.ImageExists),
        ):
            self._image.create_snap(name)

    def remove(self, which: Collection[Snap]) -> None:
        """Remove snapshots, as far as they are there and nobody holds them.

        One in the trash that has clones goes by itself, with the last of them.
        """
        import rbd

        for snap in which:
            values = {"image": str(self.spec), "snapshot": snap.name}
            try:
                with explained(f"remove {self.spec}@{snap.name}", SourceUnavailable):
                    self._image.remove_snap_by_id(snap.id)
            except SourceUnavailable as exc:
                busy = isinstance(exc.__cause__, rbd.ImageBusy)
                if busy and snap.kind is Kind.USER:
                    log.warning("snapshot is protected or has clones, and stays", values)
                elif not busy and not isinstance(exc.__cause__, rbd.ImageNotFound):
                    raise


@contextlib.contextmanager
def opened(
    cluster: Cluster, specs: Mapping[str, ImageSpec], *, read_only: bool = False
) -> Iterator[dict[str, Head]]:
    """The images by disk name, while entered. SourceUnavailable names the one that is not there."""
    with contextlib.ExitStack() as stack:
        yield {
            name: Head(cluster, spec, stack.enter_context(cluster.image(spec, read_only=read_only)))
            for name, spec in specs.items()
        }


class Taken(NamedTuple):
    """What is known of snapshots that were taken: see `Snapshot` in the contract."""

    consistency: Consistency
    reason: str
    quiescing: Quiescing = Quiescing()


Take = Callable[[Mapping[str, Head], str], Taken]
"""Takes the snapshot of a name of all images, at one moment as nearly as possible."""


def take(heads: Mapping[str, Head], name: str) -> Taken:
    """Snapshots by ourselves. Crash: nobody asked the guest to flush."""
    started = time.monotonic()
    _in_threads([partial(head.create, name) for head in heads.values()])
    spread = f"s of {len(heads)} images" if len(heads) > 1 else ""
    seconds = time.monotonic() - started
    return Taken(Consistency.CRASH, f"RBD snapshot{spread}, taken within {seconds * 1000:.0f} ms")


def _in_threads(calls: Sequence[Callable[[], None]]) -> None:
    """Make all calls at once; raises the first error when all have ended."""
    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result()
