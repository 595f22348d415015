"""Who needs which stored frames: what would be freed if a revision were gone.

A frame is a revision's own when no other revision reaches it, neither by its map nor through a
patch that rests on it. Memory: two bytes per frame of all segments (32 MiB per TiB stored), one map
and a page of a table.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence

from backyfs.errors import Corrupt
from backyfs.store.packs import codec
from backyfs.store.packs.extents import ExtentMap
from backyfs.store.packs.library import Library
from backyfs.store.packs.packfile import Segment
from backyfs.store.packs.runs import Run

SHARED = 0xFFFF
_NOBODY = 0
OWNERS_MAX = SHARED - 1


class Owners:
    """Per stored frame the number (1..OWNERS_MAX) of the one owner that needs it, or SHARED."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._of: dict[str, array[int]] = {}

    def claim(self, owner: int, extent_map: ExtentMap) -> None:
        """`owner` needs all frames of the map. SHARED: several do."""
        for run in extent_map.runs:
            ref = extent_map.segments[run.segment]
            self._claim_run(owner, self._segment(ref.name, ref.count), run)

    def _segment(self, name: str, count: int) -> array[int]:
        return self._of.setdefault(name, array("H", bytes(2 * count)))

    def _claim_run(self, owner: int, owners: array[int], run: Run) -> None:
        at = slice(run.number, run.number + run.span)
        part = owners[at]
        first = part[0] if part else _NOBODY
        if part == array("H", [first]) * len(part):  # nearly always: all of one kind
            owners[at] = array("H", [_merged(first, owner)]) * len(part)
        else:
            owners[at] = array("H", [_merged(one, owner) for one in part])

    def claim_bases(self) -> None:
        """Whoever needs a patch needs what it rests on. Corrupt where that cannot be read."""
        pending = set(self._of)
        while pending:
            name = pending.pop()
            for base, number, owner in self._rests(self._library.segment(name), self._of[name]):
                owners = self._segment(base, self._library.segment(base).count)
                if (
                    number < len(owners)
                    and (new := _merged(owners[number], owner)) != owners[number]
                ):
                    owners[number] = new
                    pending.add(base)

    def _rests(self, segment: Segment, owners: array[int]) -> Iterator[tuple[str, int, int]]:
        for owner, entry in zip(owners, segment.all_entries(), strict=False):
            if owner != _NOBODY and entry[2] == codec.PATCH:
                yield segment.base_name(entry[5]), entry[7], owner

    def bytes_by_owner(self) -> dict[int, int]:
        """Stored bytes of the frames each owner needs alone (and, under SHARED, several)."""
        found: dict[int, int] = {}
        for name, owners in self._of.items():
            segment = self._library.segment(name)
            for owner, entry in zip(owners, segment.all_entries(), strict=False):
                if owner != _NOBODY:
                    found[owner] = found.get(owner, 0) + segment.stored_bytes(entry)
        return found


def _merged(one: int, other: int) -> int:
    if one in (_NOBODY, other):
        return other
    return SHARED


def exclusive(
    library: Library, maps: Iterable[tuple[Sequence[int], ExtentMap]]
) -> Mapping[int, int]:
    """Stored bytes that only one owner needs, by owner. `maps`: each with those that name it.

    Corrupt when something stored cannot be found.
    """
    owners = Owners(library)
    for named_by, extent_map in maps:
        owners.claim(named_by[0] if len(named_by) == 1 else SHARED, extent_map)
    try:
        owners.claim_bases()
    except ValueError as exc:
        raise Corrupt(str(exc)) from exc
    found = owners.bytes_by_owner()
    found.pop(SHARED, None)
    return found
