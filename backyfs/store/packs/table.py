"""The table at the end of a pack file: which frames it holds, where, and their hashes.

    skippable frame header | footer | entries and hashes per segment | footer again | tail

The footer (descriptors of segments) is checked by its own BLAKE3 and stands twice; entries and
hashes are read by position, so that a damaged table costs only the entries it hits.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import UUID

from blake3 import blake3

from backyfs.errors import Corrupt
from backyfs.store.digest import HASH
from backyfs.store.header import HEADER, Header

SKIPPABLE = struct.Struct("<II")
PACK_MAGIC = SKIPPABLE.pack(0x184D2A5B, 88)
"""The first 8 bytes of a pack: a skippable zstd frame that covers the rest of the header."""
PACK_HEADER_BYTES = 96
TABLE_FRAME = 0x184D2A5C

ENTRY = struct.Struct("<QIBBHHHI")
"""offset, csize, kind, depth, flags, base segment (index), reserved, base number."""
NO_BASE = 0xFFFF
NAMES_MAX = 0xFFFE
SEGMENT_FRAMES_MAX = 1 << 18

_FOOTER = struct.Struct("<8sIIIIQ")
_FOOTER_MAGIC = b"bfs-tbl\n"
_NAME_BYTES = 32
_DESCRIPTOR = struct.Struct("<IIQQQ32s")
_TAIL = struct.Struct("<II8s")
_TAIL_MAGIC = b"bfs-end\n"

Entry = tuple[int, int, int, int, int, int, int, int]


def pack_header(repository: UUID, salt: bytes) -> bytes:
    """The first 96 bytes of a pack file; `salt` is 32 random bytes."""
    return Header(PACK_MAGIC, repository, length=PACK_HEADER_BYTES).encode() + salt


@dataclass(slots=True)
class SegmentTable:
    """The table of one segment while it is written, or as a merge carries it.

    `carried_root`: the root the segment was published with. A merge must not compute it anew: that
    would make a damaged hash column look sound.
    """

    name: str
    names: list[str]
    entries: bytearray = field(default_factory=bytearray)
    hashes: bytearray = field(default_factory=bytearray)
    stored: int = 0
    carried_root: bytes = b""

    @property
    def count(self) -> int:
        """Frames in the segment, dead ones included."""
        return len(self.hashes) // HASH

    @property
    def root(self) -> bytes:
        """BLAKE3 of the hash column: what maps refer to."""
        return self.carried_root or blake3(self.hashes).digest()


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Where a segment's columns lie in a pack file, and what they must be. Offsets in bytes."""

    name: str
    count: int
    stored: int
    entries_at: int
    hashes_at: int
    root: bytes


class Footer(NamedTuple):
    """All segments of a pack file, and the names base references use."""

    names: tuple[str, ...]
    segments: tuple[Descriptor, ...]
    table_at: int


def _padded(at: int) -> int:
    return -(-at // 16) * 16


def encode_table(
    at: int, tables: Sequence[SegmentTable], names: Sequence[str]
) -> Iterable[bytes | bytearray]:
    """The trailing frame of a pack, to be written at file offset `at`, in pieces.

    `names` begins with the names of `tables`, in order.
    """
    footer_bytes = _footer_bytes(len(tables), len(names))
    first_footer = _padded(at + SKIPPABLE.size)
    position = _padded(first_footer + footer_bytes)
    descriptors, columns = [], []
    for table in tables:
        entries_at = position
        hashes_at = _padded(entries_at + len(table.entries))
        position = _padded(hashes_at + len(table.hashes))
        descriptors.append(
            Descriptor(table.name, table.count, table.stored, entries_at, hashes_at, table.root)
        )
        columns += [(entries_at, table.entries), (hashes_at, table.hashes)]
    footer = _encode_footer(Footer(tuple(names), tuple(descriptors), at))
    end = position + len(footer) + _TAIL.size
    yield from _pieces(
        at,
        [
            (at, SKIPPABLE.pack(TABLE_FRAME, end - at - SKIPPABLE.size)),
            (first_footer, footer),
            *columns,
            (position, footer),
            (position + len(footer), _TAIL.pack(len(footer), 0, _TAIL_MAGIC)),
        ],
    )


def _pieces(at: int, parts: Iterable[tuple[int, bytes | bytearray]]) -> Iterable[bytes | bytearray]:
    for offset, part in parts:
        if offset > at:
            yield bytes(offset - at)
        yield part
        at = offset + len(part)


def _footer_bytes(segments: int, names: int) -> int:
    return _FOOTER.size + names * _NAME_BYTES + segments * _DESCRIPTOR.size + HASH


def _encode_footer(footer: Footer) -> bytes:
    length = _footer_bytes(len(footer.segments), len(footer.names))
    parts = [
        _FOOTER.pack(
            _FOOTER_MAGIC, length, len(footer.segments), len(footer.names), 0, footer.table_at
        )
    ]
    parts += [name.encode().ljust(_NAME_BYTES, b"\0") for name in footer.names]
    parts += [
        _DESCRIPTOR.pack(s.count, 0, s.stored, s.entries_at, s.hashes_at, s.root)
        for s in footer.segments
    ]
    body = b"".join(parts)
    return body + blake3(body).digest()


def decode_footer(data: bytes, what: str) -> Footer:
    """The footer at the start of `data`. Corrupt when it is none, or damaged."""
    if len(data) < _FOOTER.size:
        raise Corrupt(f"{what}: the table is cut off")
    magic, length, segments, names, _, table_at = _FOOTER.unpack_from(data)
    if magic != _FOOTER_MAGIC or length != _footer_bytes(segments, names) or length > len(data):
        raise Corrupt(f"{what}: the table's footer is damaged")
    body = data[: length - HASH]
    if blake3(body).digest() != data[length - HASH : length]:
        raise Corrupt(f"{what}: the table's footer does not match its checksum")
    try:
        return _footer(body, segments, names, table_at)
    except (ValueError, IndexError) as exc:
        raise Corrupt(f"{what}: the table's footer names impossible segments") from exc


def _footer(body: bytes, segments: int, count: int, table_at: int) -> Footer:
    at = _FOOTER.size
    names = tuple(
        body[at + i * _NAME_BYTES : at + (i + 1) * _NAME_BYTES].rstrip(b"\0").decode("ascii")
        for i in range(count)
    )
    at += count * _NAME_BYTES
    found = []
    for index in range(segments):
        n, _, stored, entries_at, hashes_at, root = _DESCRIPTOR.unpack_from(
            body, at + index * _DESCRIPTOR.size
        )
        if n > SEGMENT_FRAMES_MAX:
            raise ValueError
        found.append(Descriptor(names[index], n, stored, entries_at, hashes_at, root))
    return Footer(names, tuple(found), table_at)


def footer_length(tail: bytes) -> int | None:
    """The footer's length as the last 16 bytes of a pack say; None when they are damaged."""
    if len(tail) != _TAIL.size:
        return None
    length, _, magic = _TAIL.unpack(tail)
    return int(length) if magic == _TAIL_MAGIC and length <= FOOTER_BYTES_MAX else None


FOOTER_BYTES_MAX = _footer_bytes(NAMES_MAX, NAMES_MAX)
"""More than any footer has: what a damaged file says of its length is memory to whoever reads."""
TAIL_BYTES = _TAIL.size
FOOTER_MAGIC = _FOOTER_MAGIC
HEADER_BYTES = HEADER.size
