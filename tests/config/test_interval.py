"""Intervals as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backyfs.config import format_interval, parse_interval
from backyfs.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90), (90, 90), ("90s", 90), ("30m", 1800), ("1h", 3600), ("1d", 86_400),
        ("2w", 1_209_600), ("1d12h", 129_600), ("1w1d1h1m1s", 694_861), (" 1d ", 86_400),
    ],
)  # fmt: skip
def test_known_forms(text: str | int, seconds: int) -> None:
    assert parse_interval(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "0", "0d", "d", "1x", "1h1d", "1d1d", "1.5h", "-1d", "1 d 2 h", "٣d", "9" * 5000,
     True, -1, 0, 101 * 366 * 86_400],
)  # fmt: skip
def test_other_forms_are_refused(text: str | int) -> None:
    with pytest.raises(UsageError, match="is no interval"):
        parse_interval(text)


@given(st.integers(1, 100 * 366 * 86_400))
def test_formatting_is_the_inverse(seconds: int) -> None:
    assert parse_interval(format_interval(seconds)) == seconds
