"""What differs between two stored images, by the hashes their stores keep: nothing is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from backyfs.model import FRAME, Extent
from backyfs.store.contract import StoredImage
from backyfs.store.digest import FAN_OUT, HASH, ZERO_HASH, frame_count

_NOTHING = bytes(FAN_OUT * HASH)


class Change(NamedTuple):
    """Whole frames (clipped to the new size) that are other ones now; `zero`: all zeros now."""

    extent: Extent
    zero: bool


def differences(old: StoredImage | None, new: StoredImage) -> Iterator[Change]:
    """What makes `new` out of `old` after that got the size of `new`; sorted. Corrupt.

    Bytes that `old` does not have, and all without `old`, count as zeros. A frame in which the new
    size cuts off data is listed even if what is left is equal. Neighbours of the same kind are one
    change.
    """
    pending: Change | None = None
    for number, zero in _frames(old, new):
        offset = number * FRAME
        end = min(offset + FRAME, new.size)
        if pending and pending.zero == zero and pending.extent.end == offset:
            start = pending.extent.offset
            pending = Change(Extent(start, end - start), zero)
            continue
        if pending:
            yield pending
        pending = Change(Extent(offset, end - offset), zero)
    if pending:
        yield pending


def _frames(old: StoredImage | None, new: StoredImage) -> Iterator[tuple[int, bool]]:
    """The frames that differ, and whether they are zero now."""
    groups, before = new.groups(), old.groups() if old else b""
    for at in range(0, len(groups), HASH):
        if groups[at : at + HASH] != (before[at : at + HASH] or ZERO_HASH):
            yield from _frames_of_group(old, new, at // HASH * FAN_OUT)


def _frames_of_group(
    old: StoredImage | None, new: StoredImage, first: int
) -> Iterator[tuple[int, bool]]:
    wanted, present = _hashes(new, first), _hashes(old, first) if old else _NOTHING
    present = present.ljust(len(wanted), b"\0")
    for at in range(0, len(wanted), HASH):
        hash_ = wanted[at : at + HASH]
        if hash_ != present[at : at + HASH]:
            yield first + at // HASH, hash_ == ZERO_HASH


def _hashes(image: StoredImage, first: int) -> bytes:
    count = min(FAN_OUT, frame_count(image.size) - first)
    return image.hashes(first, count) if count > 0 else b""
