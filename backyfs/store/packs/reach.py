"""What the frames of a map rest on: the segments they lie in, and those of their patches' bases.

A footer names every segment its patches refer to (or once referred to), so that most segments
are ruled out without looking at a single entry. Needs the library to be in use.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from backyfs.errors import Corrupt
from backyfs.store.packs.extents import ExtentMap, SegmentRef
from backyfs.store.packs.library import Library
from backyfs.store.packs.packfile import PackFile
from backyfs.store.quarantine import WHOLE, Bad


class Reach:
    """The segments that can be reached from a map, and what is wrong with them.

    `broken`: by segment the map names, why it cannot be used. `gone`: segments that footers name
    and no pack holds; no loss as long as no frame of the map needs one.
    """

    def __init__(self, library: Library, extent_map: ExtentMap) -> None:
        self._library, self._map = library, extent_map
        self._homes: dict[str, PackFile] = {}
        self.gone: set[str] = set()
        self.broken = {
            ref.name: problem for ref in extent_map.segments if (problem := self._problem(ref))
        }
        self._follow({ref.name for ref in extent_map.segments} - self.broken.keys())

    def _problem(self, ref: SegmentRef) -> str:
        try:
            segment = self._library.segment(ref.name)
        except Corrupt as exc:
            return exc.reason
        if (segment.count, segment.root) != (ref.count, ref.root):
            return f"segment {ref.name} is not the one the map was made for"
        return f"segment {ref.name}: its table is cut off" if segment.cut_off else ""

    def _follow(self, found: set[str]) -> None:
        """Find the packs of these segments, and of all that their patches may refer to."""
        pending = list(found)
        packs: set[PackFile] = set()
        while pending:
            name = pending.pop()
            try:
                pack = self._homes[name] = self._library.segment(name).pack
            except Corrupt:
                self.gone.add(name)
                continue
            if pack not in packs:
                packs.add(pack)
                new = set(pack.footer.names) - found
                found |= new
                pending.extend(new)

    def _leading_to(self, units: Collection[str]) -> set[str]:
        """The segments whose frames may rest on one of `units`, these included."""
        packs = {pack: set(pack.footer.names) for pack in self._homes.values()}
        found, before = set(units), -1
        while len(found) != before:
            before = len(found)
            leading = {pack for pack, names in packs.items() if not names.isdisjoint(found)}
            found |= {name for name, pack in self._homes.items() if pack in leading}
        return found

    def lost_bases(self) -> set[str]:
        """Segments that are gone although frames of the map are patches against them."""
        lost: set[str] = set()
        for _, place in self._frames_in(self._leading_to(self.gone)) if self.gone else ():
            for base in self._chain(place):
                if base.unit in self.gone:
                    lost.add(base.unit)
        return lost

    def bad_frames(self, bad: Collection[Bad]) -> Iterator[tuple[int, Bad | None]]:
        """Frames that reach one of `bad`, or what is broken or gone, with where they lie.

        The place is None where the segment is not the map's: nothing can be put back there.
        """
        units = {item.unit for item in bad} | self.broken.keys() | self.gone
        for frame, place in self._frames_in(self._leading_to(units)) if units else ():
            if place.unit in self.broken:
                yield frame, None
            elif _is_bad(place, bad) or any(
                base.unit in self.gone or _is_bad(base, bad) for base in self._chain(place)
            ):
                yield frame, place

    def _frames_in(self, units: Collection[str]) -> Iterator[tuple[int, Bad]]:
        for run in self._map.runs():
            name = self._map.segments[run.segment].name
            for index in range(run.span) if name in units else ():
                yield run.first + index, Bad(name, run.number + index)

    def _chain(self, place: Bad) -> Iterator[Bad]:
        """The bases of a frame, as far as they can be followed."""
        try:
            yield from self._library.bases(place)
        except (Corrupt, ValueError):
            return  # where the table itself is damaged, reading tells


def _is_bad(place: Bad, bad: Collection[Bad]) -> bool:
    return place in bad or Bad(place.unit, WHOLE) in bad
