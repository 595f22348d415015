"""The `packs` format: compressed frames in few files, small increments; moves with cp and rsync.

- table: the bytes of a pack's table; packfile: one open pack; segment: packs and segments written
- extents: the map of a disk, which frame is stored where; codec: frames and patches
- library: the packs of a repository, read; image: a disk of a revision (StoredImage)
- writer: a revision in the making (DiskWriter); heal: good frames in the place of damaged ones
- reach: what maps rest on; occupancy: what only one revision needs; gc: freeing what none does
- rewrite: packs written anew
- fsck: the invariants
- strategy: the Format
"""
