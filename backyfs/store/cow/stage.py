"""The disks of one revision in the making."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping

from backyfs.errors import Corrupt, Unsupported
from backyfs.model import Extent
from backyfs.store.contract import DiskWriter, StoredImage
from backyfs.store.cow.image import CowImage
from backyfs.store.cow.writer import CowDiskWriter
from backyfs.store.format import Place
from backyfs.store.record import DiskRecord, Record

log = logging.getLogger(__name__)


class CowStage:
    """Stage of the `cow` format. `notes`: what an operator should know of how it was written."""

    def __init__(
        self, place: Place, revision: str, parent: Record | None, extents_max: int
    ) -> None:
        self._place, self._revision, self._parent = place, revision, parent
        self._extents_max = extents_max
        self._writers: dict[str, CowDiskWriter] = {}
        self._images: dict[str, CowImage] = {}
        self._resources = contextlib.ExitStack()
        self.notes: list[str] = []

    @property
    def stored_bytes(self) -> int:
        return sum(writer.stored_bytes for writer in self._writers.values())

    def disk(self, name: str, size: int) -> DiskWriter:
        if name in self._writers:
            raise ValueError(f"disk {name} was started already")
        known = self._parent.disks.get(name) if self._parent else None
        parent = self._parent_image(known) if known else None
        path = self._place.layout.revisions / f"{self._revision}.{name}"
        writer = CowDiskWriter(
            self._place,
            path.with_name(f"{path.name}.img"),
            path.with_name(f"{path.name}.sum"),
            name,
            size,
            parent,
            lost=known is not None and parent is None,
            extents_max=self._extents_max,
            note=self._note,
        )
        self._resources.callback(writer.close)
        self._writers[name] = writer
        return writer

    def _parent_image(self, disk: DiskRecord) -> CowImage | None:
        assert self._parent is not None
        try:
            image = CowImage.open(self._place, self._parent.id, disk, check=True)
        except (Corrupt, Unsupported) as exc:
            self._note(f"disk {disk.name}: written as a fresh file, its parent is no use: {exc}")
            return None
        self._resources.callback(image.close)
        return image

    def _note(self, text: str) -> None:
        log.warning("%s", text)
        self.notes.append(text)

    def seal(self) -> None:
        made = [writer.seal() for writer in self._writers.values()]
        if any(made):
            self._place.fs.sync_dir(self._place.layout.revisions)
        for name, writer in self._writers.items():
            image = CowImage.open(
                self._place, self._revision, writer.sealed(), check=True, published=False
            )
            self._resources.callback(image.close)
            if image.table.problem:  # an old table is made the best of, a new one has to be right
                raise Corrupt(
                    image.table.problem, vm=self._place.name, revision=self._revision, disk=name
                )
            self._images[name] = image

    def image(self, name: str) -> StoredImage:
        return self._images[name]

    def written(self, name: str) -> list[Extent]:
        return self._writers[name].written()

    def files(self, name: str) -> Mapping[str, str]:
        return self._writers[name].sealed().files

    def close(self) -> None:
        self._resources.close()
