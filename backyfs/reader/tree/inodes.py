"""Inode numbers: made from the VM, the section of its tree and a leaf within the section.

Nothing is remembered of single files: a node is computed when asked for.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

from backyfs.reader.tree.node import NoEntry

# Leaves of a VM's section
VM_DIRECTORY, LATEST = 0, 1
# Leaves of a revision's section: its own ones, and from DISK_LEAVES on as many for each disk
REVISION_DIRECTORY, REVISION_JSON = 0, 1
DISK_LEAVES = 256
# Leaves of a disk, counted from its first one
IMAGE = 0

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
