"""The `cow` format: a revision's disk is a sparse raw file that shares blocks with its parent's.

- blocks: frames and 4 KiB blocks in memory (pure)
- reflink: what is asked of btrfs and XFS: clones, holes, extents
- table: the .sum file, frame hashes and what proves them
- image: reading a disk (StoredImage)
- damage: recording bad frames; healing: writing good ones in their place
- target: the unfinished files of a disk; writer: what goes into them (DiskWriter)
- stage: the disks of a revision in the making; strategy: the Format
"""

from __future__ import annotations

from backyfs.store.cow.reflink import is_btrfs, prepare_directory
from backyfs.store.cow.strategy import CowFormat

__all__ = ["CowFormat", "is_btrfs", "prepare_directory"]
