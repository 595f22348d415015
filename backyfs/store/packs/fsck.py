"""The invariants of pack files as code: what must hold after every operation and every crash."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from blake3 import blake3

from backyfs.errors import BackyfsError, Corrupt
from backyfs.store.packs import codec
from backyfs.store.packs.extents import ExtentMap
from backyfs.store.packs.library import PACK_SUFFIX
from backyfs.store.packs.packfile import PackFile, Segment
from backyfs.store.packs.table import PACK_HEADER_BYTES, Entry


def check_packs(directory: Path, maps: Iterable[ExtentMap]) -> Iterator[str]:
    """Every violated invariant of the packs in `directory`, in words."""
    segments: dict[str, Segment] = {}
    packs: list[PackFile] = []
    try:
        for name in sorted(os.listdir(directory)):
            if name.endswith(PACK_SUFFIX):
                yield from _collect(directory / name, packs, segments)
        for segment in segments.values():
            yield from _check_segment(segment)
        for extent_map in maps:
            yield from _check_map(extent_map, segments)
    finally:
        for pack in packs:
            pack.close()


def _collect(path: Path, packs: list[PackFile], segments: dict[str, Segment]) -> Iterator[str]:
    try:
        pack = PackFile(path)
    except (BackyfsError, OSError) as exc:
        yield str(exc)
        return
    packs.append(pack)
    for descriptor in pack.footer.segments:
        segments.setdefault(descriptor.name, Segment(pack, descriptor))


def _check_segment(segment: Segment) -> Iterator[str]:
    place = f"packs/{segment.pack.path.name}, segment {segment.name}"
    try:
        if blake3(segment.hashes(0, segment.count)).digest() != segment.root:
            yield f"{place}: the hash column does not match its root"
        for number, entry in enumerate(segment.all_entries()):
            problem = _entry_problem(segment, entry)
            if problem:
                yield f"{place}, frame {number}: {problem}"
    except (Corrupt, ValueError) as exc:
        yield f"{place}: {exc}"


def _entry_problem(segment: Segment, entry: Entry) -> str:
    offset, size, kind, depth = entry[:4]
    if kind == codec.DEAD:
        return ""
    if offset < PACK_HEADER_BYTES or offset + size > segment.pack.footer.table_at or not size:
        return "lies outside the file's frames"
    if kind == codec.ZSTD:
        return "" if depth == 0 else "a full frame has a depth"
    if kind != codec.PATCH or not 1 <= depth <= codec.DEPTH_MAX:
        return f"kind {kind} with depth {depth}"
    return ""


def _chain_problem(home: Segment, number: int, segments: dict[str, Segment]) -> str:
    """A live frame, and all it rests on, must be there. (What rests on it may be dead.)"""
    for _ in range(codec.DEPTH_MAX + 1):
        try:
            entry = home.entry(number)
        except Corrupt as exc:
            return exc.reason
        if entry[2] == codec.DEAD:
            return f"a dead frame of {home.name}"
        if entry[2] == codec.ZSTD:
            return ""
        names = home.pack.footer.names
        below = segments.get(names[entry[5]]) if entry[5] < len(names) else None
        if below is None or entry[7] >= below.count:
            return f"a patch in {home.name} without its base"
        home, number = below, entry[7]
    return f"a chain of patches deeper than {codec.DEPTH_MAX}"


def _check_map(extent_map: ExtentMap, segments: dict[str, Segment]) -> Iterator[str]:
    position = 0
    for run in extent_map.runs:
        ref = extent_map.segments[run.segment]
        home = segments.get(ref.name)
        if run.first < position or not run.span:
            yield f"an extent at frame {run.first} overlaps or is empty"
        position = run.first + run.span
        if home is None or home.root != ref.root or run.number + run.span > home.count:
            yield f"an extent at frame {run.first} refers to what segment {ref.name} does not hold"
            continue
        for number in range(run.number, run.number + run.span):
            problem = _chain_problem(home, number, segments)
            if problem:
                yield f"an extent at frame {run.first} refers to {problem}"
                break
