"""Schedules: how often a revision is made for each tag, and how many are kept.

An interval is the time between two revisions with the tag; retention takes the tag away from
those beyond the newest `keep` that are also older than keep times interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

MANUAL = "manual:"
"""Tags that begin so are set by people, are in no schedule and never run out."""

_HOUR = 3_600
_DAY = 24 * _HOUR


class Rule(NamedTuple):
    """One tag of a schedule: a revision every `interval_s` seconds, `keep` of them (both >= 1)."""

    interval_s: int
    keep: int


Schedule = Mapping[str, Rule]
"""Rules by tag, in the order they were written."""

_LONG_TERM = {
    "daily": Rule(_DAY, 10),
    "weekly": Rule(7 * _DAY, 5),
    "monthly": Rule(30 * _DAY, 4),
}

DAILY: Schedule = MappingProxyType(_LONG_TERM)
HOURLY: Schedule = MappingProxyType({"hourly": Rule(_HOUR, 25), **_LONG_TERM})

BUILT_IN: Mapping[str, Schedule] = MappingProxyType({"daily": DAILY, "hourly": HOURLY})
"""Schedules that need not be written down, by name."""
