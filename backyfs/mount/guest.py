"""A guest's file system: where on its disk it lies, and how it can be mounted. Mounts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from backyfs.errors import TargetError
from backyfs.model import Partition
from backyfs.partition import parse, recognise
from backyfs.partition.disk import Read
from backyfs.partition.journal import Journal, inspect

SAFE_OPTIONS = "nodev,nosuid,noexec"
"""What a guest's file system is mounted with, if nobody says otherwise: we do not trust it."""

_CONTAINERS = {
    "LVM2_member": "a part of an LVM volume group",
    "linux_raid_member": "a part of a RAID",
    "crypto_LUKS": "encrypted (LUKS)",
    "BitLocker": "encrypted (BitLocker)",
    "swap": "swap space",
    "jbd": "only a journal of another file system",
}
_BTRFS_SUPERBLOCK = 65536
# An ext's superblock may ask for a panic of the kernel that finds an error; another revision of an
# XFS may be mounted.
_EXT = ("errors=remount-ro",)
_ALWAYS = {"ext2": _EXT, "ext3": _EXT, "ext4": _EXT, "xfs": ("nouuid",)}
_EXTERNAL_LOG = f"its log lies on another device; name that: -o {SAFE_OPTIONS},logdev=DEVICE"
_UNSAFE = {
    "ext3": "noload",
    "ext4": "noload",
    "xfs": "norecovery",
    "btrfs": "rescue=nologreplay",
}


@dataclass(frozen=True, slots=True)
class Place:
    """A file system on a disk: bytes [start, start + length), and its kind as blkid names it.

    `partition` is the number of the partition, None when it takes the whole disk.
    """

    partition: int | None
    start: int
    length: int
    kind: str


@dataclass(frozen=True, slots=True)
class Plan:
    """How to mount: from the scratch view or the image, with which options, and why; `hint` is
    what to do if that fails.
    """

    scratch: bool
    options: tuple[str, ...]
    reason: str
    hint: str = "see why: dmesg; a kernel without this file system says unknown type"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the operator said.

    `noload`: show an ext3 or ext4 without what its journal holds; `unsafe`: so with every kind;
    `writable`: mount it for writing, which nothing outlasts.
    """

    noload: bool = False
    unsafe: bool = False
    writable: bool = False


def locate(
    read: Read, size: int, partitions: Sequence[Partition], number: int | None, name: str
) -> Place:
    """The file system in partition `number` of a disk; None: the only one. TargetError.

    `name` is what messages call the disk.
    """
    if number is not None:
        return _partition(partitions, number, name)
    if not partitions:
        place = Place(None, 0, size, recognise(read, 0, size))
        if not place.kind and (reason := parse(read, size).reason):
            raise TargetError(f"{name} holds no file system that is known: {reason}")
        return _mountable(place, name)
    found = [entry for entry in partitions if _holds_files(entry.filesystem)]
    if len(found) == 1:
        return _place(found[0])
    count = f"{len(found)} partitions with" if found else "no partition with"
    raise TargetError(f"{name} has {count} a file system", hint=_choice(partitions))


def _partition(partitions: Sequence[Partition], number: int, name: str) -> Place:
    for entry in partitions:
        if entry.number == number:
            return _mountable(_place(entry), f"partition {number} of {name}")
    raise TargetError(f"{name} has no partition {number}", hint=_choice(partitions))


def _place(entry: Partition) -> Place:
    return Place(entry.number, entry.start, entry.length, entry.filesystem)


def _holds_files(kind: str) -> bool:
    return bool(kind) and kind not in _CONTAINERS


def _mountable(place: Place, name: str) -> Place:
    if _holds_files(place.kind):
        return place
    if place.kind:
        raise TargetError(f"{name} is {_CONTAINERS[place.kind]}, no file system to be mounted")
    raise TargetError(f"{name} holds no file system that is known", hint="see: backyfs mount")


def _choice(partitions: Sequence[Partition]) -> str:
    if not partitions:
        return "it has no partitions at all: leave out --partition"
    known = (
        f"{entry.number} ({entry.filesystem or 'unknown'}, {entry.length >> 20} MiB"
        f"{', ' + entry.name if entry.name else ''})"
        for entry in partitions
    )
    return f"choose one with --partition: {', '.join(known)}"


def plan(place: Place, journal: Journal, wishes: Wishes) -> Plan:
    """How to mount the file system at a place, given what its journal looks like. TargetError."""
    if journal.devices > 1:
        raise TargetError(f"this {place.kind} lies on {journal.devices} devices; it needs them all")
    if journal.external:
        return _plan_external(place, journal, wishes)
    return _plan(place, journal, wishes, _ALWAYS.get(place.kind, ()))


def _plan_external(place: Place, journal: Journal, wishes: Wishes) -> Plan:
    """An ext can do without a journal that is clean; an XFS needs its log in any case."""
    always = _ALWAYS.get(place.kind, ())
    if place.kind == "xfs":
        return replace(_plan(place, journal, wishes, always), hint=_EXTERNAL_LOG)
    if not journal.dirty:
        return _plan(place, journal, wishes, ("noload", *always))
    if wishes.writable or not (wishes.noload or wishes.unsafe):
        raise TargetError(
            f"this {place.kind} cannot be replayed: {journal.reason}",
            hint="--noload shows it without what its journal holds",
        )
    return _plan(place, journal, wishes, always)


def _plan(place: Place, journal: Journal, wishes: Wishes, always: tuple[str, ...]) -> Plan:
    if wishes.writable:
        return Plan(True, ("rw", *always), "it was asked for writing")
    if not journal.dirty:
        return Plan(False, ("ro", *always), journal.reason)
    if wishes.unsafe or (wishes.noload and place.kind.startswith("ext")):
        reason = f"{journal.reason}, but was not replayed: files may be missing or wrong"
        return Plan(False, ("ro", _UNSAFE[place.kind], *always), reason)
    return Plan(
        True, ("ro", *always), f"{journal.reason}, and was replayed in a throw-away overlay"
    )


def journal_at(read: Read, place: Place) -> Journal:
    """What the journal of the file system at a place looks like; what `read` raises passes."""
    return inspect(place.kind, read, place.start, place.length)


def btrfs_uuid(read: Read, place: Place) -> UUID:
    """The id by which the kernel knows a btrfs."""
    return UUID(bytes=bytes(read(place.start + _BTRFS_SUPERBLOCK + 32, 16)))
