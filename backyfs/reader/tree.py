"""What the catalog looks like as files (docs/design.md, section 6). Knows no FUSE.

    /<vm>/latest -> <revision>
    /<vm>/<revision>/<disk>.img
    /<vm>/<revision>/revision.json

A node is named by an inode number made from the VM, the section of its tree and a leaf within the
section; see Inodes. Nothing is remembered of single files: a node is computed when asked for.

Safe from many threads. With `wait=False` nothing does input or output: the answer is at hand, or
BlockingIOError asks the caller to come again from a thread that may block.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from backyfs.errors import Corrupt, NoRepository, NoRevision, Unsupported
from backyfs.reader.catalog import Catalog, Revision, Vm
from backyfs.reader.images import Lease, OpenImages, ReadableImage, Text
from backyfs.store.record import DiskRecord, Record, timestamp

IMAGE_SUFFIX = ".img"
LATEST = "latest"
REVISION_JSON = "revision.json"

ROOT = 1
"""The inode number of the root directory, as FUSE has it."""


class NoEntry(NoRevision):
    """There is no such file or directory in the tree (any more)."""


class Kind(Enum):
    """What a node is."""

    DIRECTORY = "directory"
    FILE = "file"
    LINK = "link"


@dataclass(frozen=True, slots=True)
class Node:
    """A file, directory or symbolic link.

    `size` and `data` (bytes that take space) are in bytes, `mtime_ns` is Unix time. `lasts`: no
    attribute of it will ever change. `name_lasts`: its name leads to it as long as its directory
    exists.
    """

    inode: int
    kind: Kind
    mtime_ns: int
    size: int = 0
    data: int = 0
    target: str = ""
    lasts: bool = False
    name_lasts: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """A file open for reading; `close` gives it back and never blocks.

    `suspect`: damage is known, so what was read of it before may not be kept.
    """

    node: Node
    image: ReadableImage
    close: Callable[[], None]
    suspect: bool = False


_LEAF_BITS = 16
_SECTION_BITS = 47
Section = tuple[str, str]
"""A VM's name and a part of its tree: "" (the VM's directory) or a revision id."""


class Inodes:
    """Inode numbers: a 47-bit hash of the section, then 16 bits for the leaf in it.

    The hash makes them the same in every mount of a store. Sections are remembered as long as
    their VM shows them, to find the way back and to give colliding ones another number.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sections: dict[int, Section] = {}
        self._numbers: dict[str, dict[str, int]] = {}

    def base(self, vm: str, part: str) -> int:
        """The number of a section's leaf 0; leaf n is `base + n`."""
        numbers = self._numbers.get(vm)
        number = numbers.get(part) if numbers is not None else None
        return self._add(vm, part) if number is None else number

    def _add(self, vm: str, part: str) -> int:
        text = f"{vm}/{part}".encode()
        hashed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        with self._lock:
            numbers = self._numbers.setdefault(vm, {})
            if part in numbers:
                return numbers[part]
            place = hashed % (1 << _SECTION_BITS)
            while place == 0 or (place << _LEAF_BITS) in self._sections:
                place = (place + 1) % (1 << _SECTION_BITS)
            number = place << _LEAF_BITS
            self._sections[number] = (vm, part)
            numbers[part] = number
            return number

    def find(self, inode: int) -> tuple[Section, int]:
        """The section and leaf of a number that was given out. NoEntry when it is gone."""
        leaf = inode & ((1 << _LEAF_BITS) - 1)
        section = self._sections.get(inode - leaf)
        if section is None:
            raise NoEntry(f"no file with number {inode}")
        return section, leaf

    def keep(self, vm: str, parts: Callable[[str], bool]) -> None:
        """Forget the sections of a VM for which `parts` is false."""
        with self._lock:
            numbers = self._numbers.get(vm, {})
            for part in [part for part in numbers if not parts(part)]:
                del self._sections[numbers.pop(part)]


