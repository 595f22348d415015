"""GPT (UEFI specification, chapter 5): a header and an array of entries, at both ends of the disk.

Each is covered by a CRC-32. The copy at the end is used when the one at the start is damaged; not
when it is whole and lies, for then the copy may just be an older lie.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from uuid import UUID

from backyfs.partition.disk import Damaged, Disk, Entry, checked

SIGNATURE = b"EFI PART"

_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")
_ENTRIES_BYTES_MAX = 1 << 20  # usual: 16 KiB
_UNUSED = bytes(16)


def entries(disk: Disk) -> tuple[Entry, ...]:
    """The partitions by the first whole copy of the table; Damaged when it cannot be believed."""
    try:
        found = _copy(disk, 1)
    except Damaged as primary:
        try:
            found = _copy(disk, disk.sectors - 1)
        except Damaged as backup:
            raise Damaged(f"{primary}; and in the copy at the end: {backup}") from backup
    return checked(found, disk)


def _copy(disk: Disk, at: int) -> list[Entry]:
    """The entries in use of the table whose header is in sector `at`, as they are."""
    header = disk.sector_at(at)
    (signature, _, length, crc, _, own, _, _, _, _, start, count, size, entries_crc) = (
        _HEADER.unpack_from(header)
    )
    if signature != SIGNATURE:
        raise Damaged("the GPT header is missing")
    if not _HEADER.size <= length <= disk.sector or _crc(header[:length]) != crc:
        raise Damaged("the GPT header does not match its checksum")
    if own != at:
        raise Damaged(f"the GPT header in sector {at} says that it is in {own}")
    if size < _ENTRY.size or size % 8 or count * size > _ENTRIES_BYTES_MAX:
        raise Damaged(f"the GPT has {count} entries of {size} bytes")
    array = disk.at(start, count * size)
    if zlib.crc32(array) != entries_crc:
        raise Damaged("the GPT entries do not match their checksum")
    return list(_used(array, size))


def _crc(header: bytes) -> int:
    """The header's CRC, which is computed with its own field zero."""
    return zlib.crc32(header[:16] + bytes(4) + header[20:])


def _used(array: bytes, size: int) -> Iterator[Entry]:
    for number, offset in enumerate(range(0, len(array), size), 1):
        kind, _, first, last, _, name = _ENTRY.unpack_from(array, offset)
        if kind != _UNUSED:
            yield Entry(number, first, last, str(UUID(bytes_le=kind)), _text(name))


def _text(name: bytes) -> str:
    """A name as far as it can be shown: up to its NUL, without control characters."""
    text = name.decode("utf-16-le", "replace").partition("\0")[0]
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
