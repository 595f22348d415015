"""Segments while they are written: how often, and what a failure means for all that append."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest

from backyfs.errors import NoSpace
from backyfs.store.contract import Buffer
from backyfs.store.fs import Fs
from backyfs.store.packs.packfile import PackFile
from backyfs.store.packs.segment import PIECES_MAX, WRITE_BYTES, Prepared, SegmentWriter
from backyfs.store.quarantine import Bad


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
    segments = SegmentWriter(tmp_path, "20261122T000000Z-aaaa", uuid4(), FullAfter(2))
    frame = Prepared(bytes(WRITE_BYTES), bytes(32))
    segments.append([frame])
    for _ in range(3):
        with pytest.raises(NoSpace, match="no space left"):
            segments.append([frame])
    with pytest.raises(NoSpace):
        segments.finish()
    segments.close()


class Lengths(Fs):
    """Notes how many bytes each writev has."""

    def __init__(self) -> None:
        self.written: list[int] = []

    def writev(self, fd: int, pieces: Sequence[Buffer], path: object = "the store") -> None:
        super().writev(fd, pieces, path)
        self.written.append(sum(map(len, pieces)))


def test_small_frames_are_written_together_and_large_ones_do_not_wait(tmp_path: Path) -> None:
    fs = Lengths()
    segments = SegmentWriter(tmp_path, "20261122T000000Z-aaaa", uuid4(), fs)
    for number in range(3000):
        segments.append([Prepared(number.to_bytes(2) * 500, bytes(32))])
    assert len(fs.written) == 3000 // PIECES_MAX
    segments.append([Prepared(bytes(2 * WRITE_BYTES), bytes(32))])
    assert fs.written[-1] > 2 * WRITE_BYTES
    segments.finish()
    stored = (tmp_path / "20261122T000000Z-aaaa-0.pack").read_bytes()
    assert len(stored) == sum(fs.written) == segments.stored_bytes
    assert b"".join(number.to_bytes(2) * 500 for number in range(3000)) in stored


@pytest.mark.parametrize("limit", ["SEGMENT_FRAMES_MAX", "NAMES_MAX"])
def test_a_segment_ends_before_its_table_is_too_large(
    tmp_path: Path, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of frames, and of other segments that patches rest on, of which an entry counts 65,534."""
    monkeypatch.setattr(f"backyfs.store.packs.segment.{limit}", 7)
    segments = SegmentWriter(tmp_path, "20261122T000000Z-aaaa", uuid4(), Fs())
    for number in range(8):
        bases = [Bad(f"20261122T000000Z-{number:04}-{n}", 0) for n in range(3)]
        segments.append([Prepared(bytes(9), bytes(32), 1, base) for base in bases])
    segments.finish()
    assert len(segments.finished) == 4
    for path in tmp_path.iterdir():
        with closing(PackFile(path)) as pack:
            (found,) = pack.footer.segments
            assert found.count == 6
            assert len(pack.footer.names) == 7
