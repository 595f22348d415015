"""What frames rest on: the segments they lie in, and those of their patches' bases.

A footer names every segment its patches refer to, or once referred to, so that most segments are
ruled out without a look at their entries. One `Reach` serves many maps while the library is in
use, and remembers what it found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

from backyfs.errors import Corrupt
from backyfs.store.packs.extents import ExtentMap, SegmentRef
from backyfs.store.packs.library import Library
from backyfs.store.packs.packfile import PackFile, Segment
from backyfs.store.packs.runs import Run
from backyfs.store.quarantine import WHOLE, Bad

_Places = Mapping[str, Collection[int]]
"""By segment: numbers of frames."""
_ALL = range(1 << 32)


class Reach:
    """The segments that maps reach, found as maps are looked at. Not safe from many threads."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._segments: dict[str, Segment] = {}
        self._packs: set[PackFile] = set()
        self._gone: set[str] = set()
        """Named by footers, in no pack (or cut off): no loss, as long as no frame needs one."""
        self._lost: tuple[tuple[int, int], _Places] = ((-1, -1), {})

    def broken(self, extent_map: ExtentMap) -> dict[str, str]:
        """By segment the map names, why it cannot be used."""
        self._follow({ref.name for ref in extent_map.segments})
        return {ref.name: why for ref in extent_map.segments if (why := self._problem(ref))}

    def _problem(self, ref: SegmentRef) -> str:
        segment = self._segments.get(ref.name)
        if segment is None:
            try:
                segment = self._library.segment(ref.name)
            except Corrupt as exc:
                return exc.reason
        if (segment.count, segment.root) != (ref.count, ref.root):
            return f"segment {ref.name} is not the one the map was made for"
        return f"segment {ref.name}: its table is cut off" if segment.cut_off else ""

    def _follow(self, names: set[str]) -> None:
        """Find the packs of these segments, and of all that their patches may refer to."""
        pending = names - self._segments.keys() - self._gone
        while pending:
            name = pending.pop()
            try:
                segment = self._library.segment(name)
            except Corrupt:
                self._gone.add(name)
                continue
            if segment.cut_off:
                self._gone.add(name)
            else:
                self._segments[name] = segment
            if segment.pack not in self._packs:
                self._packs.add(segment.pack)
                pending |= set(segment.pack.footer.names) - self._segments.keys() - self._gone

    def _resting_on(self, seeds: _Places) -> dict[str, set[int]]:
        """The frames that are patches, directly or not, against one of `seeds`."""
        found: defaultdict[str, set[int]] = defaultdict(set)
        new = seeds
        while new:
            more: dict[str, set[int]] = {}
            for pack in self._packs:
                names = pack.footer.names
                wanted = {index: new[name] for index, name in enumerate(names) if name in new}
                for segment in self._held_by(pack) if wanted else ():
                    above = set(segment.patches_against(wanted)) - found[segment.name]
                    if above:
                        found[segment.name] |= above
                        more[segment.name] = above
            new = more
        return found

    def _held_by(self, pack: PackFile) -> Iterator[Segment]:
        for descriptor in pack.footer.segments:
            segment = self._segments.get(descriptor.name)
            if segment is not None and segment.pack is pack:
                yield segment

    def lost_bases(self, extent_map: ExtentMap) -> set[str]:
        """Segments that are gone although frames of the map are patches against them."""
        self._follow({ref.name for ref in extent_map.segments})
        state = (len(self._packs), len(self._gone))
        if self._lost[0] != state:
            self._lost = state, self._resting_on(dict.fromkeys(self._gone, _ALL))
        return {
            base.unit
            for _, place in _hits(extent_map, self._lost[1])
            for base in self._bases(place)
            if base.unit in self._gone
        }

    def bad_frames(
        self, extent_map: ExtentMap, bad: Collection[Bad]
    ) -> Iterator[tuple[int, Bad | None]]:
        """Frames that reach one of `bad`, or what is broken or gone, with where they lie.

        The place is None where the segment is not the map's: nothing can be put back there.
        """
        broken = self.broken(extent_map)
        seeds: dict[str, Collection[int]] = defaultdict(set)
        for item in bad:
            if item.number != WHOLE:
                seeds[item.unit] = {*seeds[item.unit], item.number}
        whole = {item.unit for item in bad if item.number == WHOLE}
        seeds |= dict.fromkeys(whole | broken.keys() | self._gone, _ALL)
        above = self._resting_on(seeds)
        hit: dict[str, Collection[int]] = dict(above)
        for unit, numbers in seeds.items():
            hit[unit] = numbers if numbers is _ALL else {*numbers, *above.get(unit, ())}
        for frame, place in _hits(extent_map, hit):
            yield frame, None if place.unit in broken else place

    def _bases(self, place: Bad) -> Iterator[Bad]:
        """The bases of a frame, as far as they can be followed."""
        try:
            yield from self._library.bases(place)
        except (Corrupt, ValueError):
            return  # where the table itself is damaged, reading tells


def _hits(extent_map: ExtentMap, places: _Places) -> Iterator[tuple[int, Bad]]:
    """The frames of the map that lie at one of `places`."""
    names = [ref.name for ref in extent_map.segments]
    for run in extent_map.runs if places else ():
        name = names[run.segment]
        for number in _inside(run, places.get(name, ())):
            yield run.first + number - run.number, Bad(name, number)


def _inside(run: Run, numbers: Collection[int]) -> Iterator[int]:
    """Those of `numbers` that a run covers, sorted."""
    own = range(run.number, run.number + run.span)
    if len(numbers) < len(own):
        yield from sorted(number for number in numbers if number in own)
    else:
        yield from (number for number in own if number in numbers)
