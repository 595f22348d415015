"""What a node of the tree is: a file, a directory or a symbolic link."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from backyfs.errors import NoRevision
from backyfs.reader.images import ReadableImage, WritableImage

ROOT = 1
"""The inode number of the root directory, as FUSE has it."""


class NoEntry(NoRevision):
    """There is no such file or directory in the tree (any more)."""


class Kind(Enum):
    """What a node is."""

    DIRECTORY = "directory"
    FILE = "file"
    LINK = "link"


@dataclass(frozen=True, slots=True)
class Node:
    """A file, directory or symbolic link.

    `size` and `data` (bytes that take space) are in bytes, `mtime_ns` is Unix time. `lasts`: no
    attribute of it will ever change. `name_lasts`: its name leads to it as long as its directory
    exists. `writable`: it may be written to.
    """

    inode: int
    kind: Kind
    mtime_ns: int
    size: int = 0
    data: int = 0
    target: str = ""
    lasts: bool = False
    name_lasts: bool = False
    writable: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """An open file; `close` gives it back and never blocks.

    `suspect`: damage is known, so what was read of it before may not be kept. `changed_ns`: when
    the file whose bytes are read unverified was last changed, which healing does (0: all bytes are
    verified). `writable`: the image again if it may be written to.
    """

    node: Node
    image: ReadableImage
    close: Callable[[], None]
    suspect: bool = False
    changed_ns: int = 0
    writable: WritableImage | None = None
