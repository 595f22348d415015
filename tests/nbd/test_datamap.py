"""Where data lies: against a plain walk over the extents."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from backyfs.model import FRAME, Extent
from backyfs.nbd.datamap import DataMap, Piece

END = 200


@st.composite
def _extents(draw: st.DrawFn) -> list[Extent]:
    borders = sorted(draw(st.sets(st.integers(0, END), max_size=20)))
    return [Extent(a, b - a) for a, b in zip(borders[::2], borders[1::2], strict=False)]


@given(_extents(), st.integers(0, END), st.integers(0, END))
@settings(max_examples=300, deadline=None)
def test_pieces_cover_the_range_and_tell_the_truth(
    extents: list[Extent], one: int, other: int
) -> None:
    stored = {byte for extent in extents for byte in range(extent.offset, extent.end)}
    start, end = sorted((one, other))
    found = DataMap(extents)
    pieces = list(found.pieces(start, end))
    assert [byte for piece in pieces for byte in range(piece.offset, piece.end)] == list(
        range(start, end)
    )
    for piece in pieces:
        assert {byte in stored for byte in range(piece.offset, piece.end)} == {piece.stored}
    if start < end:
        assert found.stored(start, end) == (pieces == [Piece(start, end, True)])
        assert found.hole(start, end) == (pieces == [Piece(start, end, False)])


def test_too_many_extents_join_over_the_smallest_holes() -> None:
    # 40 extents; the holes between them are one frame, and every tenth is a hundred.
    extents, at = [], 0
    for number in range(40):
        extents.append(Extent(at, FRAME))
        at += FRAME * (101 if number % 10 == 9 else 2)
    found = DataMap(extents, extents_max=16)
    assert len(found) <= 16
    pieces = list(found.pieces(0, at))
    assert [piece.stored for piece in pieces] == [True, False] * 4
    for piece in pieces:
        if not piece.stored:
            assert not any(piece.offset < e.end and e.offset < piece.end for e in extents)
    assert all(a.end == b.offset for a, b in pairwise(pieces))


def test_a_hole_at_either_end_and_nothing_at_all() -> None:
    assert list(DataMap([]).pieces(5, 9)) == [Piece(5, 9, False)]
    assert list(DataMap([Extent(3, 2)]).pieces(0, 9)) == [
        Piece(0, 3, False),
        Piece(3, 5, True),
        Piece(5, 9, False),
    ]
    assert not DataMap([]).stored(0, 1)
