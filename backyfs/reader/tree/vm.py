"""A VM's directory: its revisions, and the link to the newest one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from backyfs.reader.catalog import Revision, Vm
from backyfs.reader.tree import inodes
from backyfs.reader.tree.inodes import Inodes
from backyfs.reader.tree.node import Kind, Node, NoEntry
from backyfs.reader.tree.revision import RevisionDirectory

LATEST = "latest"


@dataclass(frozen=True, slots=True)
class VmDirectory:
    """One VM as files."""

    vm: Vm
    inodes: Inodes

    def node(self, leaf: int) -> Node:
        """What a leaf looks like. NoEntry."""
        if leaf == inodes.LATEST:
            return self._latest()
        return directory(self.vm.name, self.vm.changed_ns, self.inodes)

    def child(self, leaf: int, name: str) -> Node:
        """The node of a name in directory `leaf`. NoEntry."""
        self._must_be_directory(leaf)
        if name == LATEST:
            return self._latest()
        revision = self.vm.revisions.get(name)
        if revision is None:
            raise NoEntry(f"{self.vm.name}: no {name}")
        return self.revision(revision).itself()

    def children(self, leaf: int) -> Iterator[tuple[str, Node]]:
        """The names in directory `leaf` with their nodes. NoEntry."""
        self._must_be_directory(leaf)
        if self.vm.revisions:
            yield LATEST, self._latest()
        for name, revision in self.vm.revisions.items():
            yield name, self.revision(revision).itself()

    def revision(self, revision: Revision) -> RevisionDirectory:
        """A revision of the VM as files."""
        base = self.inodes.base(self.vm.name, revision.record.id)
        return RevisionDirectory(self.vm, revision, base)

    def _must_be_directory(self, leaf: int) -> None:
        if leaf != inodes.VM_DIRECTORY:
            raise NoEntry(f"{self.vm.name}: leaf {leaf} is no directory")

    def _latest(self) -> Node:
        newest = self.vm.latest
        if newest is None:
            raise NoEntry(f"{self.vm.name}: no revision yet")
        target = newest.record.id
        inode = self.inodes.base(self.vm.name, "") + inodes.LATEST
        return Node(inode, Kind.LINK, newest.time_ns, size=len(target), target=target)


def directory(name: str, changed_ns: int, inodes: Inodes) -> Node:
    """The directory of a VM of which no more is known."""
    return Node(inodes.base(name, ""), Kind.DIRECTORY, changed_ns)
