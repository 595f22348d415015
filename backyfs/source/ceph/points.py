"""Points in time of an image: what a bookmark records of a snapshot, and which snapshots are ours.

The name of a snapshot says which repository it belongs to and which revision was made of it:
`backy-1f0c9a3e-20261121T220112Z-7f3a`. All others are somebody else's.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple
from uuid import UUID

from backyfs.ceph.spec import snapshot_name
from backyfs.model import is_revision_id
from backyfs.source.contract import Bookmark


class Kind(StrEnum):
    """Whose a snapshot is: somebody's who made it, nobody's any more, or of a group or mirror.

    Ceph moves a snapshot to its trash before it removes it: one is left there when whoever
    removes it dies, or (then it cannot be removed) as long as it has clones.
    """

    USER = "user"
    TRASH = "trash"
    OTHER = "other"


class Snap(NamedTuple):
    """A snapshot of an image: `id` is unique in its pool and grows with time, `size` is in bytes.

    `name` of one in the trash is that which it had.
    """

    name: str
    id: int
    size: int
    kind: Kind = Kind.USER


class Point(NamedTuple):
    """A snapshot, and all that tells it from any other of the same name.

    `fsid` is the cluster's. `image_id` stays when an image is renamed, and is another one when
    it was made anew. `pool_id`, likewise. Names of pool and image are for people.
    """

    fsid: str
    pool: str
    pool_id: int
    namespace: str
    image: str
    image_id: str
    snapshot: str
    snapshot_id: int
    size: int

    def same_image(self, other: Point) -> bool:
        """Whether both are of one image, whatever it is called."""
        return self._identity() == other._identity()

    def _identity(self) -> tuple[str, int, str, str]:
        return self.fsid, self.pool_id, self.namespace, self.image_id

    @property
    def snap(self) -> Snap:
        """The snapshot as the image lists it."""
        return Snap(self.snapshot, self.snapshot_id, self.size)


def point_of(bookmark: Bookmark | None) -> Point | None:
    """What a bookmark says; None when it is none of ours."""
    if bookmark is None or bookmark.keys() != set(Point._fields):
        return None
    point = Point(**bookmark)
    kinds = (str, str, int, str, str, str, str, int, int)
    right = all(type(value) is kind for value, kind in zip(point, kinds, strict=True))
    return point if right else None


def prefix(repository: UUID) -> str:
    """What the names of a repository's snapshots begin with."""
    return snapshot_name(repository, "")


def revision_of(name: str, prefix: str) -> str | None:
    """The revision that a snapshot of the repository was taken for; None: it is not ours."""
    revision = name.removeprefix(prefix)
    return revision if name.startswith(prefix) and is_revision_id(revision) else None


def snaps(image: Any) -> list[Snap]:
    """All snapshots of an open image, oldest first."""
    return sorted(map(_snap, image.list_snaps()), key=lambda snap: snap.id)


def _snap(entry: Mapping[str, Any]) -> Snap:
    import rbd

    name, namespace = entry["name"], entry["namespace"]
    if namespace == rbd.RBD_SNAP_NAMESPACE_TYPE_TRASH:
        return Snap(entry["trash"]["original_name"], entry["id"], entry["size"], Kind.TRASH)
    kind = Kind.USER if namespace == rbd.RBD_SNAP_NAMESPACE_TYPE_USER else Kind.OTHER
    return Snap(name, entry["id"], entry["size"], kind)
