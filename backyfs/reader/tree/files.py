"""The files in a revision's part of the tree: what each looks like, and how it is opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from backyfs.errors import Corrupt, NoRevision
from backyfs.reader.catalog import Revision, Vm
from backyfs.reader.images import Lease, OpenImages, Text
from backyfs.reader.tree import document
from backyfs.reader.tree.node import Kind, Node, NoEntry, Opened
from backyfs.store.record import DiskRecord


class File(Protocol):
    """A regular file of a revision; cheap to make, so nobody keeps one."""

    def node(self, inode: int, *, wait: bool) -> Node:
        """What it looks like. BlockingIOError, see the package."""

    def open(self, node: Node, images: OpenImages, *, check: bool) -> Opened:
        """Open it; does input and output. NoEntry, Corrupt.

        `check`: verify every byte that is read, where the format leaves a choice.
        """


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


@dataclass(frozen=True, slots=True)
class ImageFile:
    """DISK.img: the bytes of a disk."""

    vm: Vm
    revision: Revision
    disk: DiskRecord

    def node(self, inode: int, *, wait: bool) -> Node:
        """It never changes."""
        size, data = self.disk.size, self.disk.data
        return Node(
            inode, Kind.FILE, self.revision.time_ns, size, data=data, lasts=True, name_lasts=True
        )

    def open(self, node: Node, images: OpenImages, *, check: bool) -> Opened:
        """A lease of the image."""
        suspect = bool(self.vm.damage(self.revision.record))
        lease = self._lease(images, check or suspect)
        return Opened(node, lease.image, lease.close, suspect)

    def _lease(self, images: OpenImages, check: bool) -> Lease:
        vm, record = self.vm, self.revision.record
        try:
            return images.open(vm.repository, record, self.disk.name, check=check)
        except (Corrupt, NoRevision) as exc:
            if vm.repository.layout.record(record.id).exists():
                raise
            raise NoEntry(f"{vm.name}: revision {record.id} was just removed") from exc
