"""What each byte of a packs repository is for, and which frames may suffer when it is wrong.

Computed from an undamaged repository; the tests then damage one byte after the other and compare
what really suffered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from backyfs.errors import BackyfsError, Corrupt
from backyfs.model import FRAME
from backyfs.store.digest import HASH, frame_count
from backyfs.store.packs.image import PackImage
from backyfs.store.packs.packfile import PackFile, Segment
from backyfs.store.packs.table import ENTRY, PACK_HEADER_BYTES, TAIL_BYTES
from backyfs.store.quarantine import Bad
from backyfs.store.repository import Repository
from tests.store import faults
from tests.store.faults import Disks

Frame = tuple[str, str, int]
"""Revision, disk and number of a frame."""


@dataclass(frozen=True)
class Region:
    """A part of a pack file. `what`: header, frame, entry, hash, footer or tail."""

    what: str
    start: int
    end: int
    place: Bad | None = None


def regions(path: Path) -> Iterator[Region]:
    """The parts of an undamaged pack file; bytes between them are padding."""
    pack = PackFile(path)
    try:
        yield Region("header", 0, PACK_HEADER_BYTES)
        for descriptor in pack.footer.segments:
            segment = Segment(pack, descriptor)
            for number, entry in enumerate(segment.all_entries()):
                place = Bad(segment.name, number)
                if entry[1]:
                    yield Region("frame", entry[0], entry[0] + entry[1], place)
                at = descriptor.entries_at + number * ENTRY.size
                yield Region("entry", at, at + ENTRY.size, place)
                at = descriptor.hashes_at + number * HASH
                yield Region("hash", at, at + HASH, place)
        end = max(d.hashes_at + d.count * HASH for d in pack.footer.segments)
        first = min(d.entries_at for d in pack.footer.segments)
        yield Region("footer", pack.footer.table_at + 8, first)
        yield Region("footer", end, pack.bytes - TAIL_BYTES)
        yield Region("tail", pack.bytes - TAIL_BYTES, pack.bytes)
    finally:
        pack.close()


@dataclass(frozen=True)
class Uses:
    """Which frames of the repository are made of a stored frame."""

    directly: Mapping[Bad, set[Frame]]
    through: Mapping[Bad, set[Frame]]
    segments: Mapping[str, set[Frame]]


def uses(path: Path) -> Uses:
    """By stored frame: the frames that are this one, and those that need it to be decoded."""
    directly: defaultdict[Bad, set[Frame]] = defaultdict(set)
    through: defaultdict[Bad, set[Frame]] = defaultdict(set)
    segments: defaultdict[str, set[Frame]] = defaultdict(set)
    repository = Repository.open(path)
    for record in repository.revisions():
        for disk in record.disks:
            with closing(repository.open_disk(record, disk)) as image:
                assert isinstance(image, PackImage)
                for number in range(image.map.frames):
                    places = faults.chain(image, number)
                    for place in places:
                        through[place].add((record.id, disk, number))
                        segments[place.unit].add((record.id, disk, number))
                    if places:
                        directly[places[0]].add((record.id, disk, number))
    return Uses(directly, through, segments)


def survey(path: Path, contents: Mapping[str, Disks]) -> set[Frame]:
    """Read everything; the frames that cannot be had. Wrong bytes or vague errors fail."""
    repository = Repository.open(path)
    bad: set[Frame] = set()
    for record in repository.revisions():
        for disk, expected in contents[record.id].items():
            try:
                image = repository.open_disk(record, disk)
            except Corrupt as exc:
                assert (exc.vm, exc.revision, exc.disk) == (path.name, record.id, disk)
                assert exc.length == 0
                bad |= {(record.id, disk, n) for n in range(frame_count(len(expected)))}
                continue
            with closing(image):
                assert isinstance(image, PackImage)
                numbers = unreadable(image, expected, (path.name, record.id, disk))
                assert image.check(0, frame_count(len(expected))) == numbers
            bad |= {(record.id, disk, number) for number in numbers}
    return bad


def unreadable(image: PackImage, expected: bytes, names: tuple[str, str, str]) -> list[int]:
    """Numbers of frames that raise Corrupt, each naming exactly itself."""
    try:
        assert image.read(0, image.size) == expected
        return []
    except Corrupt as exc:
        first = exc.offset // FRAME
    bad = []
    for at in range(0, len(expected), FRAME):
        length = min(FRAME, len(expected) - at)
        try:
            assert image.read(at, length) == expected[at : at + length]
        except Corrupt as exc:
            assert (exc.vm, exc.revision, exc.disk) == names
            assert (exc.offset, exc.length) == (at, length)
            bad.append(at // FRAME)
    assert first == bad[0]
    return bad


def known_damage(path: Path) -> set[Frame]:
    """The frames the repository says are damaged, without reading any."""
    repository = Repository.open(path)
    found: set[Frame] = set()
    for revision, items in repository.damage().items():
        try:
            record = repository.record(revision)
        except BackyfsError:
            continue
        for item in items:
            size = record.disks[item.disk].size
            first, end = 0, frame_count(size)
            if item.extent is not None:
                first, end = item.extent.offset // FRAME, frame_count(item.extent.end)
            found |= {(revision, item.disk, number) for number in range(first, end)}
    return found


def revisions_of(bad: set[Frame]) -> set[str]:
    """The revisions these frames belong to."""
    return {revision for revision, _, _ in bad}


def flip(path: Path, at: int, mask: int = 0x01) -> None:
    """Flip bits of the byte at `at`, in place; flipping again undoes it."""
    with open(path, "r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ mask]))
