"""How results look: tables, sizes, durations, dates, JSON lines, warnings.

Results go to stdout, everything else to stderr. Times are shown in the local zone, which the
header names; in JSON they are UTC, ISO 8601, with a Z.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import click

from backyfs.cli.session import Session

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(count: int) -> str:
    """Bytes for people: `512 bytes`, `1.5 GiB`."""
    value = float(count)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds for people: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def local(time: datetime) -> str:
    """A time in the local zone, to the second."""
    return f"{time.astimezone():%Y-%m-%d %H:%M:%S}"


def zone(now: datetime) -> str:
    """The name of the local zone, for a column's header: `CET`, `UTC`, `+0330`."""
    return now.astimezone().tzname() or "local time"


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()
) -> str:
    """Aligned columns under their names; the numbers in `right` are right-aligned columns."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def line(text: str) -> None:
    """Print a line of the result on stdout."""
    click.echo(text)


def json_line(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print one JSON value on one line on stdout; ASCII, which no locale can spoil."""
    click.echo(json.dumps(value))


def say(session: Session, text: str) -> None:
    """Tell a person on stderr how it went; not with -q."""
    if not session.quiet:
        print(text, file=sys.stderr)


def warn(text: str, *, as_json: bool = False) -> None:
    """Print a warning on stderr (also with -q: it is about data, not about progress)."""
    if as_json:
        print(json.dumps({"message_type": "warning", "message": text}), file=sys.stderr)
    else:
        print(f"backyfs: warning: {text}", file=sys.stderr)
