"""The files in a revision's part of the tree: what each looks like, and how it is opened."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from backyfs.errors import Corrupt, NoRevision
from backyfs.reader.catalog import Revision, Vm
from backyfs.reader.images import (
    DiskImage,
    OpenImages,
    SliceImage,
    Text,
    WritableImage,
    WritableSlice,
)
from backyfs.reader.scratch import ScratchViews
from backyfs.reader.shared import Lease
from backyfs.reader.tree import attributes, document
from backyfs.reader.tree.attributes import Attributes
from backyfs.reader.tree.node import Kind, Node, NoEntry, Opened
from backyfs.reader.tree.slices import Slice
from backyfs.store.record import DiskRecord, Record


class File(Protocol):
    """A regular file of a revision; cheap to make, so nobody keeps one."""

    def node(self, inode: int, *, wait: bool) -> Node:
        """What it looks like. BlockingIOError, see the package."""

    def open(self, node: Node, images: OpenImages, *, check: bool) -> Opened:
        """Open it; does input and output. NoEntry, Corrupt.

        `check`: verify every byte that is read, where the format leaves a choice.
        """

    def attributes(self) -> Attributes:
        """The extended attributes it has beside those of its revision."""


@dataclass(frozen=True, slots=True)
class RecordFile:
    """revision.json: what is known of a revision."""

    vm: Vm
    revision: Revision

    def node(self, inode: int, *, wait: bool) -> Node:
        """It changes with the state of the revision and with the damage that is known."""
        vm, revision = self.vm, self.revision
        size = document.size(vm, revision, wait)
        changed = max(revision.time_ns, revision.state_ns, vm.quarantine_ns)
        return Node(inode, Kind.FILE, changed, size, data=size, name_lasts=True)

    def open(self, node: Node, images: OpenImages, *, check: bool) -> Opened:
        """Its text, as it is now."""
        text = Text(document.content(self.vm, self.revision, node.size))
        return Opened(node, text, text.close)

    def attributes(self) -> Attributes:
        """None of its own."""
        return {}


@dataclass(frozen=True, slots=True)
class ImageFile:
    """DISK.img: the bytes of a disk."""

    vm: Vm
    revision: Revision
    disk: DiskRecord

    def node(self, inode: int, *, wait: bool) -> Node:
        """It never changes."""
        return _lasting(inode, self.revision, self.disk.size, self.disk.data)

    def open(self, node: Node, images: OpenImages, *, check: bool) -> Opened:
        """A lease of the image."""
        lease, suspect = _lease(self.vm, self.revision, self.disk, images, check)
        return Opened(node, lease.image, lease.close, suspect, _changed_ns(lease.image))

    def window(self, view: WritableImage) -> WritableImage:
        """Its part of a view of the disk: all of it."""
        return view

    def attributes(self) -> Attributes:
        """Which disk, and its digest."""
        return attributes.of_disk(self.disk)


@dataclass(frozen=True, slots=True)
class SliceFile:
    """partitions/N.img: the bytes of a partition."""

    vm: Vm
    revision: Revision
    slice: Slice

    def node(self, inode: int, *, wait: bool) -> Node:
        """It never changes.

        How much of it is data only the map would tell, and listing opens no map: it is said to
        have as much as its disk has, if that fits. Never less, for `tar --sparse` and others take
        a file without blocks for zeros.
        """
        size = self.slice.partition.length
        return _lasting(inode, self.revision, size, min(size, self.slice.disk.data))

    def open(self, node: Node, images: OpenImages, *, check: bool) -> Opened:
        """A lease of the image, which is shared with those who read all of it."""
        lease, suspect = _lease(self.vm, self.revision, self.slice.disk, images, check)
        partition = self.slice.partition
        image = SliceImage(lease.image, partition.start, partition.length)
        return Opened(node, image, lease.close, suspect, _changed_ns(lease.image))

    @property
    def disk(self) -> DiskRecord:
        """The disk it is a part of."""
        return self.slice.disk

    def window(self, view: WritableImage) -> WritableImage:
        """Its part of a view of the disk."""
        return WritableSlice(view, self.slice.partition.start, self.slice.partition.length)

    def attributes(self) -> Attributes:
        """Which partition of which disk, where it lies and what is in it."""
        return attributes.of_slice(self.slice.disk, self.slice.partition)


@dataclass(frozen=True, slots=True)
class ScratchFile:
    """DISK.rw.img, partitions/N.rw.img: what `file` shows, in a view that may be written to.

    All files of a disk are windows of one view.
    """

    file: ImageFile | SliceFile
    views: ScratchViews

    def node(self, inode: int, *, wait: bool) -> Node:
        """Its time is that of the last write."""
        file = self.file
        changed = self.views.changed_ns(file.vm.repository, file.revision.record, file.disk.name)
        return replace(
            file.node(inode, wait=wait),
            mtime_ns=max(file.revision.time_ns, changed),
            lasts=False,
            writable=True,
        )

    def open(self, node: Node, images: OpenImages, *, check: bool) -> Opened:
        """A lease of the view, which all share who open it."""
        file, record = self.file, self.file.revision.record
        check = check or bool(file.vm.damage(record))
        with _removed_meanwhile(file.vm, record):
            lease = self.views.open(images, file.vm.repository, record, file.disk.name, check=check)
        image = file.window(lease.image.overlay)
        return Opened(node, image, lease.close, writable=image)

    def attributes(self) -> Attributes:
        """Those of the file, but for the digest, which holds until it is written to."""
        return {name: text for name, text in self.file.attributes().items() if name != "digest"}


def _lasting(inode: int, revision: Revision, size: int, data: int) -> Node:
    return Node(inode, Kind.FILE, revision.time_ns, size, data=data, lasts=True, name_lasts=True)


def _lease(
    vm: Vm, revision: Revision, disk: DiskRecord, images: OpenImages, check: bool
) -> tuple[Lease[DiskImage], bool]:
    """A lease of a disk's image, and whether damage is known: then every byte is verified."""
    record = revision.record
    suspect = bool(vm.damage(record))
    with _removed_meanwhile(vm, record):
        return images.open(vm.repository, record, disk.name, check=check or suspect), suspect


def _changed_ns(image: DiskImage) -> int:
    fd = image.raw_fd()
    return 0 if fd is None else os.fstat(fd).st_ctime_ns


@contextlib.contextmanager
def _removed_meanwhile(vm: Vm, record: Record) -> Iterator[None]:
    """Turn the errors of opening a revision into NoEntry when it was removed just now."""
    try:
        yield
    except (Corrupt, NoRevision) as exc:
        if vm.repository.layout.record(record.id).exists():
            raise
        raise NoEntry(f"{vm.name}: revision {record.id} was just removed") from exc
