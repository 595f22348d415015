"""Progress for people: a bar on a terminal; JSON status lines when both were asked for."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from backyfs.cli import output
from backyfs.cli.session import Session
from backyfs.engine.progress import QUIET, Phase, Progress

if TYPE_CHECKING:
    from backyfs.cli.bar import Add

_STATUS_INTERVAL_S = 1.0


@contextlib.contextmanager
def showing(session: Session, wanted: bool | None, *, as_json: bool = False) -> Iterator[Progress]:
    """A progress to hand to the engine. `wanted` None: a bar if stderr is a terminal."""
    if wanted and as_json:
        yield _Lines()
    elif as_json or not watched(session, wanted):
        yield QUIET
    else:
        from backyfs.cli.bar import bars

        with bars() as add:
            yield _Bar(add)


def watched(session: Session, wanted: bool | None) -> bool:
    """Whether a bar should be shown."""
    if wanted is None:
        return sys.stderr.isatty() and not session.quiet
    return wanted


class _Bar:
    """One bar per phase, the former ones complete."""

    def __init__(self, add: Add) -> None:
        self._add = add
        self._advance: Callable[[int], None] = lambda _: None

    def start(self, phase: Phase, total: int) -> None:
        """Begin the bar of a phase."""
        self._advance = self._add(str(phase), total)

    def advance(self, count: int) -> None:
        """Move the bar on."""
        self._advance(count)


class _Lines:
    """A JSON line per second on stdout."""

    def __init__(self) -> None:
        self._phase: Phase | None = None
        self._total = self._done = 0
        self._started = self._last = time.monotonic()

    def start(self, phase: Phase, total: int) -> None:
        """Begin counting a phase and say so."""
        self._phase, self._total, self._done = phase, total, 0
        self._started = time.monotonic()
        self._print()

    def advance(self, count: int) -> None:
        """Count, and say so once in a while."""
        self._done += count
        if time.monotonic() - self._last >= _STATUS_INTERVAL_S:
            self._print()

    def _print(self) -> None:
        self._last = time.monotonic()
        elapsed = self._last - self._started
        left = elapsed * (self._total - self._done) / self._done if self._done else None
        output.json_line(
            {
                "message_type": "status",
                "phase": str(self._phase),
                "percent_done": round(100 * self._done / self._total, 1) if self._total else None,
                "bytes_done": self._done,
                "total_bytes": self._total,
                "seconds_elapsed": round(elapsed, 1),
                "seconds_remaining": None if left is None else round(left, 1),
            }
        )
