"""A VM's directory: its revisions, and links to them by what people know: newest, tag, time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo

from backyfs.reader.catalog import Vm
from backyfs.reader.tree import at, inodes, revision
from backyfs.reader.tree.attributes import Attributes
from backyfs.reader.tree.files import File
from backyfs.reader.tree.inodes import Inodes
from backyfs.reader.tree.node import Kind, Node, NoEntry
from backyfs.reader.tree.section import Listing

LATEST, BY_TAG, AT = "latest", "by-tag", "at"
_TAG_PART = f"{BY_TAG}/"


@dataclass(frozen=True, slots=True)
class Clock:
    """What time it is, with a zone, and which zone people think in (None: the system's)."""

    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    zone: tzinfo | None = None


SYSTEM_CLOCK = Clock()


class _WithoutFiles:
    """A section without regular files and extended attributes."""

    __slots__ = ()

    def file(self, leaf: int) -> File:
        raise NoEntry(f"leaf {leaf} is no file")

    def attributes(self, leaf: int, *, wait: bool) -> Attributes:
        return {}


@dataclass(frozen=True, slots=True)
class VmSection(_WithoutFiles):
    """One VM as files: its directory, and in it `by-tag` and `at`."""

    vm: Vm
    inodes: Inodes
    clock: Clock

    def node(self, leaf: int, *, wait: bool) -> Node:
        """What a leaf looks like. NoEntry."""
        if leaf not in (inodes.DIRECTORY, inodes.BY_TAG, inodes.AT):
            raise NoEntry(f"{self.vm.name}: there is no leaf {leaf}")
        inode = self.inodes.base(self.vm.name, "") + leaf
        return Node(inode, Kind.DIRECTORY, self.vm.changed_ns)

    def child(self, leaf: int, name: str, *, wait: bool) -> Node:
        """The node of a name in directory `leaf`. NoEntry."""
        find = {
            inodes.DIRECTORY: self._in_directory,
            inodes.BY_TAG: self._in_by_tag,
            inodes.AT: self._in_at,
        }.get(leaf)
        found = find(name) if find else None
        if found is None:
            raise NoEntry(f"{self.vm.name}: no {name}")
        return found

    def _in_directory(self, name: str) -> Node | None:
        vm = self.vm
        found = vm.revisions.get(name)
        if found is not None:
            return revision.section(vm, found, self.inodes).directory()
        if vm.latest is None:
            return None
        if name == LATEST:
            return revision.section(vm, vm.latest, self.inodes).link(inodes.LINK)
        leaf = {BY_TAG: inodes.BY_TAG, AT: inodes.AT}.get(name)
        return None if leaf is None else self.node(leaf, wait=False)

    def _in_by_tag(self, name: str) -> Node | None:
        return self._tag(name) if name in self.vm.tagged else None

    def _in_at(self, name: str) -> Node | None:
        found = at.find(self.vm, name, self.clock.now(), self.clock.zone)
        if found is None:
            return None
        return revision.section(self.vm, found, self.inodes).link(inodes.LINK_UP)

    def children(self, leaf: int, *, wait: bool) -> Listing:
        """The names in directory `leaf` with their nodes. NoEntry."""
        vm = self.vm
        if leaf == inodes.BY_TAG:
            return [(tag, self._tag(tag)) for tag in vm.tagged]
        if leaf == inodes.AT:
            return [
                (name, revision.section(vm, found, self.inodes).link(inodes.LINK_UP))
                for name, found in at.listing(vm, self.clock.now(), self.clock.zone)
            ]
        if leaf != inodes.DIRECTORY:
            raise NoEntry(f"{vm.name}: leaf {leaf} is no directory")
        listed: Listing = [
            (name, revision.section(vm, found, self.inodes).directory())
            for name, found in vm.revisions.items()
        ]
        if listed:
            listed += [(name, self.child(leaf, name, wait=wait)) for name in (AT, BY_TAG, LATEST)]
        return listed

    def _tag(self, tag: str) -> Node:
        return TagSection(self.vm, self.inodes, tag).node(inodes.DIRECTORY, wait=False)


@dataclass(frozen=True, slots=True)
class TagSection(_WithoutFiles):
    """by-tag/TAG: links to the revisions that have a tag."""

    vm: Vm
    inodes: Inodes
    tag: str

    def node(self, leaf: int, *, wait: bool) -> Node:
        """The directory; its links are leaves of their revisions. NoEntry."""
        if leaf != inodes.DIRECTORY or self.tag not in self.vm.tagged:
            raise NoEntry(f"{self.vm.name}: no tag {self.tag!r}")
        inode = self.inodes.base(self.vm.name, _TAG_PART + self.tag)
        return Node(inode, Kind.DIRECTORY, self.vm.changed_ns)

    def child(self, leaf: int, name: str, *, wait: bool) -> Node:
        """The link to a revision. NoEntry."""
        found = self.vm.revisions.get(name)
        if leaf != inodes.DIRECTORY or found is None or self.tag not in found.state.tags:
            raise NoEntry(f"{self.vm.name}: no {name} with tag {self.tag!r}")
        return revision.section(self.vm, found, self.inodes).link(inodes.LINK_UP_UP)

    def children(self, leaf: int, *, wait: bool) -> Listing:
        """The links to all of them. NoEntry."""
        self.node(leaf, wait=wait)
        return [
            (
                found.record.id,
                revision.section(self.vm, found, self.inodes).link(inodes.LINK_UP_UP),
            )
            for found in self.vm.tagged[self.tag]
        ]


def directory(name: str, changed_ns: int, numbers: Inodes) -> Node:
    """The directory of a VM of which no more is known."""
    return Node(numbers.base(name, ""), Kind.DIRECTORY, changed_ns)


def tag_of(part: str) -> str | None:
    """The tag whose directory is this part of a VM's tree; None when it is another part."""
    return part.removeprefix(_TAG_PART) if part.startswith(_TAG_PART) else None


def has(vm: Vm, part: str) -> bool:
    """Whether a VM's tree has such a part."""
    tag = tag_of(part)
    return not part or (part in vm.revisions if tag is None else tag in vm.tagged)
