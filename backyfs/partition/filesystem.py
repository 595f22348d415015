"""Recognises what a slice of a disk holds, by the signatures in its first 68 KiB.

The names are those of `blkid`. A signature is a hint for people, nothing more: no checksum is
verified, and the first match wins, containers before file systems.
"""

from __future__ import annotations

import struct
from typing import Final

from backyfs.partition.disk import Read

_HEAD: Final = 8192
_LEAST: Final = 512
"""What is smaller than a sector holds no file system, whatever it begins with."""
_FAR: Final = (
    (32768, 8, ((32769, b"CD001", "iso9660"), (32768, b"JFS1", "jfs"))),
    (65536, 512, (
        (65600, b"_BHRfS_M", "btrfs"),
        (65588, b"ReIsErFs", "reiserfs"),
        (65588, b"ReIsEr2Fs", "reiserfs"),
    )),
)  # fmt: skip
_NEAR: Final = (
    (0, b"LUKS\xba\xbe", "crypto_LUKS"),
    (3, b"-FVE-FS-", "BitLocker"),
    (4096, b"\xfc\x4e\x2b\xa9", "linux_raid_member"),
    (0, b"\xfc\x4e\x2b\xa9", "linux_raid_member"),
    (0, b"XFSB", "xfs"),
    (3, b"NTFS    ", "ntfs"),
    (3, b"EXFAT   ", "exfat"),
    (3, b"ReFS\0", "ReFS"),
    (0, b"hsqs", "squashfs"),
    (1024, b"\x10\x20\xf5\xf2", "f2fs"),
    (1024, b"\xe2\xe1\xf5\xe0", "erofs"),
    (1024, b"H+", "hfsplus"),
    (1024, b"HX", "hfsplus"),
    (32, b"NXSB", "apfs"),
)
_SWAP: Final = (b"SWAPSPACE2", b"SWAP-SPACE")
_SWAP_PAGES: Final = (4096, 8192)
_LVM_SECTORS: Final = (0, 512, 1024, 1536)
_FAT: Final = ((54, b"FAT1"), (82, b"FAT32   "), (54, b"FAT     "))

_EXT_MAGIC: Final = b"\x53\xef"
_EXT_JOURNAL: Final = 0x4  # compatible: has_journal
_EXT_JOURNAL_DEVICE: Final = 0x8  # incompatible: it is only a journal
_EXT3_INCOMPAT: Final = 0x2 | 0x4 | 0x10  # filetype, recover, meta_bg
_EXT3_RO_COMPAT: Final = 0x1 | 0x2 | 0x4  # sparse_super, large_file, btree_dir


def recognise(read: Read, start: int, length: int) -> str:
    """What bytes [start, start + length) look like: "ext4", "LVM2_member"...; "" = unknown.

    Reads at most 9 KiB, in three pieces, and nothing outside of the slice.
    """
    if length < _LEAST:
        return ""
    head = read(start, min(_HEAD, length))
    return _near(head) or _far(read, start, length)


def _near(head: bytes) -> str:
    for offset, magic, name in _NEAR:
        if head.startswith(magic, offset):
            return name
    if any(head.startswith(b"LABELONE", at) and head[at + 24 : at + 32] == b"LVM2 001"
           for at in _LVM_SECTORS):  # fmt: skip
        return "LVM2_member"
    if any(head.startswith(_SWAP, page - 10) for page in _SWAP_PAGES):
        return "swap"
    if head[1080:1082] == _EXT_MAGIC and len(head) >= 2048:
        return _ext(head)
    if head[510:512] == b"\x55\xaa" and any(head.startswith(magic, at) for at, magic in _FAT):
        return "vfat"
    return ""


def _ext(head: bytes) -> str:
    """Which ext: blkid tells them apart by what the older ones would not understand."""
    compat, incompat, ro_compat = struct.unpack_from("<III", head, 1116)
    if incompat & _EXT_JOURNAL_DEVICE:
        return "jbd"
    if incompat & ~_EXT3_INCOMPAT or ro_compat & ~_EXT3_RO_COMPAT:
        return "ext4"
    return "ext3" if compat & _EXT_JOURNAL else "ext2"


def _far(read: Read, start: int, length: int) -> str:
    for offset, size, signatures in _FAR:
        if offset + size > length:
            return ""
        piece = read(start + offset, size)
        for at, magic, name in signatures:
            if piece.startswith(magic, at - offset):
                return name
    return ""
