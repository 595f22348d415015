"""The 64 bytes every binary file of the store begins with (docs/format.md, section 3).

The last 8 are the start of the BLAKE3 of the 56 before them: without it a flipped bit in the
version would turn a damaged file into one "of a newer program", which nothing could heal.
"""

from __future__ import annotations

import struct
from typing import NamedTuple
from uuid import UUID

from blake3 import blake3

from backyfs.errors import Corrupt, Unsupported

HEADER = struct.Struct("<8sHHII16s20x8s")
VERSION = 1
_CHECKED = HEADER.size - 8

MAP_MAGIC = b"bfs-map\n"
SUM_MAGIC = b"bfs-sum\n"


class Header(NamedTuple):
    """Kind of file, version and features, and the repository it belongs to."""

    magic: bytes
    repository: UUID
    length: int = HEADER.size
    incompat: int = 0
    ro_compat: int = 0
    version: int = VERSION

    def encode(self) -> bytes:
        """The header's 64 bytes."""
        body = HEADER.pack(
            self.magic,
            self.version,
            self.length,
            self.incompat,
            self.ro_compat,
            self.repository.bytes,
            b"",
        )[:_CHECKED]
        return body + blake3(body).digest()[:8]

    @classmethod
    def decode(cls, data: bytes, magic: bytes, what: str) -> Header:
        """The header at the start of `data`; Corrupt or Unsupported when it is not ours."""
        if len(data) < HEADER.size:
            raise Corrupt(f"{what} is shorter than its header")
        found, version, length, incompat, ro_compat, uuid, check = HEADER.unpack_from(data)
        if found != magic:
            raise Corrupt(f"{what} does not begin like such a file")
        if check != blake3(data[:_CHECKED]).digest()[:8]:
            raise Corrupt(f"{what}: the header does not match its checksum")
        if version != VERSION or incompat:
            raise Unsupported(
                f"{what} has version {version}, features {incompat:#x}; this program knows"
                f" version {VERSION}",
                hint="use a newer backyfs",
            )
        return cls(found, UUID(bytes=uuid), length, incompat, ro_compat, version)
