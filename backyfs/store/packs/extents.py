"""The extent map of a disk: which stored frame each frame of the image is.

A map names (segment, number), never bytes, so data can move without touching a map. A gap is zeros.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from uuid import UUID

import zstandard

from backyfs.errors import Corrupt
from backyfs.store.digest import HASH, frame_count, group_count
from backyfs.store.header import HEADER, MAP_MAGIC, Header
from backyfs.store.packs.runs import Runs
from backyfs.store.packs.table import SEGMENT_FRAMES_MAX

_FIXED = struct.Struct("<QQQI36x")
"""size, extents, groups, segments"""
_SECTION = struct.Struct("<IIQQQ")
"""kind, flags (1 = zstd), offset, stored bytes, bytes"""
_SEGMENT = struct.Struct("<32sI12x32s")
_KINDS = (1, 2, 3)
_SEGMENTS, _EXTENTS, _GROUPS = _KINDS
_ZSTD = 1


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """A segment as a map authenticates it."""

    name: str
    count: int
    root: bytes


class ExtentMap:
    """An immutable map: which run of which segment each frame is in, and the level-1 hashes."""

    def __init__(
        self, size: int, segments: Sequence[SegmentRef], runs: Runs, groups: bytes
    ) -> None:
        self.size = size
        self.segments = segments
        self.runs = runs
        self.groups = groups

    @property
    def frames(self) -> int:
        """Frames of the image."""
        return frame_count(self.size)

    # The file

    def encode(self, repository: UUID) -> bytes:
        """The bytes of the map's file."""
        segments = b"".join(_SEGMENT.pack(s.name.encode(), s.count, s.root) for s in self.segments)
        fixed = _FIXED.pack(self.size, len(self.runs), len(self.groups) // HASH, len(self.segments))
        return _assembled(repository, fixed, (segments, self.runs.encode(), self.groups))

    @classmethod
    def decode(cls, data: bytes, what: str, *, section_max: int = 1 << 30) -> ExtentMap:
        """The map in a file whose hash was checked. Corrupt, Unsupported.

        `section_max`: more bytes than any of its sections can have.
        """
        Header.decode(data, MAP_MAGIC, what)
        try:
            return cls._decoded(data, section_max)
        except (struct.error, ValueError, LookupError, ArithmeticError, zstandard.ZstdError) as exc:
            raise Corrupt(f"{what} is malformed: {exc}") from exc

    @classmethod
    def _decoded(cls, data: bytes, section_max: int) -> ExtentMap:
        size, extents, groups, segments = _FIXED.unpack_from(data, HEADER.size)
        sections = dict(_sections(data, section_max))
        if len(sections[_GROUPS]) != groups * HASH or groups != group_count(size):
            raise ValueError("wrong number of groups")
        refs = [
            SegmentRef(name.rstrip(b"\0").decode("ascii"), count, root)
            for name, count, root in _SEGMENT.iter_unpack(sections[_SEGMENTS])
        ]
        if len(refs) != segments:
            raise ValueError("wrong number of segments")
        if any(ref.count > SEGMENT_FRAMES_MAX for ref in refs):
            raise ValueError("a segment has an impossible number of frames")
        runs = Runs.decode(sections[_EXTENTS], extents)
        if runs.end > frame_count(size) or max(runs.segments, default=-1) >= len(refs):
            raise ValueError("an extent lies outside the disk or its segments")
        return cls(size, refs, runs, sections[_GROUPS])


def _assembled(repository: UUID, fixed: bytes, sections: tuple[bytes, ...]) -> bytes:
    position = HEADER.size + _FIXED.size + len(sections) * _SECTION.size
    table, bodies = [], []
    for kind, body in zip(_KINDS, sections, strict=True):
        packed = zstandard.ZstdCompressor(level=1).compress(body)
        flags, stored = (_ZSTD, packed) if len(packed) < len(body) else (0, body)
        position = -(-position // 16) * 16
        table.append(_SECTION.pack(kind, flags, position, len(stored), len(body)))
        bodies.append((position, stored))
        position += len(stored)
    result = bytearray(Header(MAP_MAGIC, repository).encode() + fixed + b"".join(table))
    for at, body in bodies:
        result += bytes(at - len(result)) + body
    return bytes(result)


def _sections(data: bytes, most: int) -> Iterator[tuple[int, bytes]]:
    for index in range(len(_KINDS)):
        at = HEADER.size + _FIXED.size + index * _SECTION.size
        kind, flags, offset, stored, length = _SECTION.unpack_from(data, at)
        body = data[offset : offset + stored]
        if flags & _ZSTD:
            # What is said here and in the zstd frame is allocated before a byte is decoded.
            if max(length, zstandard.frame_content_size(body)) > most:
                raise ValueError("a section has an impossible length")
            body = zstandard.ZstdDecompressor().decompress(body, max_output_size=length)
        if len(body) != length:
            raise ValueError("a section is cut off")
        yield kind, body
