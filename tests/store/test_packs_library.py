"""The pack files of a repository: what is remembered of those that cannot be read."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import pytest

from backyfs.errors import Corrupt
from backyfs.store.packs.library import Library


def test_a_pack_without_a_table_costs_no_memory_each_time(tmp_path: Path) -> None:
    (tmp_path / "one.pack").write_bytes(bytes(5000))
    library = Library(tmp_path)

    def look(times: int) -> None:
        for _ in range(times):
            with pytest.raises(Corrupt, match="segment one cannot be read"):
                library.segment("one")

    look(10)
    tracemalloc.start()
    try:
        look(10)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        look(500)  # a guest that tries again, a `dd` through the whole disk
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 100_000
