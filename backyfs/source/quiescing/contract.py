"""What can freeze a guest, and the error for one that was not frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class NotFrozen(Exception):
    """The guest was not frozen, or not thawed; the text says why, on one line, for an operator."""


class Quiescer(Protocol):
    """One way to make a guest hold still. Calls come one at a time, in this order."""

    @property
    def patience_s(self) -> float:
        """How long one call may take at most, in seconds."""

    def prepare(self, stops: Sequence[int] = ()) -> None:
        """See whether freezing is possible; changes nothing in the guest. NotFrozen.

        When a descriptor of `stops` becomes readable, here and in `freeze`: NotFrozen, at once.
        """

    def freeze(self, stops: Sequence[int] = ()) -> str:
        """Freeze, and say what was frozen ("" = nothing to say). NotFrozen: perhaps it is frozen
        nevertheless, or will be; `thaw` must follow.
        """

    def thaw(self) -> str:
        """Thaw, for sure. Returns "" if the guest was frozen until now, else why that is not known.

        NotFrozen: it may still be frozen; to be tried again. Thawing twice does no harm.
        """

    def close(self) -> None:
        """Give descriptors and locks back; thaws nothing."""
