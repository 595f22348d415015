"""Lengths of time as people write them: 90 (seconds), 30m, 1d, 1d12h, 2w."""

from __future__ import annotations

import re

from backyfs.errors import UsageError

_UNITS = {"w": 604_800, "d": 86_400, "h": 3_600, "m": 60, "s": 1}
_FORM = re.compile("".join(rf"(?:(?P<{unit}>[0-9]{{1,9}}){unit})?" for unit in _UNITS), re.ASCII)
_SECONDS_MAX = 100 * 366 * 86_400


def parse_interval(value: str | int) -> int:
    """Seconds, at least 1; UsageError when `value` is no interval or longer than a century."""
    seconds = value if isinstance(value, int) else _seconds(value.strip())
    if isinstance(value, bool) or not 1 <= seconds <= _SECONDS_MAX:
        raise UsageError(
            f"{value!r} is no interval",
            hint="write seconds, or numbers with units from large to small: 30m, 1d, 1d12h, 2w",
        )
    return seconds


def _seconds(text: str) -> int:
    """The seconds in a text, 0 when it is of another form."""
    if re.fullmatch("[0-9]{1,10}", text, re.ASCII):
        return int(text)
    found = _FORM.fullmatch(text)
    if not found:
        return 0
    return sum(int(count) * _UNITS[unit] for unit, count in found.groupdict(default="0").items())


def format_interval(seconds: int) -> str:
    """A text that `parse_interval` reads as `seconds`; in weeks only when they are whole weeks."""
    parts = []
    for unit, length in _UNITS.items():
        if unit == "w" and seconds % length:
            continue
        count, seconds = divmod(seconds, length)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)
