"""The table of jobs, as the console and `backyfs jobs` show it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any

_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60))


def jobs_table(rows: Iterable[Mapping[str, Any]], zone: str) -> str:
    """Rows of `state.row`, as Backy shows them; times are local, `zone` is what they are in."""
    header = (
        "Job",
        "SLA",
        "SLA overdue",
        "Status",
        f"Last Backup ({zone})",
        "Last Tags",
        "Last Duration",
        f"Next Backup ({zone})",
        "Next Tags",
    )
    lines = [
        [
            row["job"],
            row["sla"],
            span(row["sla_overdue"]) if row["sla_overdue"] else "-",
            row["status"],
            local(row["last_time"]),
            row["last_tags"] or "-",
            span(row["last_duration"]) if row["last_duration"] is not None else "-",
            local(row["next_time"]),
            row["next_tags"] or "-",
        ]
        for row in rows
    ]
    return piped(header, lines)


def counted(number: int, shown: int) -> str:
    """The line below the table."""
    noun = "job" if shown == 1 else "jobs"
    return f"{shown} {noun} shown" + (f" of {number}" if shown != number else "")


def piped(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns between bars."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def selected(name: str, pattern: str) -> bool:
    """Whether a job is meant by what somebody typed: a part of its name, or with * and ?.

    No regular expressions: the wrong one would keep the scheduler busy for years.
    """
    pattern = pattern.replace(".*", "*")
    if not any(char in pattern for char in "*?["):
        return pattern in name
    return fnmatchcase(name, pattern)


def local(time: str | None) -> str:
    """An ISO time in the local zone, to the second."""
    return f"{datetime.fromisoformat(time).astimezone():%Y-%m-%d %H:%M:%S}" if time else "-"


def span(seconds: float) -> str:
    """A length of time in one or two units: 5 s, 12 min, 3 h 20 min, 2 d 4 h."""
    rest = round(seconds)
    if rest < 60:
        return f"{rest} s"
    parts: list[str] = []
    for unit, length in _UNITS:
        count, rest = divmod(rest, length)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(part for part in parts[:2] if not part.startswith("0 "))
