"""Deterministic disk images for tests: made, changed and compared by seed.

The same arguments give the same bytes on every machine. Contents are made of 4 KiB blocks: random
ones (which do not compress), text-like ones (which do) and holes, so that every path of the store
is met.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

BLOCK = 4096
_RUN_BLOCKS = 64  # the longest stretch of blocks of one kind: 256 KiB
_WORDS = b"disk image extent frame hole parent revision segment snapshot source tag trust".split()


def text_like(rng: random.Random, length: int) -> bytes:
    """Bytes that compress about as well as text does."""
    words = b" ".join(rng.choices(_WORDS, k=length // 6 + 16))
    while len(words) < length:
        words += words
    return words[:length]


def _runs(rng: random.Random, size: int) -> Iterator[tuple[int, int, str]]:
    position = 0
    while position < size:
        length = min(rng.randint(1, _RUN_BLOCKS) * BLOCK, size - position)
        yield position, length, rng.choice(("random", "text", "hole"))
        position += length


def make_image(path: Path, size: int, seed: int = 0) -> Path:
    """Create `path` as an image of `size` bytes (any value): random, text-like and hole runs."""
    rng = random.Random(seed)
    with open(path, "xb") as stream:
        stream.truncate(size)
        for position, length, kind in _runs(rng, size):
            if kind != "hole":
                stream.seek(position)
                stream.write(rng.randbytes(length) if kind == "random" else text_like(rng, length))
    return path


def random_image(path: Path, size: int, seed: int = 0) -> Path:
    """Create `path` with `size` random bytes."""
    rng = random.Random(seed)
    with open(path, "xb") as stream:
        for position in range(0, size, 1024 * 1024):
            stream.write(rng.randbytes(min(1024 * 1024, size - position)))
    return path


def sparse_image(path: Path, size: int, pieces: dict[int, bytes] | None = None) -> Path:
    """Create `path` as a hole of `size` bytes with `pieces` (by offset) in it."""
    with open(path, "xb") as stream:
        stream.truncate(size)
        for offset, data in (pieces or {}).items():
            stream.seek(offset)
            stream.write(data)
    return path


def change_blocks(path: Path, count: int, seed: int) -> list[int]:
    """Overwrite `count` random 4 KiB blocks in place; return their offsets, sorted."""
    rng = random.Random(seed)
    blocks = os.path.getsize(path) // BLOCK
    chosen = sorted(rng.sample(range(blocks), min(count, blocks)))
    with open(path, "r+b") as stream:
        for block in chosen:
            stream.seek(block * BLOCK)
            stream.write(rng.randbytes(BLOCK))
    return [block * BLOCK for block in chosen]


def change_range(path: Path, offset: int, length: int, seed: int) -> None:
    """Overwrite one range in place with random bytes."""
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(random.Random(seed).randbytes(length))


def zero_range(path: Path, offset: int, length: int) -> None:
    """Overwrite one range in place with zeros (written, not punched)."""
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(bytes(length))


def resize(path: Path, size: int) -> None:
    """Grow (with a hole) or cut the image."""
    os.truncate(path, size)


def checksum(path: Path) -> str:
    """SHA-256 of all bytes of a file or block device, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(data: bytes) -> str:
    """SHA-256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()
