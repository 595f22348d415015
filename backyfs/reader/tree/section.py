"""What every section of the tree answers: a directory, and what belongs to it."""

from __future__ import annotations

from typing import Protocol

from backyfs.reader.tree.attributes import Attributes
from backyfs.reader.tree.files import File
from backyfs.reader.tree.node import Node

Listing = list[tuple[str, Node]]
"""Names with their nodes, in the order of a listing."""


class Section(Protocol):
    """A part of the tree whose nodes are named by leaves; made for one request and then dropped.

    Each method raises NoEntry where there is nothing (of the kind) at a leaf or name, and, with
    `wait=False`, BlockingIOError.
    """

    def node(self, leaf: int, *, wait: bool) -> Node:
        """What a leaf looks like."""

    def child(self, leaf: int, name: str, *, wait: bool) -> Node:
        """The node of a name in the directory at a leaf."""

    def children(self, leaf: int, *, wait: bool) -> Listing:
        """What the directory at a leaf lists."""

    def file(self, leaf: int) -> File:
        """The regular file at a leaf."""

    def attributes(self, leaf: int, *, wait: bool) -> Attributes:
        """The extended attributes of a leaf."""