# Leaves of a VM's section
_VM_DIRECTORY, _LATEST = 0, 1
# Leaves of a revision's section: below 256 its own, from 256 on 256 for each disk
_REVISION_DIRECTORY, _REVISION_JSON = 0, 1
_DISK_LEAVES = 256


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
            return Node(ROOT, Kind.DIRECTORY, _newest(self.catalog.names(wait=wait).values()))
        (name, part), leaf = self._inodes.find(inode)
        if not part:
            return self._vm_leaf(name, leaf, wait)
        lasting = leaf != _REVISION_JSON
        vm, revision = self._revision(name, part, wait, any_age=lasting)
        return self._revision_leaf(vm, revision, leaf, wait)

    def child(self, inode: int, name: str, *, wait: bool = True) -> Node:
        """The node of a name in a directory. NoEntry."""
        if inode == ROOT:
            return self._vm_directory(name, self._names_changed(name, wait))
        (vm_name, part), leaf = self._inodes.find(inode)
        if leaf == _VM_DIRECTORY and not part:
            return self._vm_child(self._vm(vm_name, wait), name)
        vm, revision = self._revision(vm_name, part, wait, any_age=name != REVISION_JSON)
        found = _leaf_of(revision.record, name)
        if found is None or leaf != _REVISION_DIRECTORY:
            raise NoEntry(f"no {name} here")
        return self._revision_leaf(vm, revision, found, wait)

    def children(self, inode: int, *, wait: bool = True) -> list[tuple[str, Node]]:
        """The names in a directory with their nodes. NoEntry."""
        if inode == ROOT:
            names = self.catalog.names(wait=wait)
            return [(name, self._vm_directory(name, time)) for name, time in names.items()]
        (vm_name, part), leaf = self._inodes.find(inode)
        if leaf != 0:
            raise NoEntry(f"{inode} is no directory")
        if not part:
            return list(self._vm_children(self._vm(vm_name, wait)))
        vm, revision = self._revision(vm_name, part, wait)
        return [
            (name, self._revision_leaf(vm, revision, found, wait))
            for name, found in _leaves(revision.record)
        ]

    def open(self, inode: int) -> Opened:
        """Open a file for reading; does input and output. NoEntry, Corrupt."""
        (name, part), leaf = self._inodes.find(inode)
        vm, revision = self._revision(name, part, wait=True)
        node = self._revision_leaf(vm, revision, leaf, wait=True)
        if node.kind is not Kind.FILE:
            raise NoEntry(f"{inode} is no file")
        if leaf == _REVISION_JSON:
            text = Text(_revision_json(vm, revision, node.size))
            return Opened(node, text, text.close)
        suspect = bool(vm.damage(revision.record))
        lease = self._lease(vm, revision.record, _disk(revision, leaf).name, suspect)
        return Opened(node, lease.image, lease.close, suspect)

    def _lease(self, vm: Vm, record: Record, disk: str, suspect: bool) -> Lease:
        try:
            return self.images.open(vm.repository, record, disk, check=self._check or suspect)
        except (Corrupt, NoRevision) as exc:
            if vm.repository.layout.record(record.id).exists():
                raise
            raise NoEntry(f"{vm.name}: revision {record.id} was just removed") from exc

    # The views

    def _names_changed(self, name: str, wait: bool) -> int:
        changed = self.catalog.names(wait=wait).get(name)
        if changed is None:
            raise NoEntry(f"no VM {name!r}")
        return changed

    def _vm(self, name: str, wait: bool, *, any_age: bool = False) -> Vm:
        try:
            vm = self.catalog.vm(name, wait=wait, any_age=any_age)
        except Unsupported:
            raise
        except NoRepository as exc:
            self._inodes.keep(name, lambda part: False)
            self._shown.pop(name, None)
            raise NoEntry(exc.message) from exc
        if self._shown.get(name, 0) < vm.serial:
            self._shown[name] = vm.serial
            self._inodes.keep(name, lambda part: not part or part in vm.revisions)
        return vm

    def _revision(
        self, name: str, part: str, wait: bool, *, any_age: bool = False
    ) -> tuple[Vm, Revision]:
        vm = self._vm(name, wait, any_age=any_age)
        revision = vm.revisions.get(part)
        if revision is None:
            raise NoEntry(f"{name}: no revision {part}")
        return vm, revision

    # The VM's directory

    def _vm_directory(self, name: str, changed_ns: int) -> Node:
        return Node(self._inodes.base(name, ""), Kind.DIRECTORY, changed_ns)

    def _vm_leaf(self, name: str, leaf: int, wait: bool) -> Node:
        vm = self._vm(name, wait)
        return self._latest(vm) if leaf == _LATEST else self._vm_directory(name, vm.changed_ns)

    def _vm_child(self, vm: Vm, name: str) -> Node:
        if name == LATEST:
            return self._latest(vm)
        revision = vm.revisions.get(name)
        if revision is None:
            raise NoEntry(f"{vm.name}: no {name}")
        return self._revision_directory(vm, revision)

    def _vm_children(self, vm: Vm) -> Iterator[tuple[str, Node]]:
        if vm.revisions:
            yield LATEST, self._latest(vm)
        for name, revision in vm.revisions.items():
            yield name, self._revision_directory(vm, revision)

    def _latest(self, vm: Vm) -> Node:
        newest = vm.latest
        if newest is None:
            raise NoEntry(f"{vm.name}: no revision yet")
        target = newest.record.id
        inode = self._inodes.base(vm.name, "") + _LATEST
        time = newest.time_ns
        return Node(inode, Kind.LINK, time, size=len(target), target=target)

    # A revision's directory

    def _revision_directory(self, vm: Vm, revision: Revision) -> Node:
        inode = self._inodes.base(vm.name, revision.record.id)
        return Node(inode, Kind.DIRECTORY, revision.time_ns, lasts=True)

    def _revision_leaf(self, vm: Vm, revision: Revision, leaf: int, wait: bool) -> Node:
        if leaf == _REVISION_DIRECTORY:
            return self._revision_directory(vm, revision)
        inode = self._inodes.base(vm.name, revision.record.id) + leaf
        time = revision.time_ns
        if leaf == _REVISION_JSON:
            size = _json_size(vm, revision, wait)
            changed = max(time, revision.state_ns, vm.quarantine_ns)
            return Node(inode, Kind.FILE, changed, size, data=size, name_lasts=True)
        disk = _disk(revision, leaf)
        return Node(inode, Kind.FILE, time, disk.size, data=disk.data, lasts=True, name_lasts=True)


