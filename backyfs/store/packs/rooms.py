"""Memory shared with the processes that decode, in rooms of equal length.

A room belongs to whoever took it for as long as anything refers to its bytes, as with any other
memory; then it is free, without a word. What is read through many hands needs no copy that way.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from collections import deque

WARM_ROOMS = 8
"""So many free rooms keep their memory, to be used next; the others give it back to the system."""


class Rooms:
    """`count` rooms of `room_bytes` (a multiple of the page size) each. Safe from many threads."""

    def __init__(self, count: int, room_bytes: int) -> None:
        self.room_bytes = room_bytes
        self.memory = mmap.mmap(-1, count * room_bytes)
        self._start = _address(self.memory)
        self._warm: deque[int] = deque()
        self._cold = deque(range(count))

    @property
    def free(self) -> int:
        """How many nobody has."""
        return len(self._warm) + len(self._cold)

    def take(self, length: int) -> memoryview | None:
        """`length` bytes of whatever content; None where they do not fit, or all are taken."""
        if not 0 < length <= self.room_bytes:
            return None
        number = _last(self._warm, self._cold)
        if number is None:
            return None
        room = (ctypes.c_ubyte * length).from_buffer(self.memory, number * self.room_bytes)
        weakref.finalize(room, self._give_back, number).atexit = False
        return memoryview(room).cast("B")

    def _give_back(self, number: int) -> None:
        if len(self._warm) < WARM_ROOMS:
            self._warm.append(number)
        else:
            self.memory.madvise(mmap.MADV_REMOVE, number * self.room_bytes, self.room_bytes)
            self._cold.append(number)

    def position(self, place: memoryview) -> int | None:
        """Where in `memory` a place lies; None elsewhere."""
        position = _address(place) - self._start
        return position if 0 <= position < len(self.memory) else None


def _last(*stacks: deque[int]) -> int | None:
    for stack in stacks:
        with contextlib.suppress(IndexError):
            return stack.pop()
    return None


def _address(buffer: mmap.mmap | memoryview) -> int:
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(buffer))
