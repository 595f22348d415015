"""All numbers of a range in a random order that is computed, never stored.

A Feistel network maps its square one to one, whatever its rounds compute. Its keys are random, so
is the order, and what falls outside of the range is left out. Any beginning of the order is a
random sample without repetition, in a few hundred bytes of memory.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

_ROUNDS = 6
_WORD = (1 << 64) - 1


def shuffled(count: int, rng: random.Random) -> Iterator[int]:
    """Each of 0..count-1 once, in an order drawn from `rng`."""
    if count <= 0:
        return
    bits = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    keys = [rng.getrandbits(64) for _ in range(_ROUNDS)]
    for index in range(1 << 2 * bits):
        left, right = index >> bits, index & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        number = left << bits | right
        if number < count:
            yield number


def _mixed(value: int) -> int:
    """32 bits of which each depends on all bits of the value (the finalizer of SplitMix64)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
    return value >> 32
