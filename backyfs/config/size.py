"""Numbers of bytes as people write them: 65536, 512K, 50M, 1.5GiB (always powers of 1024)."""

from __future__ import annotations

import re

from backyfs.errors import UsageError

_UNITS = ("", "K", "M", "G", "T", "P")
_FORM = re.compile(r"([0-9]{1,19}(?:\.[0-9]{1,6})?) ?([KMGTP]?)(?:i?B)?", re.ASCII | re.IGNORECASE)


def parse_size(value: str | int) -> int:
    """Bytes, at least 1; UsageError when `value` is no number of bytes."""
    found = _FORM.fullmatch(str(value).strip())
    count = _count(found[1], found[2]) if found else 0
    if isinstance(value, bool) or count < 1:
        raise UsageError(
            f"{value!r} is no number of bytes", hint="write it like 65536, 512K, 50M or 1.5G"
        )
    return count


def _count(number: str, unit: str) -> int:
    whole, _, part = number.partition(".")
    return int(int(whole + part) * 1024 ** _UNITS.index(unit.upper()) // 10 ** len(part))


def format_size(count: int) -> str:
    """A text that `parse_size` reads as `count`, with the largest unit that is whole."""
    for power in range(len(_UNITS) - 1, 0, -1):
        if count % 1024**power == 0:
            return f"{count // 1024**power}{_UNITS[power]}"
    return str(count)