def _newest(times_ns: Any) -> int:
    return max(times_ns, default=0)


# The names in a revision's directory


def _leaves(record: Record) -> Iterator[tuple[str, int]]:
    for index, name in enumerate(record.disks, start=1):
        yield name + IMAGE_SUFFIX, index * _DISK_LEAVES
    yield REVISION_JSON, _REVISION_JSON


def _leaf_of(record: Record, name: str) -> int | None:
    return next((leaf for known, leaf in _leaves(record) if known == name), None)


def _disk(revision: Revision, leaf: int) -> DiskRecord:
    disks = list(revision.record.disks.values())
    index, rest = divmod(leaf, _DISK_LEAVES)
    if rest or not 0 < index <= len(disks):
        raise NoEntry(f"{revision.record.id}: no leaf {leaf}")
    return disks[index - 1]


# revision.json: the record's file with the revision's state put before its first key


_json = json.JSONEncoder(ensure_ascii=False)


def _state_text(vm: Vm, revision: Revision, wait: bool) -> bytes:
    state = revision.state
    value = {
        "damaged": [
            {
                "disk": damage.disk,
                "offset": damage.extent.offset if damage.extent else 0,
                "length": damage.extent.length if damage.extent else None,
                "reason": damage.reason,
            }
            for damage in vm.damage(revision.record, wait=wait)
        ],
        "tags": list(state.tags),
        "trust": str(state.trust),
        "verified_at": timestamp(state.verified_at) if state.verified_at else None,
        "why": state.why,
    }
    return b'{\n "state": ' + _json.encode(value).encode() + b","


def _json_size(vm: Vm, revision: Revision, wait: bool) -> int:
    return len(_state_text(vm, revision, wait)) + revision.record_bytes - 1


def _revision_json(vm: Vm, revision: Revision, size: int) -> bytes:
    record = revision.record
    path = vm.repository.layout.record(record.id)
    try:
        data = path.read_bytes()
    except FileNotFoundError as exc:
        raise NoEntry(f"{vm.name}: revision {record.id} was just removed") from exc
    Record.decode(data, f"{vm.name}: the record of revision {record.id}")
    text = _state_text(vm, revision, wait=True) + data[data.index(b"{") + 1 :]
    return text.ljust(size, b"\n")[:size]
