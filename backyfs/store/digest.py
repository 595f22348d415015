"""The digest of a disk: a tree of BLAKE3 over frame hashes (docs/format.md, section 2).

Depends on size and content only: equal images have equal digests in both formats, everywhere.
A zero frame, and a group or node of nothing but zeros, counts as 32 zero bytes.
"""

from __future__ import annotations

import struct

from blake3 import blake3

from backyfs.model import FRAME

FAN_OUT = 1024
HASH = 32
ZERO_HASH = bytes(HASH)
_NODE = FAN_OUT * HASH
_ZERO_NODE = bytes(_NODE)
_ZERO_FRAME = bytes(FRAME)


def frame_count(size: int) -> int:
    """Frames of `size` bytes, of an image or of a piece of one; the last may be partial."""
    return -(-size // FRAME)


def matches(frame: memoryview, expected: bytes) -> bool:
    """Whether a frame (the last of a disk may be short) has this hash."""
    padding = _ZERO_FRAME[len(frame) :]
    if expected == ZERO_HASH:
        return bytes(frame) + padding == _ZERO_FRAME
    return blake3(frame).update(padding).digest() == expected


def group_count(size: int) -> int:
    """Groups of 1024 frames (64 MiB) of an image of `size` bytes."""
    return -(-frame_count(size) // FAN_OUT)


def node(hashes: bytes) -> bytes:
    """The hash over at most 1024 hashes of the level below."""
    if hashes == _ZERO_NODE[: len(hashes)]:
        return ZERO_HASH
    return blake3(hashes).digest()


def digest(size: int, groups: bytes) -> str:
    """The hex digest of a disk of `size` bytes with these level-1 hashes."""
    level = groups
    while len(level) > HASH:
        level = b"".join(node(level[at : at + _NODE]) for at in range(0, len(level), _NODE))
    root = level or ZERO_HASH
    return blake3(b"bfs1" + struct.pack("<QI", size, FRAME) + root).hexdigest()
