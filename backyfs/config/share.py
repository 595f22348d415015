"""A share of a whole as people write it: 1%, 0.25%, 100%."""

from __future__ import annotations

import re

from backyfs.errors import UsageError

_FORM = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,4})?) ?%", re.ASCII)


def parse_percent(value: str | int) -> float:
    """Percent, 0 to 100; UsageError when `value` is no such share."""
    found = _FORM.fullmatch(str(value).strip())
    percent = float(found[1]) if found else -1.0
    if not 0 <= percent <= 100:
        raise UsageError(f"{value!r} is no share", hint="write it like 1%, 0.25% or 100%")
    return percent


def format_percent(percent: float) -> str:
    """A text that `parse_percent` reads as `percent`."""
    return f"{percent:.7g}%"
