"""A set of block numbers, kept as bits: small where it is empty, quick to walk in runs.

Any number of threads may look while one changes it: each group of blocks is one integer, replaced
by one assignment. Of a change that spans groups, others may see a part.

Memory: about 4.5 KiB for each group (32,768 blocks) that has a block in the set.
"""

from __future__ import annotations

from collections.abc import Iterator

GROUP_BLOCKS = 1 << 15

Run = tuple[int, int, bool]
"""First block, block behind the last, and whether they are in the set."""


class BlockSet:
    """Block numbers from 0 on, with operations on ranges [first, stop)."""

    def __init__(self) -> None:
        self._groups: dict[int, int] = {}

    def add(self, first: int, stop: int) -> None:
        """Put the blocks of a range into the set."""
        for group, low, count in _by_group(first, stop):
            self._groups[group] = self._groups.get(group, 0) | _ones(count) << low

    def remove(self, first: int, stop: int) -> None:
        """Take the blocks of a range out of the set."""
        for group, low, count in _by_group(first, stop):
            left = self._groups.get(group, 0) & ~(_ones(count) << low)
            if left:
                self._groups[group] = left
            else:
                self._groups.pop(group, None)

    def count(self, first: int, stop: int) -> int:
        """How many blocks of a range are in the set."""
        return sum(
            (self._groups.get(group, 0) >> low & _ones(count)).bit_count()
            for group, low, count in _by_group(first, stop)
        )

    def runs(self, first: int, stop: int) -> Iterator[Run]:
        """A range cut where membership changes; neighbours differ."""
        start, inside = first, False
        for begin, end, member in self._runs(first, stop):
            if member != inside:
                if begin > start:
                    yield start, begin, inside
                start, inside = begin, member
            stop = end
        if stop > start:
            yield start, stop, inside

    def _runs(self, first: int, stop: int) -> Iterator[Run]:
        """As `runs`, but also cut at the ends of groups."""
        for group, low, count in _by_group(first, stop):
            at = group * GROUP_BLOCKS + low
            bits = self._groups.get(group, 0) >> low & _ones(count)
            while count:
                member = bool(bits & 1)
                length = min(_trailing_zeros(~bits if member else bits), count)
                yield at, at + length, member
                at, bits, count = at + length, bits >> length, count - length


def _by_group(first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """A range as (group, first bit, count of bits)."""
    while first < stop:
        group, low = divmod(first, GROUP_BLOCKS)
        count = min(GROUP_BLOCKS - low, stop - first)
        yield group, low, count
        first += count


def _ones(count: int) -> int:
    return (1 << count) - 1


def _trailing_zeros(bits: int) -> int:
    return (bits & -bits).bit_length() - 1 if bits else GROUP_BLOCKS
