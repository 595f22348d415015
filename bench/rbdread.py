"""Read what a source of RBD images says may hold data, as a backup does: rbdread.py POOL IMAGE."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from backyfs.model import Extent
from backyfs.source import registry
from backyfs.source.contract import DiskSnapshot

_THREADS = 4
_PIECE = 4 << 20


def main() -> None:
    pool, image = sys.argv[1:]
    source = registry.make("ceph-rbd", {"pool": pool, "image": image})
    with source.snapshot("bench", {}) as snapshot:
        for disk in snapshot.disks.values():
            _read(disk)


def _read(disk: DiskSnapshot) -> None:
    with ThreadPoolExecutor(_THREADS) as threads:
        for count in threads.map(lambda piece: len(disk.read(*piece)), _pieces(disk)):
            assert count


def _pieces(disk: DiskSnapshot) -> Iterator[Extent]:
    """The data in pieces that end where objects do."""
    for offset, length in disk.data():
        end = offset + length
        while offset < end:
            stop = min(end, (offset // _PIECE + 1) * _PIECE)
            yield Extent(offset, stop - offset)
            offset = stop


if __name__ == "__main__":
    main()
