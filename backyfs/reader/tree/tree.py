"""The whole tree, by inode number: finds the section, and asks that."""

from __future__ import annotations

from collections.abc import Mapping

from backyfs.errors import NoRepository, Unsupported
from backyfs.reader.catalog import Catalog, Vm
from backyfs.reader.images import OpenImages
from backyfs.reader.scratch import ScratchViews
from backyfs.reader.tree import inodes, revision, vm
from backyfs.reader.tree.attributes import Attributes
from backyfs.reader.tree.inodes import Inodes
from backyfs.reader.tree.node import ROOT, Kind, Node, NoEntry, Opened
from backyfs.reader.tree.section import Listing, Section
from backyfs.reader.tree.vm import SYSTEM_CLOCK, Clock, TagSection, VmSection


class Tree:
    """The files of a catalog; `images` opens what is read.

    `check`: verify every byte that is read, of cow revisions too. Where damage is known, this is
    done anyhow. `views`: also show each image as a file that may be written to. `clock` is for the
    names of times in `at`.
    """

    def __init__(
        self,
        catalog: Catalog,
        images: OpenImages,
        *,
        check: bool = False,
        views: ScratchViews | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.catalog, self.images, self.views = catalog, images, views
        self._check, self._clock = check, clock
        self._inodes = Inodes()
        self._shown: dict[str, int] = {}
        self._names_seen: Mapping[str, int] = {}

    def node(self, inode: int, *, wait: bool = True) -> Node:
        """What an inode number stands for. NoEntry when it is gone."""
        if inode == ROOT:
            times = self._names(wait).values()
            return Node(ROOT, Kind.DIRECTORY, max(times, default=0))
        (name, part), leaf = self._inodes.find(inode)
        lasting = leaf != inodes.REVISION_JSON
        return self._section(name, part, wait, any_age=lasting).node(leaf, wait=wait)

    def child(self, inode: int, name: str, *, wait: bool = True) -> Node:
        """The node of a name in a directory. NoEntry."""
        if inode == ROOT:
            return vm.directory(name, self._changed_ns(name, wait), self._inodes)
        (vm_name, part), leaf = self._inodes.find(inode)
        lasting = name != revision.REVISION_JSON
        section = self._section(vm_name, part, wait, any_age=lasting)
        return section.child(leaf, name, wait=wait)

    def children(self, inode: int, *, wait: bool = True) -> Listing:
        """The names in a directory with their nodes. NoEntry."""
        if inode == ROOT:
            names = self._names(wait)
            return [(name, vm.directory(name, time, self._inodes)) for name, time in names.items()]
        (name, part), leaf = self._inodes.find(inode)
        return self._section(name, part, wait).children(leaf, wait=wait)

    def open(self, inode: int) -> Opened:
        """Open a file; does input and output. NoEntry, Corrupt, OSError."""
        (name, part), leaf = self._inodes.find(inode)
        file = self._section(name, part, wait=True).file(leaf)
        return file.open(file.node(inode, wait=True), self.images, check=self._check)

    def attributes(self, inode: int, *, wait: bool = True) -> Attributes:
        """The extended attributes of a node, as they are now. NoEntry."""
        if inode == ROOT:
            return {}
        (name, part), leaf = self._inodes.find(inode)
        return self._section(name, part, wait).attributes(leaf, wait=wait)

    # The views

    def _names(self, wait: bool) -> Mapping[str, int]:
        """All VMs' names; of those that are gone nothing is remembered."""
        names = self.catalog.names(wait=wait)
        if names is not self._names_seen:
            self._names_seen = names
            self._inodes.keep_vms(names)
            for name in [name for name in list(self._shown) if name not in names]:
                self._shown.pop(name, None)
        return names

    def _changed_ns(self, name: str, wait: bool) -> int:
        try:
            return self.catalog.changed_ns(name, wait=wait)
        except NoRepository as exc:
            raise NoEntry(exc.message) from exc

    def _section(self, name: str, part: str, wait: bool, *, any_age: bool = False) -> Section:
        """A part of a VM's tree. `any_age`: what is asked of a revision cannot have changed."""
        tag = vm.tag_of(part)
        of_revision = bool(part) and tag is None
        view = self._view(name, wait, any_age=any_age and of_revision)
        if tag is not None:
            return TagSection(view, self._inodes, tag)
        if not part:
            return VmSection(view, self._inodes, self._clock)
        found = view.revisions.get(part)
        if found is None:
            raise NoEntry(f"{name}: no revision {part}")
        return revision.section(view, found, self._inodes, self.views)

    def _view(self, name: str, wait: bool, *, any_age: bool) -> Vm:
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
            self._inodes.keep(name, lambda part: vm.has(view, part))
        return view
