"""A random order that is computed: each number once, none preferred."""

from __future__ import annotations

import random
from collections import Counter
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backyfs.engine.shuffle import shuffled


@settings(deadline=None)
@given(st.integers(0, 600), st.integers())
def test_each_number_once(count: int, seed: int) -> None:
    assert sorted(shuffled(count, random.Random(seed))) == list(range(count))


@pytest.mark.parametrize("count", [7, 64, 300])
def test_every_number_is_as_likely_to_be_among_the_first(count: int) -> None:
    runs, size = 1000, count // 4 + 1
    drawn: Counter[int] = Counter()
    for seed in range(runs):
        drawn.update(islice(shuffled(count, random.Random(seed)), size))
    expected = runs * size / count
    spread = (expected * (1 - size / count)) ** 0.5
    assert all(abs(drawn[number] - expected) < 5 * spread for number in range(count))


def test_neighbours_are_not_drawn_together() -> None:
    """Nor kept apart: as many pairs in a sample are neighbours as chance has it."""
    pairs = 0
    for seed in range(150):
        sample = sorted(islice(shuffled(2000, random.Random(seed)), 200))
        pairs += sum(b - a == 1 for a, b in pairwise(sample))
    assert 0.88 < pairs / (150 * 199 * 200 / 2000) < 1.12


def test_a_long_way_into_a_large_range_costs_nothing() -> None:
    first = list(islice(shuffled(1 << 60, random.Random(1)), 1000))
    assert len(set(first)) == 1000
    assert max(first) > 1 << 59
