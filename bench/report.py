"""The result of a run as tables for people and as JSON for machines."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.bars import Verdict
from bench.ledger import Ledger

_MIB = 1 << 20
_WHAT = {
    "wall_s": "time",
    "cpu_s": "processor time",
    "rss_bytes": "peak memory",
    "stored_bytes": "stored",
    "allocated_bytes": "written",
}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": cpu,
        "processors": len(os.sched_getaffinity(0)),
        "memory_bytes": pages * page,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> Iterator[str]:
    """Columns as wide as their longest cell; the first `left` of them aligned to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, ["-" * width for width in widths], *rows):
        cells = zip(row, widths, strict=True)
        aligned = (
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(cells)
        )
        yield "  ".join(aligned).rstrip()


def samples(ledger: Ledger) -> Iterator[str]:
    """Medians of everything measured."""
    rows = []
    for line, sides in ledger.lines():
        for side, taken in sides.items():
            figures = (
                _median(ledger.values(line, side, quantity), scale, digits)
                for quantity, scale, digits in (
                    ("wall_s", 1.0, 3),
                    ("cpu_s", 1.0, 2),
                    ("rss_bytes", _MIB, 0),
                    ("stored_bytes", 1e6, 3),
                    ("allocated_bytes", 1e6, 3),
                )
            )
            rows.append((line, side, *figures, str(len(taken))))
    head = ("line", "side", "wall s", "CPU s", "RSS MiB", "stored MB", "on disk MB", "n")
    yield from _table(head, rows, 2)
    for (line, side), reason in ledger.failures.items():
        yield f"not measured: {line}, {side}: {reason}"


def _median(values: list[float], scale: float, digits: int) -> str:
    return f"{statistics.median(values) / scale:.{digits}f}" if values else ""


def bars(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Every bar with the ratio found, its spread and whether it holds."""
    rows = []
    for verdict in verdicts:
        bar, found = verdict.bar, verdict.found
        number = _ratio if bar.floor or bar.quantity.endswith("_s") else _bytes
        at = "" if bar.at is None else f" {bar.at + 1}"
        rows.append(
            (
                f"{bar.line}{at}",
                bar.side,
                _WHAT[bar.quantity],
                bar.floor,
                number(found.value),
                f"{number(found.low)}-{number(found.high)}",
                number(bar.limit),
                "holds" if verdict.holds else "MISSED",
            )
        )
    head = ("line", "side", "what", "floor", "found", "spread", "bar", "")
    yield from _table(head, rows, 4)
    missed = sum(not verdict.holds for verdict in verdicts)
    yield f"{len(verdicts) - missed} of {len(verdicts)} bars hold"


def _ratio(value: float) -> str:
    return f"{value:.3f}"


def _bytes(value: float) -> str:
    return f"{value / _MIB:.0f}M" if value >= 10 * _MIB else f"{value / 1024:.0f}K"
