"""Schedules: how often a revision is made for each tag, and how many are kept.

An interval is the time between two revisions with the tag; retention takes the tag away from
those beyond the newest `keep` that are also older than keep times interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from backyfs.config.interval import parse_interval
from backyfs.errors import UsageError
from backyfs.model import tag_name

if TYPE_CHECKING:
    from backyfs.config.document import Document, Node

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


def read_schedule(document: Document, node: Node, named: Mapping[str, Schedule]) -> Schedule:
    """The rules of a schedule that is written out at `node`, or the one of `named` it names."""
    if node.id != "mapping":
        name = document.text(node, "schedule") or ""
        if name and name not in named:
            document.problem(node, f"no schedule {name!r}{document.suggestion(name, named)}")
        return named.get(name, DAILY)
    rules = {}
    for tag, rule in document.mapping(node, "schedule").items():
        if document.accept(rule, _schedule_tag, tag):
            rules[tag] = _rule(document, rule, tag)
    if not node.value:
        document.problem(node, "the schedule has no tags")
    return rules


def _schedule_tag(text: str) -> str:
    if text.startswith(MANUAL):
        raise UsageError(f"{text!r}: tags with {MANUAL!r} are set by hand, not by a schedule")
    return tag_name(text)


def _rule(document: Document, node: Node, tag: str) -> Rule:
    found = document.mapping(node, tag, ("interval", "keep"))
    for key in ("interval", "keep"):
        if key not in found and node.id == "mapping":
            document.problem(node, f"{tag} has no {key!r}")
    interval = None
    if "interval" in found:
        value = document.plain(found["interval"])
        if isinstance(value, str | int):
            interval = document.accept(found["interval"], parse_interval, value)
        elif value is not None:
            document.problem(found["interval"], "an interval is a number of seconds, or like 1d")
    keep = document.integer(found["keep"], "keep", 1) if "keep" in found else None
    return Rule(interval or 1, keep or 1)
