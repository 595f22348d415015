"""Quarantine: one small record per stored frame that was found damaged.

A unit is what holds stored frames: a segment (packs) or a disk image (cow). Records are created
with O_EXCL by whoever finds the damage (verify, scrub, a backup, a reader) and removed by whoever
reads the frame well again. Damage of revisions is computed from here, never written into them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from backyfs.errors import Corrupt, NoSpace
from backyfs.store.fs import SYSTEM, Fs, publish_new, read_file, why_unwritten
from backyfs.store.record import sealed, timestamp, unsealed

WHOLE = -1
"""In place of a number: all frames of the unit (its table is unreadable)."""


class Bad(NamedTuple):
    """A damaged stored frame: number `number` of `unit`."""

    unit: str
    number: int


class Finding(NamedTuple):
    """A quarantine record: the frame, why it is bad and where it was met."""

    bad: Bad
    reason: str
    revision: str
    disk: str
    offset: int
    found: str


class Quarantine:
    """The quarantine directory of a repository. Safe from many threads.

    `refused`: why a damaged frame could not be recorded, the last time that happened, or "".
    """

    def __init__(self, directory: Path, fs: Fs = SYSTEM) -> None:
        self._directory, self._fs = directory, fs
        self.refused = ""

    def _path(self, bad: Bad) -> Path:
        number = "all" if bad.number == WHOLE else str(bad.number)
        return self._directory / f"{bad.unit}.{number}.json"

    def add(
        self, bad: Bad, reason: str, *, revision: str = "", disk: str = "", offset: int = 0
    ) -> bool:
        """Record a damaged frame; whether it was new. OSError where the store is read-only."""
        if self.holds(bad):  # also where nothing can be written any more
            return False
        value = {
            "unit": bad.unit,
            "number": bad.number,
            "reason": reason,
            "revision": revision,
            "disk": disk,
            "offset": offset,
            "found": timestamp(datetime.now(UTC)),
        }
        try:
            self._fs.mkdir(self._directory)
            return publish_new(self._path(bad), sealed(value), self._fs)
        except (OSError, NoSpace) as exc:
            self.refused = why_unwritten(exc)
            raise

    def clear(self, bad: Bad) -> None:
        """Remove a record: the frame reads well again, or nothing refers to it any more."""
        self._fs.unlink(self._path(bad))

    def holds(self, bad: Bad) -> bool:
        """Whether a frame is recorded."""
        return self._path(bad).exists()

    def bad(self) -> set[Bad]:
        """All recorded frames, from the file names alone."""
        return set(self._listed())

    def _listed(self) -> Iterator[Bad]:
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return
        for name in names:
            unit, _, number = name.removesuffix(".json").rpartition(".")
            if not name.endswith(".json") or not unit:
                continue
            if number == "all":
                yield Bad(unit, WHOLE)
            elif number.isdecimal():
                yield Bad(unit, int(number))

    def findings(self) -> list[Finding]:
        """All records with their details; an unreadable one counts by its name."""
        return [self._finding(bad) for bad in sorted(self._listed())]

    def _finding(self, bad: Bad) -> Finding:
        try:
            value = unsealed(read_file(self._path(bad)), str(self._path(bad)))
        except (OSError, Corrupt):
            return Finding(bad, "recorded as damaged", "", "", 0, "")
        return Finding(
            bad,
            str(value.get("reason", "")),
            str(value.get("revision", "")),
            str(value.get("disk", "")),
            int(value.get("offset", 0)),
            str(value.get("found", "")),
        )
