"""What differs between two images, and the stream for rbd import-diff that says so."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backyfs.errors import Corrupt
from backyfs.model import FRAME, Extent
from backyfs.restore.difference import Change, differences
from backyfs.restore.diffstream import HEADER, Names, StreamReport, write
from backyfs.restore.regular import NewFile
from tests.restore.memory import MemoryImage, images, made

GROUP = 1024 * FRAME


def test_a_difference_is_whole_frames() -> None:
    old, new = made(9 * FRAME, [1, 2, 5]), made(9 * FRAME, [1, 2, 5, 6])
    assert list(differences(old, old)) == []
    assert list(differences(old, new)) == [(Extent(6 * FRAME, FRAME), False)]
    assert list(differences(new, old)) == [(Extent(6 * FRAME, FRAME), True)]
    assert list(differences(None, old)) == [
        (Extent(FRAME, 2 * FRAME), False),
        (Extent(5 * FRAME, FRAME), False),
    ]


def test_equal_groups_are_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = (made(2 * GROUP + 5, [3, 4, frame]) for frame in (1030, 1040))
    asked: list[int] = []
    hashes = MemoryImage.hashes

    def counting(self: MemoryImage, first: int, count: int) -> bytes:
        asked.append(first)
        return hashes(self, first, count)

    groups = {id(image): image.groups() for image in (old, new)}
    monkeypatch.setattr(MemoryImage, "groups", lambda self: groups[id(self)])
    monkeypatch.setattr(MemoryImage, "hashes", counting)
    assert [extent.offset // FRAME for extent, _ in differences(old, new)] == [1030, 1040]
    assert asked == [1024, 1024]


@settings(max_examples=40, deadline=None)
@given(old=images() | st.none(), new=images())
def test_the_old_and_the_differences_make_the_new(
    old: MemoryImage | None, new: MemoryImage
) -> None:
    content = bytearray((old.content if old else b"")[: new.size].ljust(new.size, b"\0"))
    found = list(differences(old, new))
    for extent, zero in found:
        data = new.content[extent.offset : extent.end]
        assert (data == bytes(extent.length)) == zero
        content[extent.offset : extent.end] = data
    assert bytes(content) == new.content
    for extent, _ in found:  # nothing is listed that is equal
        for at in range(extent.offset, extent.end, FRAME):
            before = (old.content if old else b"")[at : at + FRAME]
            assert before.rstrip(b"\0") != new.content[at : at + FRAME].rstrip(b"\0")


def test_a_frame_that_was_cut_off_is_another_one() -> None:
    old, new = made(2 * FRAME, [1]), made(FRAME + 4, [1])
    assert old.content[: new.size] == new.content  # which hashes of whole frames cannot tell
    assert list(differences(old, new)) == [(Extent(FRAME, 4), False)]


# ---- the stream --------------------------------------------------------------------------------


def stream(
    old: MemoryImage | None, new: MemoryImage, path: Path, names: Names
) -> tuple[StreamReport, bytes]:
    path.unlink(missing_ok=True)
    target = NewFile(path, 0)
    try:
        report = write(new, differences(old, new), names, target)
    finally:
        target.abandon()
    return report, path.read_bytes()


def records(data: bytes) -> Iterator[tuple[bytes, Any]]:
    """The records of a stream, by the format's description."""
    assert data.startswith(HEADER)
    at = len(HEADER)
    while True:
        kind, at = data[at : at + 1], at + 1
        if kind in (b"f", b"t"):
            (length,) = struct.unpack_from("<I", data, at)
            yield kind, data[at + 4 : at + 4 + length].decode()
            at += 4 + length
        elif kind == b"s":
            yield kind, struct.unpack_from("<Q", data, at)[0]
            at += 8
        elif kind in (b"w", b"z"):
            offset, length = struct.unpack_from("<QQ", data, at)
            at += 16
            yield kind, (offset, length if kind == b"z" else data[at : at + length])
            at += length if kind == b"w" else 0
        else:
            assert kind == b"e"
            assert at == len(data)
            return


def test_a_stream(tmp_path: Path) -> None:
    old, new = made(90 * FRAME, [1, *range(10, 20)]), made(80 * FRAME + 7, [1, *range(29, 70)])
    report, data = stream(old, new, tmp_path / "diff", Names("before", "after é"))
    found = list(records(data))
    assert found[:3] == [(b"f", "before"), (b"t", "after é"), (b"s", new.size)]
    assert found[3] == (b"z", (10 * FRAME, 10 * FRAME))
    assert [(offset, len(content)) for _, (offset, content) in found[4:]] == [
        (29 * FRAME, 3 * FRAME),  # cut where batches are
        (32 * FRAME, 32 * FRAME),
        (64 * FRAME, 6 * FRAME),
    ]
    assert report == StreamReport(41 * FRAME, 10 * FRAME, len(data))
    _, data = stream(None, new, tmp_path / "diff", Names("", ""))
    assert [kind for kind, _ in records(data)][:2] == [b"s", b"w"]


def test_zeros_are_cut_to_what_librbd_takes(tmp_path: Path) -> None:
    size = 5 << 30

    class Gone(MemoryImage):
        size = 5 << 30

    found = write(
        Gone(b"", []),
        [Change(Extent(0, size), True)],
        Names("", ""),
        target := NewFile(tmp_path / "diff", 0),
    )
    target.abandon()
    assert found.zeros == size
    _, *zeros = records((tmp_path / "diff").read_bytes())
    assert zeros == [(b"z", (at, 1 << 30)) for at in range(0, size, 1 << 30)]


def test_damage_leaves_no_complete_stream(tmp_path: Path) -> None:
    new = made(80 * FRAME, range(80), [70])
    with pytest.raises(Corrupt):
        stream(None, new, tmp_path / "diff", Names("", ""))
    assert list(tmp_path.iterdir()) == []
