"""The meter of a repository: what it held and moved over time, for bills.

`usage/YYYY-MM.jsonl` has one line per reading, appended after each backup, removal and garbage
collection: what the directory holds from then on, and what all backups up to then have moved. So
the past stays known when revisions are gone. Lines are only ever appended, to the newest file (of a
later month, where the clock was set back), so that they are in the order of writing.

A reading that cannot be written (a full disk, a read-only store) is logged and lost; the next one
is exact again. A line that was cut off by a crash is skipped. Safe from many processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from backyfs.store.fs import open_unlinked, read_file
from backyfs.store.record import parse_time, timestamp

log = logging.getLogger(__name__)

DIRECTORY = "usage"
_SUFFIX = ".jsonl"


@dataclass(frozen=True, slots=True)
class Reading:
    """The state from `time` on; bytes.

    `stored`: what the directory takes on disk · `logical`: size of the newest revision's disks ·
    `read`, `written`: from sources and into the store, in a file and in `last` by all backups since
    metering began, this one's included; else by this event · `event`: backup, copy, remove or gc.
    """

    time: datetime
    event: str
    stored: int
    logical: int
    read: int = 0
    written: int = 0
    revision: str = ""


class Meter:
    """Readings of the repository in `path`."""

    def __init__(self, path: Path) -> None:
        self._directory = path / DIRECTORY

    def note(self, reading: Reading) -> None:
        """Append a reading; its `read` and `written` are this event's own. Never raises OSError.

        One that would say what the last one says is left out.
        """
        try:
            self._directory.mkdir(mode=0o750, exist_ok=True)
            with self._appending(reading.time) as fd:
                before = self.last()
                if before is not None:
                    reading = _after(before, reading)
                if before is None or reading.revision or _values(before) != _values(reading):
                    os.write(fd, _line(fd, reading))
        except OSError as exc:
            values = {"event": reading.event, "reason": exc.strerror or str(exc)}
            log.warning("usage is not noted", values)

    @contextlib.contextmanager
    def _appending(self, time: datetime) -> Iterator[int]:
        path = max([self._directory / f"{_month(time)}{_SUFFIX}", *self._files()[-1:]])
        fd = open_unlinked(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)

    def last(self) -> Reading | None:
        """The one written last, with all moved up to then; None before the first."""
        return next(self._backwards(self._files()), None)

    def readings(self, since: datetime, until: datetime) -> list[Reading]:
        """The last one before `since`, then all before `until`, in the order of time.

        Each with what was moved between the one written before it and itself: never less than
        nothing, whatever the clock did. Opens the files from the month of `since` on, and as many
        before them as it takes to find the two readings before.
        """
        written = self._written_since(since)
        found = [_own(before, reading) for before, reading in pairwise([None, *written]) if reading]
        found.sort(key=_time)
        first = max(0, bisect_left(found, since, key=_time) - 1)
        return found[first : bisect_left(found, until, key=_time)]

    def _written_since(self, since: datetime) -> list[Reading]:
        """All that are not before `since`, two and perhaps more before them; as written."""
        files, month = self._files(), _month(since)
        found = list(self._backwards([path for path in files if path.stem >= month]))
        found += islice(self._backwards([path for path in files if path.stem < month]), 2)
        found.reverse()
        return found

    def _files(self) -> list[Path]:
        """Oldest first."""
        try:
            names = os.listdir(self._directory)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [self._directory / name for name in sorted(names) if name.endswith(_SUFFIX)]

    def _backwards(self, files: list[Path]) -> Iterator[Reading]:
        for path in reversed(files):
            for line in reversed(read_file(path).splitlines()):
                with contextlib.suppress(*_NO_READING):
                    yield _reading(json.loads(line))


def _after(before: Reading, reading: Reading) -> Reading:
    """With the counters gone on."""
    return replace(
        reading, read=before.read + reading.read, written=before.written + reading.written
    )


def _own(before: Reading | None, reading: Reading) -> Reading:
    """With what this event moved instead of the counters, which began at 0."""
    if before is None:
        return reading
    return replace(
        reading,
        read=max(0, reading.read - before.read),
        written=max(0, reading.written - before.written),
    )


def _time(reading: Reading) -> datetime:
    return reading.time


def _month(time: datetime) -> str:
    utc = time.astimezone(UTC)
    return f"{utc.year:04}-{utc.month:02}"


def _values(reading: Reading) -> tuple[int, int]:
    return reading.stored, reading.logical


def _line(fd: int, reading: Reading) -> bytes:
    """A whole line, on a line of its own even behind one that was cut off."""
    size = os.fstat(fd).st_size
    begun = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
    value = {**asdict(reading), "time": timestamp(reading.time)}
    return (b"\n" if begun else b"") + json.dumps(value).encode() + b"\n"


_NO_READING = (ValueError, KeyError, TypeError, OverflowError, RecursionError)
"""What a line that is no reading may raise."""


def _reading(value: dict[str, Any]) -> Reading:
    return Reading(
        parse_time(value["time"]),
        str(value["event"]),
        int(value["stored"]),
        int(value["logical"]),
        int(value["read"]),
        int(value["written"]),
        str(value.get("revision", "")),
    )
