"""Having processes check what a command reads of a repository (store/packs/decoders.py).

Where little is read, none is started: only the one that would start them (2 ms).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from backyfs.store.identity import PACKS
from backyfs.store.repository import Repository


@contextmanager
def decoding(repository: Repository) -> Iterator[None]:
    """Within, they help; nothing of `cow` is decoded.

    Enter it while the process has one thread: before sources, progress and trio.
    """
    if repository.store != PACKS:
        yield
        return
    from backyfs.store.packs.decoders import decoders

    with decoders(at_once=False):
        yield
