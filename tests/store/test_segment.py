"""Segments while they are written: a failure is the same for every thread that appends."""

from __future__ import annotations

import errno
from pathlib import Path
from uuid import uuid4

import pytest

from backyfs.errors import NoSpace
from backyfs.store.fs import Fs
from backyfs.store.packs.segment import Prepared, SegmentWriter


class FullAfter(Fs):
    """A file system that is full from the write number `left` on, and empty again after it."""

    def __init__(self, left: int) -> None:
        self.left = left

    def call(self, name: str) -> None:
        if name == "writev":
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.ENOSPC, "full")


def test_appending_after_a_failure_fails_for_its_reason(tmp_path: Path) -> None:
    segments = SegmentWriter(tmp_path, "20261122T000000Z-aaaa", uuid4(), FullAfter(3))
    frame = Prepared(b"stored", bytes(32))
    segments.append([frame])
    for _ in range(3):
        with pytest.raises(NoSpace, match="no space left"):
            segments.append([frame])
    with pytest.raises(NoSpace):
        segments.finish()
    segments.close()
