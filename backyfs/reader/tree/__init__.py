"""What the catalog looks like as files (docs/design.md, section 6). Knows no FUSE.

    node        what a node of the tree is
    inodes      inode numbers: a hash of the section, and a leaf in it
    section     what every section answers
    vm          a VM's directory: its revisions, `latest`, `by-tag` and `at`
    at          which times `at` lists, and which revision a time leads to
    revision    a revision's directory: which files it has, and their leaves
    slices      the partitions of its disks
    files       the files in it: what each looks like, and how it is opened
    document    the content of revision.json
    attributes  extended attributes
    tree        all of it, by inode number

A new kind of file in a revision's directory is a class in `files` (a `File`), a leaf in `inodes`,
and its name and leaf in `revision.RevisionSection`.

Safe from many threads. With `wait=False` nothing does input or output: the answer is at hand, or
BlockingIOError asks the caller to come again from a thread that may block.
"""

from backyfs.reader.tree.inodes import Inodes
from backyfs.reader.tree.node import ROOT, Kind, Node, NoEntry, Opened
from backyfs.reader.tree.tree import Tree
from backyfs.reader.tree.vm import Clock

__all__ = ["ROOT", "Clock", "Inodes", "Kind", "NoEntry", "Node", "Opened", "Tree"]
