"""Whether a guest's file system was unmounted cleanly, told from its superblock and its log.

A file system whose journal holds changes must be replayed before it is whole, and the kernel does
that only on a device it may write to. A wrong "dirty" costs an overlay; of a wrong "clean" the
kernel says so, for it refuses to mount. So what cannot be told is dirty.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from backyfs.partition.disk import Read

_NOT_INSPECTED: Final = ("ntfs", "ReFS", "reiserfs", "jfs", "f2fs", "hfsplus", "apfs")


@dataclass(frozen=True, slots=True)
class Journal:
    """`dirty`: it must be replayed; `reason` says how that was found, for people.

    `devices` is the number of devices the file system lies on (btrfs; else 1). `external`: its
    journal lies on another device.
    """

    dirty: bool
    reason: str
    devices: int = 1
    external: bool = False


def inspect(kind: str, read: Read, start: int, length: int) -> Journal:
    """The journal of a file system of `kind` (as `recognise` names it) in a slice of a disk.

    What `read` raises passes through. Kinds whose journal is not looked at count as clean.
    """
    if kind in ("ext3", "ext4"):
        return _ext(read(start, 2048))
    if kind == "xfs":
        return _xfs(read, start, length)
    if kind == "btrfs":
        return _btrfs(read(start + 65536, 512))
    if kind in _NOT_INSPECTED:
        return Journal(False, f"what the journal of {kind} may hold is not looked at")
    return Journal(False, f"{kind or 'this file system'} has no journal to replay")


# ext3, ext4: the superblock is at byte 1024

_EXT_HAS_JOURNAL: Final = 0x4
_EXT_NEEDS_RECOVERY: Final = 0x4


def _ext(head: bytes) -> Journal:
    compat, incompat = struct.unpack_from("<II", head, 1024 + 0x5C)
    (inode,) = struct.unpack_from("<I", head, 1024 + 0xE0)
    external = bool(compat & _EXT_HAS_JOURNAL and not inode)
    where = ", and lies on another device" if external else ""
    if incompat & _EXT_NEEDS_RECOVERY:
        return Journal(True, f"the journal needs recovery{where}", external=external)
    return Journal(False, f"the journal is clean{where}", external=external)


# btrfs: the superblock is at byte 65536


def _btrfs(superblock: bytes) -> Journal:
    (log_root,) = struct.unpack_from("<Q", superblock, 0x60)
    (devices,) = struct.unpack_from("<Q", superblock, 0x88)
    if log_root:
        return Journal(True, "there is a log tree to replay", devices)
    return Journal(False, "there is no log tree", devices)


# xfs: the log is a ring of 512-byte blocks, each of which begins with the number of the round it
# was written in; a record begins with a magic number and that. A clean log ends in a record of one
# operation that says "unmounted".

_XFS_BLOCK: Final = 512
_XFS_RECORD: Final = b"\xfe\xed\xba\xbe"
_XFS_UNMOUNT: Final = 0x20
_XFS_HEADER_BYTES: Final = 32768  # of a record that one block of its header speaks of
_XFS_RECORD_BLOCKS_MAX: Final = 520  # 256 KiB and their header


def _xfs(read: Read, start: int, length: int) -> Journal:
    superblock = read(start, 512)
    (block_bytes,) = struct.unpack_from(">I", superblock, 4)
    (log_start,) = struct.unpack_from(">Q", superblock, 48)
    group_blocks, _, _, log_blocks = struct.unpack_from(">4I", superblock, 84)
    group, block = divmod(log_start, 1 << superblock[124])
    if not log_start:
        return Journal(True, "the log lies on another device", external=True)
    at = start + (group * group_blocks + block) * block_bytes
    ring = _Ring(read, at, log_blocks * block_bytes // _XFS_BLOCK)
    if not ring.count or at + ring.count * _XFS_BLOCK > start + length:
        return Journal(True, "the superblock makes no sense")
    if ring.ends_in_unmount():
        return Journal(False, "the log ends in an unmount record")
    return Journal(True, "the log holds changes")


@dataclass(frozen=True, slots=True)
class _Ring:
    """A log of `count` blocks from byte `at` of a disk."""

    read: Read
    at: int
    count: int

    def ends_in_unmount(self) -> bool:
        """Whether the last record says "unmounted"."""
        head = self._head()
        tail = self._blocks_before(head)
        for position in range(len(tail) - 1, -1, -1):
            if tail[position].startswith(_XFS_RECORD):
                return _is_unmount(tail[position:])
        return False

    def _head(self) -> int:
        """The block behind the last one written: where the number of the round falls."""
        newest = self._round(0)
        low, high = 0, self.count  # block `low` is of the newest round, block `high` is not
        while high - low > 1:
            middle = (low + high) // 2
            if self._round(middle) == newest:
                low = middle
            else:
                high = middle
        return high

    def _round(self, block: int) -> int:
        data = self.read(self.at + block * _XFS_BLOCK, 8)
        return int.from_bytes(data[4:8] if data.startswith(_XFS_RECORD) else data[:4], "big")

    def _blocks_before(self, head: int) -> list[bytes]:
        """As many blocks as the longest record has, in the order they were written."""
        wanted = min(self.count, _XFS_RECORD_BLOCKS_MAX)
        first = max(0, head - wanted)
        data = self.read(self.at + first * _XFS_BLOCK, (head - first) * _XFS_BLOCK)
        if (rest := wanted - (head - first)) > 0:  # the record may have begun at the ring's end
            last = self.read(self.at + (self.count - rest) * _XFS_BLOCK, rest * _XFS_BLOCK)
            data = last + data
        return [data[i : i + _XFS_BLOCK] for i in range(0, len(data), _XFS_BLOCK)]


def _is_unmount(record: list[bytes]) -> bool:
    """Whether a whole record, and nothing behind it, is what an unmount writes."""
    version, length = struct.unpack_from(">2I", record[0], 8)
    (operations,) = struct.unpack_from(">I", record[0], 40)
    (size,) = struct.unpack_from(">I", record[0], 320)
    header = max(1, -(-size // _XFS_HEADER_BYTES)) if version & 2 else 1
    if operations != 1 or len(record) != header + -(-length // _XFS_BLOCK):
        return False
    return header < len(record) and bool(record[header][9] & _XFS_UNMOUNT)
