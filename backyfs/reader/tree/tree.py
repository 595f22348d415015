"""The whole tree, by inode number: finds the section, and asks that."""

from __future__ import annotations

from backyfs.errors import NoRepository, Unsupported
from backyfs.reader.catalog import Catalog, Vm
from backyfs.reader.images import OpenImages
from backyfs.reader.tree import inodes, vm
from backyfs.reader.tree.inodes import Inodes
from backyfs.reader.tree.node import ROOT, Kind, Node, NoEntry, Opened
from backyfs.reader.tree.revision import REVISION_JSON, RevisionDirectory
from backyfs.reader.tree.vm import VmDirectory


class Tree:
    """The files of a catalog; `images` opens what is read.

    `check`: verify every byte that is read, of cow revisions too. Where damage is known, this is
    done anyhow.
    """

    def __init__(self, catalog: Catalog, images: OpenImages, *, check: bool = False) -> None:
        self.catalog, self.images, self._check = catalog, images, check
        self._inodes = Inodes()
        self._shown: dict[str, int] = {}

    def node(self, inode: int, *, wait: bool = True) -> Node:
        """What an inode number stands for. NoEntry when it is gone."""
        if inode == ROOT:
            times = self.catalog.names(wait=wait).values()
            return Node(ROOT, Kind.DIRECTORY, max(times, default=0))
        (name, part), leaf = self._inodes.find(inode)
        if not part:
            return self._vm(name, wait).node(leaf)
        lasting = leaf != inodes.REVISION_JSON
        return self._revision(name, part, wait, any_age=lasting).node(leaf, wait=wait)

    def child(self, inode: int, name: str, *, wait: bool = True) -> Node:
        """The node of a name in a directory. NoEntry."""
        if inode == ROOT:
            return vm.directory(name, self._names_changed(name, wait), self._inodes)
        (vm_name, part), leaf = self._inodes.find(inode)
        if not part:
            return self._vm(vm_name, wait).child(leaf, name)
        lasting = name != REVISION_JSON
        return self._revision(vm_name, part, wait, any_age=lasting).child(leaf, name, wait=wait)

    def children(self, inode: int, *, wait: bool = True) -> list[tuple[str, Node]]:
        """The names in a directory with their nodes. NoEntry."""
        if inode == ROOT:
            names = self.catalog.names(wait=wait)
            return [(name, vm.directory(name, time, self._inodes)) for name, time in names.items()]
        (vm_name, part), leaf = self._inodes.find(inode)
        if not part:
            return list(self._vm(vm_name, wait).children(leaf))
        return self._revision(vm_name, part, wait).children(leaf, wait=wait)

    def open(self, inode: int) -> Opened:
        """Open a file for reading; does input and output. NoEntry, Corrupt."""
        (name, part), leaf = self._inodes.find(inode)
        file = self._revision(name, part, wait=True).file(leaf)
        return file.open(file.node(inode, wait=True), self.images, check=self._check)

    # The views

    def _names_changed(self, name: str, wait: bool) -> int:
        changed = self.catalog.names(wait=wait).get(name)
        if changed is None:
            raise NoEntry(f"no VM {name!r}")
        return changed

    def _vm(self, name: str, wait: bool, *, any_age: bool = False) -> VmDirectory:
        return VmDirectory(self._view(name, wait, any_age), self._inodes)

    def _view(self, name: str, wait: bool, any_age: bool) -> Vm:
        try:
            view = self.catalog.vm(name, wait=wait, any_age=any_age)
        except Unsupported:
            raise
        except NoRepository as exc:
            self._inodes.keep(name, lambda part: False)
            self._shown.pop(name, None)
            raise NoEntry(exc.message) from exc
        if self._shown.get(name, 0) < view.serial:
            self._shown[name] = view.serial
            self._inodes.keep(name, lambda part: not part or part in view.revisions)
        return view

    def _revision(
        self, name: str, part: str, wait: bool, *, any_age: bool = False
    ) -> RevisionDirectory:
        directory = self._vm(name, wait, any_age=any_age)
        revision = directory.vm.revisions.get(part)
        if revision is None:
            raise NoEntry(f"{name}: no revision {part}")
        return directory.revision(revision)
