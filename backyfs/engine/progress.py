"""How far a long operation is: told to whoever wants to show it, or to nobody.

The engine calls one object, always from the thread that runs the event loop. What it looks like
on a terminal is the command line's business.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol


class Phase(StrEnum):
    """What is being done to the bytes that are counted."""

    BACKUP = "backing up"
    STORED = "checking stored bytes"
    SOURCE = "comparing with the source"
    SAMPLE = "sampling what was not read"
    VERIFY = "verifying"
    SCRUB = "scrubbing"
    COPY = "copying"


class Progress(Protocol):
    """Where the engine reports; every method returns at once."""

    def start(self, phase: Phase, total: int) -> None:
        """A phase begins and replaces the one before; `total` bytes are ahead (0 = not known)."""

    def advance(self, count: int) -> None:
        """`count` more bytes of the phase are done, holes included; 0 is allowed."""


class Quiet:
    """Shows nothing."""

    def start(self, phase: Phase, total: int) -> None:
        """Nothing."""

    def advance(self, count: int) -> None:
        """Nothing."""


QUIET: Progress = Quiet()
