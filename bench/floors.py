"""The floors: what plain tools of the machine take for the same bytes.

A floor is not an opponent to be beaten by design but a measure that moves with the machine, so
that a ratio to it means the same on another one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import zstandard

from bench.command import Command, command

CAT = "cat"
ZSTD = "zstd -1 -T2"
UNZSTD = "zstd -dc"
COPY = "cp --sparse=always"
CLONE = "cp --reflink + changes"
ALONE = "4 KiB blocks alone, zstd -1"
TOGETHER = "zstd -1 of the changes"

_PAGE = 4096


def cat(image: Path) -> Command:
    """Read an image and throw it away."""
    return command("cat", image)


def compress(image: Path, target: Path) -> Command:
    """Compress an image at the level backyfs uses, with two threads."""
    return command("zstd", "-1", "-T2", "--quiet", "--force", image, "-o", target)


def decompress(source: Path) -> Command:
    """Decompress to standard output."""
    return command("zstd", "-dc", "--quiet", source)


def copy(image: Path, target: Path) -> Command:
    """Copy an image, leaving holes where it is zero."""
    return command("cp", "--sparse=always", image, target)


def clone(previous: Path, target: Path, image: Path, changes: Path) -> list[Command]:
    """Clone the previous state on a file system that shares blocks; write what has changed."""
    return [
        command("cp", "--reflink=always", previous, target),
        # -I -S: the floor shall not wait for the interpreter's site packages.
        command(sys.executable, "-I", "-S", _OVERWRITE, image, target, changes),
    ]


_OVERWRITE = Path(__file__).with_name("overwrite.py")


def _changed(image: Path, changes: Path) -> Iterator[bytes]:
    """The bytes of each changed extent."""
    fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for extent in json.loads(changes.read_text()):
            yield os.pread(fd, extent["length"], extent["offset"])
    finally:
        os.close(fd)


def blocks_alone(image: Path, changes: Path) -> int:
    """Bytes of the changed 4 KiB blocks, each compressed alone; no checksum, no length field."""
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=False)
    return sum(
        len(compressor.compress(data[start : start + _PAGE]))
        for data in _changed(image, changes)
        for start in range(0, len(data), _PAGE)
    )


def changes_together(image: Path, changes: Path) -> int:
    """Bytes of all changed extents compressed as one stream."""
    stream = zstandard.ZstdCompressor(level=1).compressobj()
    size = sum(len(stream.compress(data)) for data in _changed(image, changes))
    return size + len(stream.flush())
