"""What was measured: samples by line (what was done) and side (who did it).

Sample number i of every side of a line was taken in round i, one side right after the other, so
ratios are of neighbours in time and noise that lasts longer than a round cancels out.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement; None where a quantity has no meaning or was not taken.

    wall_s, cpu_s: seconds · rss_bytes: peak memory of the largest process · stored_bytes: length
    of new files · allocated_bytes: disk space of new files.
    """

    wall_s: float | None = None
    cpu_s: float | None = None
    rss_bytes: int | None = None
    stored_bytes: int | None = None
    allocated_bytes: int | None = None


QUANTITIES = ("wall_s", "cpu_s", "rss_bytes", "stored_bytes", "allocated_bytes")


@dataclass(frozen=True, slots=True)
class Spread:
    """A set of values: the one that stands for all, the smallest, the largest, how many."""

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def median(cls, values: list[float]) -> Spread:
        """The spread of at least one value, for which their median stands."""
        return cls(statistics.median(values), min(values), max(values), len(values))


class Ledger:
    """The samples of one run, and the sides that failed."""

    def __init__(self) -> None:
        self._samples: dict[str, dict[str, list[Sample]]] = {}
        self._failures: dict[tuple[str, str], str] = {}

    def add(self, line: str, side: str, sample: Sample) -> None:
        """Append the sample of one round."""
        self._samples.setdefault(line, {}).setdefault(side, []).append(sample)

    def fail(self, line: str, side: str, reason: str) -> None:
        """Note that a side cannot be measured; the first reason stays."""
        self._failures.setdefault((line, side), reason)

    def failed(self, line: str, side: str) -> bool:
        """Whether a side of a line was given up."""
        return (line, side) in self._failures

    @property
    def failures(self) -> Mapping[tuple[str, str], str]:
        """Why (line, side) was given up."""
        return self._failures

    def lines(self) -> Iterator[tuple[str, Mapping[str, list[Sample]]]]:
        """Lines and their sides, in the order in which they were first measured."""
        yield from self._samples.items()

    def values(self, line: str, side: str, quantity: str) -> list[float]:
        """One quantity of a side in every round that has it."""
        samples = self._samples.get(line, {}).get(side, [])
        found = (getattr(sample, quantity) for sample in samples)
        return [float(value) for value in found if value is not None]

    def ratios(self, line: str, side: str, floor: str, quantity: str) -> list[float]:
        """`side` over `floor`, round by round."""
        ours, theirs = (self.values(line, name, quantity) for name in (side, floor))
        return [a / b for a, b in zip(ours, theirs, strict=False) if b > 0]

    def as_json(self) -> dict[str, Any]:
        """All samples and failures as JSON values."""
        return {
            "samples": {
                line: {
                    side: [asdict(sample) for sample in samples] for side, samples in sides.items()
                }
                for line, sides in self._samples.items()
            },
            "failures": [
                {"line": line, "side": side, "reason": reason}
                for (line, side), reason in self._failures.items()
            ],
        }
