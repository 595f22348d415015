"""Having processes decode what is restored.

Threads that decode do not add up: patches on patches are short calls, each of which gives the
interpreter's lock away and waits for it (docs/mount.md, section 3). The last of eleven revisions
took 3.7 s to a file, and takes 1.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from backyfs.restore.reading import Room, anonymous
from backyfs.restore.target import BATCH_BYTES
from backyfs.store.contract import StoredImage

DATA_MIN = 64 << 20
"""Bytes of data from which on starting processes is worth it."""


@contextmanager
def decoding(image: StoredImage, target: str) -> Iterator[Room]:
    """Memory that processes decode into; that of this process where they would be of no use.

    Enter it while the process has one thread: one with more, such as those of librbd, is not to be
    forked, which is why images of Ceph are restored without.
    """
    if image.raw_fd() is not None or image.data < DATA_MIN or target.startswith("rbd:"):
        yield anonymous
        return
    from backyfs.store.packs.decoders import decoders

    with decoders(block_bytes=BATCH_BYTES) as helping:
        yield helping.room if helping.pids else anonymous
