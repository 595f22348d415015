"""Extents gathered in bounded memory: nothing is lost, and little is added."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backyfs.extents import Gathered, joined
from backyfs.model import Extent

steps = st.lists(st.tuples(st.integers(0, 300_000), st.integers(1, 100_000)), max_size=200)


def placed(steps: list[tuple[int, int]]) -> list[Extent]:
    """Extents in ascending order, from gaps and lengths."""
    found, position = [], 0
    for gap, length in steps:
        found.append(Extent(position + gap, length))
        position += gap + length
    return found


@given(steps)
def test_few_extents_stay_as_they_are(steps: list[tuple[int, int]]) -> None:
    gathered = Gathered()
    for extent in placed(steps):
        gathered.add(*extent)
    assert gathered.extents() == list(joined(placed(steps)))


@given(steps, st.integers(2, 50))
def test_many_become_fewer(steps: list[tuple[int, int]], most: int) -> None:
    gathered = Gathered(most)
    for extent in placed(steps):
        gathered.add(*extent)
    found = gathered.extents()
    assert len(found) <= most
    assert list(joined(sorted([*found, *placed(steps)]))) == found


def test_what_is_out_of_order_is_refused() -> None:
    gathered = Gathered()
    gathered.add(10, 5)
    with pytest.raises(ValueError, match="out of order"):
        gathered.add(3, 2)
