"""Inode numbers: made from the VM, the section of its tree and a leaf within the section.

Nothing is remembered of single files: a node is computed when asked for. A link to a revision is a
leaf of that revision whatever its name and directory, so it has one number and never changes; it
is the names that come to lead to other links.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Container

from backyfs.reader.tree.node import NoEntry

DIRECTORY = 0
"""The directory that a section is; other leaves depend on the section."""
# Leaves of a VM's section
BY_TAG, AT = 1, 2
# Leaves of a revision's section: its own ones, and from DISK_LEAVES on as many for each disk
REVISION_JSON, PARTITIONS, LINK, LINK_UP, LINK_UP_UP = 1, 2, 3, 4, 5
DISK_LEAVES = 1024
# Leaves of a disk, counted from its first one
IMAGE, SLICES = 0, 256
# In a revision's section: the writable view of the file at the leaf without this bit
SCRATCH = 1 << 20

_LEAF_BITS = 21
_SECTION_BITS = 42
Section = tuple[str, str]
"""A VM's name and a part of its tree: "" (the VM's directory), a revision id, or by-tag/TAG."""


class Inodes:
    """Inode numbers: a 42-bit hash of the section, then 21 bits for the leaf in it.

    The hash makes them the same in every mount of a store. Sections are remembered as long as
    their VM shows them, to find the way back and to give colliding ones another number.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sections: dict[int, Section] = {}
        self._numbers: dict[str, dict[str, int]] = {}
        self._missed: set[str] = set()

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

    def keep_vms(self, vms: Container[str]) -> None:
        """Forget the VMs that a listing of all does not have, nor had the one before.

        Twice, for one that was just made may have been asked for before it is listed.
        """
        with self._lock:
            missing = {vm for vm in self._numbers if vm not in vms}
            for vm in missing & self._missed:
                for number in self._numbers.pop(vm).values():
                    del self._sections[number]
            self._missed = missing
