"""A revision's directory: its files, by name and by leaf, and the links that lead to it."""

from __future__ import annotations

from dataclasses import dataclass

from backyfs.reader.catalog import Revision, Vm
from backyfs.reader.scratch import ScratchViews
from backyfs.reader.tree import attributes, inodes, slices
from backyfs.reader.tree.attributes import Attributes
from backyfs.reader.tree.files import File, ImageFile, RecordFile, ScratchFile, SliceFile
from backyfs.reader.tree.inodes import Inodes
from backyfs.reader.tree.node import Kind, Node, NoEntry
from backyfs.reader.tree.section import Listing

IMAGE_SUFFIX = ".img"
REVISION_JSON = "revision.json"
PARTITIONS = "partitions"
SCRATCH_SUFFIX = ".rw.img"

_UP = {inodes.LINK: "", inodes.LINK_UP: "../", inodes.LINK_UP_UP: "../../"}
_DIRECTORIES = (inodes.DIRECTORY, inodes.PARTITIONS)


@dataclass(frozen=True, slots=True)
class RevisionSection:
    """One revision as files. `base` is the number of its section; `views` makes writable ones."""

    vm: Vm
    revision: Revision
    base: int
    views: ScratchViews | None = None

    def node(self, leaf: int, *, wait: bool) -> Node:
        """What a leaf looks like. NoEntry."""
        if leaf == inodes.DIRECTORY:
            return self.directory()
        if leaf == inodes.PARTITIONS:
            return Node(
                self.base + leaf,
                Kind.DIRECTORY,
                self.revision.time_ns,
                lasts=True,
                name_lasts=True,
            )
        if leaf in _UP:
            return self.link(leaf)
        return self.file(leaf).node(self.base + leaf, wait=wait)

    def directory(self) -> Node:
        """The directory."""
        return Node(self.base, Kind.DIRECTORY, self.revision.time_ns, lasts=True)

    def link(self, leaf: int) -> Node:
        """The link to it from the VM's directory, or from one or two levels below that."""
        target = _UP[leaf] + self.revision.record.id
        return Node(
            self.base + leaf,
            Kind.LINK,
            self.revision.time_ns,
            size=len(target),
            target=target,
            lasts=True,
        )

    def child(self, leaf: int, name: str, *, wait: bool) -> Node:
        """The node of a name in directory `leaf`. NoEntry."""
        found = self._names(leaf, every=True).get(name)
        if found is None:
            raise NoEntry(f"no {name} here")
        return self.node(found, wait=wait)

    def children(self, leaf: int, *, wait: bool) -> Listing:
        """The names in directory `leaf` with their nodes. NoEntry."""
        return [(name, self.node(found, wait=wait)) for name, found in self._names(leaf).items()]

    def _names(self, leaf: int, *, every: bool = False) -> dict[str, int]:
        """The leaves in directory `leaf` by name. `every`: those, too, that are not listed."""
        found = self._read_only(leaf, every)
        if self.views is None:
            return found
        # A disk may have the name of another one's view.
        return found | {name: at for name, at in _writable(found).items() if name not in found}

    def _read_only(self, leaf: int, every: bool) -> dict[str, int]:
        record = self.revision.record
        if leaf == inodes.PARTITIONS:
            pieces = slices.of(record)
            many = len(record.disks) > 1
            short = {} if many else {piece.short: piece.leaf for piece in pieces}
            return short | {piece.long: piece.leaf for piece in pieces if many or every}
        if leaf != inodes.DIRECTORY:
            raise NoEntry(f"{self.base + leaf} is no directory")
        found = {
            name + IMAGE_SUFFIX: index * inodes.DISK_LEAVES + inodes.IMAGE
            for index, name in enumerate(record.disks, start=1)
        }
        if slices.any_of(record):
            found[PARTITIONS] = inodes.PARTITIONS
        found[REVISION_JSON] = inodes.REVISION_JSON
        return found

    def file(self, leaf: int) -> File:
        """The file at a leaf. NoEntry."""
        if leaf & inodes.SCRATCH and self.views is not None:
            return ScratchFile(self._image(leaf ^ inodes.SCRATCH), self.views)
        if leaf == inodes.REVISION_JSON:
            return RecordFile(self.vm, self.revision)
        return self._image(leaf)

    def _image(self, leaf: int) -> ImageFile | SliceFile:
        disks = self.revision.record.disks
        index, rest = divmod(leaf, inodes.DISK_LEAVES)
        if 0 < index <= len(disks):
            if rest == inodes.IMAGE:
                return ImageFile(self.vm, self.revision, list(disks.values())[index - 1])
            for piece in slices.of(self.revision.record):
                if piece.leaf == leaf:
                    return SliceFile(self.vm, self.revision, piece)
        raise NoEntry(f"{self.revision.record.id}: no file at leaf {leaf}")

    def attributes(self, leaf: int, *, wait: bool) -> Attributes:
        """Those of the revision, on its directories and files, and what is the file's own."""
        if leaf in _UP:
            return {}
        own = {} if leaf in _DIRECTORIES else self.file(leaf).attributes()
        return attributes.of_revision(self.vm, self.revision, wait=wait) | own


def _writable(names: dict[str, int]) -> dict[str, int]:
    """The views of the images among `names`."""
    return {
        name.removesuffix(IMAGE_SUFFIX) + SCRATCH_SUFFIX: leaf | inodes.SCRATCH
        for name, leaf in names.items()
        if name.endswith(IMAGE_SUFFIX)
    }


def section(
    vm: Vm, revision: Revision, numbers: Inodes, views: ScratchViews | None = None
) -> RevisionSection:
    """A revision of a VM as files, with writable ones if there are `views`."""
    return RevisionSection(vm, revision, numbers.base(vm.name, revision.record.id), views)
