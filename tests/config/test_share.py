"""Shares as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backyfs.config.share import format_percent, parse_percent
from backyfs.errors import UsageError


@pytest.mark.parametrize(
    ("text", "percent"),
    [("1%", 1.0), ("0.25 %", 0.25), ("100%", 100.0), ("0%", 0.0), (" 0.0001% ", 0.0001)],
)
def test_what_is_understood(text: str, percent: float) -> None:
    assert parse_percent(text) == percent


@pytest.mark.parametrize("text", ["", "%", "1", 1, "101%", "-1%", "1e1%", "0.00001%", "one", True])
def test_what_is_not(text: str | int) -> None:
    with pytest.raises(UsageError, match="is no share"):
        parse_percent(text)


@settings(deadline=None)
@given(st.integers(0, 1_000_000))
def test_what_is_written_reads_back(count: int) -> None:
    percent = count / 10_000
    assert parse_percent(format_percent(percent)) == percent
