"""The `cow` format: a revision's disk is a sparse raw file that shares blocks with its parent's.

- blocks: frames and 4 KiB blocks in memory (pure)
- reflink: what is asked of btrfs and XFS (clones, holes); fiemap: where blocks lie, who shares them
- table: the .sum file, frame hashes and what proves them; columns: its hashes by group
- files: finding and opening the two files of a disk; image: reading it (StoredImage)
- checking: finding bad frames; damage: recording them; healing: writing good ones in their place
- target: the unfinished files of a disk; deferred: made late, others not waiting for it
- writer: what goes into them (DiskWriter)
- stage: the disks of a revision in the making; strategy: the Format
"""
