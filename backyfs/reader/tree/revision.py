"""A revision's directory: its files, by name and by leaf."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from backyfs.reader.catalog import Revision, Vm
from backyfs.reader.tree import inodes
from backyfs.reader.tree.files import File, ImageFile, RecordFile
from backyfs.reader.tree.node import Kind, Node, NoEntry

IMAGE_SUFFIX = ".img"
REVISION_JSON = "revision.json"


@dataclass(frozen=True, slots=True)
class RevisionDirectory:
    """One revision as files. `base` is the number of its section."""

    vm: Vm
    revision: Revision
    base: int

    def node(self, leaf: int, *, wait: bool) -> Node:
        """What a leaf looks like. NoEntry."""
        if leaf == inodes.REVISION_DIRECTORY:
            return self.itself()
        return self.file(leaf).node(self.base + leaf, wait=wait)

    def itself(self) -> Node:
        """The directory."""
        return Node(self.base, Kind.DIRECTORY, self.revision.time_ns, lasts=True)

    def child(self, leaf: int, name: str, *, wait: bool) -> Node:
        """The node of a name in directory `leaf`. NoEntry."""
        for known, found in self._names(leaf):
            if known == name:
                return self.node(found, wait=wait)
        raise NoEntry(f"no {name} here")

    def children(self, leaf: int, *, wait: bool) -> list[tuple[str, Node]]:
        """The names in directory `leaf` with their nodes. NoEntry."""
        return [(name, self.node(found, wait=wait)) for name, found in self._names(leaf)]

    def _names(self, leaf: int) -> Iterator[tuple[str, int]]:
        if leaf != inodes.REVISION_DIRECTORY:
            raise NoEntry(f"{self.base + leaf} is no directory")
        for index, name in enumerate(self.revision.record.disks, start=1):
            yield name + IMAGE_SUFFIX, index * inodes.DISK_LEAVES + inodes.IMAGE
        yield REVISION_JSON, inodes.REVISION_JSON

    def file(self, leaf: int) -> File:
        """The file at a leaf. NoEntry."""
        if leaf == inodes.REVISION_JSON:
            return RecordFile(self.vm, self.revision)
        disks = self.revision.record.disks
        index, rest = divmod(leaf, inodes.DISK_LEAVES)
        if 0 < index <= len(disks) and rest == inodes.IMAGE:
            return ImageFile(self.vm, self.revision, list(disks.values())[index - 1])
        raise NoEntry(f"{self.revision.record.id}: no file at leaf {leaf}")
