"""Numbers of bytes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backyfs.config.size import format_size, parse_size
from backyfs.errors import UsageError


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), (4096, 4096), ("512K", 512 << 10), ("50 MiB", 50 << 20), ("1.5G", 3 << 29)],
)
def test_what_is_understood(text: str | int, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "0", "-1", "M", "5X", "1e3", "0.1", True, 0, "5 M B"])
def test_what_is_not(text: str | int) -> None:
    with pytest.raises(UsageError, match="is no number of bytes"):
        parse_size(text)


@given(st.integers(1, 1 << 60))
def test_what_is_written_reads_back(count: int) -> None:
    assert parse_size(format_size(count)) == count
