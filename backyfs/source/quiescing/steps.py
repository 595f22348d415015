"""All quiescers of a job as one: frozen in order, thawed backwards, until it is certain."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from backyfs.source.quiescing.contract import NotFrozen, Quiescer

log = logging.getLogger(__name__)

Tell = Callable[[float], object]
"""Called before each step with the seconds it may take."""

PAUSE_S, PAUSE_MAX_S = 0.25, 10.0
"""How long to wait before a second try to thaw; twice as long before each further one."""

TRIES_MIN = 3
"""How often thawing is tried at least, however long it takes."""


def _nobody(_: float) -> None:
    pass


class Steps:
    """What is done to freeze one guest, once."""

    def __init__(self, quiescers: Sequence[Quiescer], tell: Tell = _nobody) -> None:
        self._quiescers, self._tell = quiescers, tell
        self._begun: list[Quiescer] = []

    def freeze(self, stops: Sequence[int] = ()) -> str:
        """Freeze all, and say what. NotFrozen: `thaw` must follow nevertheless."""
        for quiescer in self._quiescers:
            self._tell(quiescer.patience_s)
            quiescer.prepare(stops)
        done = []
        for quiescer in self._quiescers:
            self._tell(quiescer.patience_s)
            self._begun.append(quiescer)
            done.append(quiescer.freeze(stops))
        return ", ".join(done)

    def thaw(self, limit_s: float) -> str:
        """Thaw what was begun; returns "" if all was frozen until now, else why that is not known.

        Tried for `limit_s` seconds each. NotFrozen: something may be frozen still; all the others
        are not.
        """
        doubts, failures = [], []
        while self._begun:
            try:
                doubts.append(self._thawed(self._begun.pop(), limit_s))
            except Exception as exc:
                failures.append(str(exc) or repr(exc))
        if failures:
            raise NotFrozen("; ".join(failures))
        return "; ".join(filter(None, doubts))

    def thaw_all(self, limit_s: float) -> None:
        """Thaw everything, whoever froze it. NotFrozen, as `thaw`."""
        self._begun = list(self._quiescers)
        self.thaw(limit_s)

    def close(self) -> None:
        """Give connections and locks back."""
        for quiescer in self._quiescers:
            quiescer.close()

    def _thawed(self, quiescer: Quiescer, limit_s: float) -> str:
        end, pause_s, tries = time.monotonic() + limit_s, PAUSE_S, 0
        while True:
            self._tell(quiescer.patience_s + pause_s)
            try:
                return quiescer.thaw()
            except Exception as exc:  # a guest must not stay frozen for a bug of ours
                tries += 1
                log.warning("thawing failed", {"try": tries, "reason": str(exc) or repr(exc)})
                if tries >= TRIES_MIN and time.monotonic() + pause_s > end:
                    raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_MAX_S)
