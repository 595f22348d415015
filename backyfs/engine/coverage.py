"""Which stored frames a row of revisions consists of, each once as far as the store can tell.

Revisions are taken oldest first, and each disk is compared with the same disk of the revision
before it in the row: neighbours share most of their frames.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from backyfs.errors import Corrupt, NoRevision
from backyfs.model import Extent
from backyfs.store.contract import SharingImage, StoredImage
from backyfs.store.record import Record
from backyfs.store.repository import Repository


@dataclass(frozen=True, slots=True)
class Share:
    """What one disk of a revision adds to the row: `extents` of `image` nobody before it had.

    `before` is the disk the extents were computed against; None: there is none, or it cannot
    tell. Both images are open until the next share is taken.
    """

    record: Record
    disk: str
    image: StoredImage
    before: StoredImage | None
    extents: list[Extent]


def shares(repository: Repository, records: Iterable[Record]) -> Generator[Share, None, None]:
    """What each disk of these revisions adds, in order of `seq`.

    Disks that cannot be opened are left out (the repository's damage names them), as are
    revisions that are removed meanwhile. Close the iterator, or exhaust it, to close the images.
    """
    with ExitStack() as opened:
        latest: dict[str, StoredImage] = {}
        opened.callback(_close, latest)
        for record in sorted(records, key=lambda record: record.seq):
            for name in record.disks:
                try:
                    image = repository.open_disk(record, name)
                except (Corrupt, NoRevision):
                    continue
                before = latest.get(name)
                latest[name] = image
                try:
                    yield _share(record, name, image, before)
                finally:
                    if before is not None:
                        before.close()


def _close(images: dict[str, StoredImage]) -> None:
    for image in images.values():
        image.close()


def _share(record: Record, name: str, image: StoredImage, before: StoredImage | None) -> Share:
    if before is None or not isinstance(image, SharingImage):
        return Share(record, name, image, None, list(image.extents()))
    return Share(record, name, image, before, list(image.unshared(before)))
