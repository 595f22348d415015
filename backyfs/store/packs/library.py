"""The pack files of one repository, shared by all its open images.

Finds the pack that holds a segment, reads and decodes frames, and notices files that gc or healing
replaced: an unlinked pack keeps serving those who have it open, and a frame that reads badly is
looked for once more behind the file's present name.

Thread-safe. Descriptors are closed when the last image is. Where images come and go and one is
always open, that never comes: once a library is `outlived`, what is opened next has another one.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

from blake3 import blake3

from backyfs.errors import BackyfsError, Corrupt
from backyfs.model import FRAME
from backyfs.store.fs import forget_pages, is_medium_error
from backyfs.store.packs import codec
from backyfs.store.packs.packfile import PackFile, Segment, about_to_wait
from backyfs.store.packs.table import Entry
from backyfs.store.quarantine import WHOLE, Bad

PACK_SUFFIX = ".pack"
MERGED_PREFIX = "m-"
_RUN_BYTES_MAX = 4 << 20
PIECE_FRAMES = 64
"""Frames that are checked in one go."""

Frame = bytes | memoryview
"""The 64 KiB of a decoded frame."""


class BadFrame(Exception):
    """A stored frame cannot be read: `bad` is the culprit, maybe a base of the wanted one."""

    def __init__(self, bad: Bad, reason: str) -> None:
        super().__init__(reason)
        self.bad, self.reason = bad, reason


class Chained(NamedTuple):
    """A decoded frame with what the next patch on it needs to know.

    `depth` 0..4 in the chain, `full_bytes` = stored size of the chain's full frame, `base` = what
    this frame is a patch against (None: it is a full frame).
    """

    frame: bytes
    depth: int
    full_bytes: int
    base: Bad | None


class Part(NamedTuple):
    """Frames of a segment (its root in hex) and where they belong, counted in frames."""

    name: str
    root: str
    number: int
    span: int
    at: int


class Elsewhere(Protocol):
    """Who reads frames outside of this process (decoders.py)."""

    def read(self, directory: Path, parts: Sequence[Part], place: memoryview) -> bool:
        """Frames into `place`, and zeros where none belong; False when it must be done here."""

    def check(self, directory: Path, parts: Sequence[Part]) -> bool:
        """Whether frames read well from the medium; False when it must be done here."""


class Library:
    """Reads frames by (segment, number)."""

    decoders: ClassVar[Elsewhere | None] = None
    """Who helps all libraries of this process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.RLock()
        self._users = 0
        self._packs: dict[Path, PackFile] = {}
        self._retired: list[PackFile] = []
        self._segments: dict[str, Segment] = {}
        self._broken: dict[Path, tuple[tuple[int, int, int], str]] = {}
        self._listed: tuple[int, tuple[frozenset[str], list[Path]]] = (-1, (frozenset(), []))

    # Life

    def acquire(self) -> None:
        """One more image uses the library."""
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """One image less; the last closes all files."""
        with self._lock:
            self._users -= 1
            if self._users <= 0:
                self._close()

    def _close(self) -> None:
        for pack in [*self._packs.values(), *self._retired]:
            pack.close()
        self._packs.clear()
        self._retired.clear()
        self._segments.clear()

    def outlived(self) -> bool:
        """Whether it keeps files open that are gone from the store: their space is not free yet."""
        with self._lock:
            names, _ = self._listing(fresh=False)
            return bool(self._retired) or any(path.name not in names for path in self._packs)

    def hold(self, names: Iterable[str]) -> None:
        """Open the packs of segments, and of those that their patches may rest on.

        What is open can be read as long as the library is in use, whatever becomes of the files.
        What cannot be opened is left out.
        """
        wanted, seen = list(names), set[str]()
        while wanted:
            name = wanted.pop()
            if name not in seen:
                seen.add(name)
                with contextlib.suppress(BackyfsError, OSError):
                    wanted += self.segment(name).pack.footer.names

    # Finding

    def segment(self, name: str) -> Segment:
        """The segment, from whichever pack holds it. Corrupt when none does."""
        found = self._segments.get(name)
        if found is not None:
            return found
        about_to_wait()
        with self._lock:
            return self._segments.get(name) or self._find(name)

    def _find(self, name: str) -> Segment:
        reason = "no pack file holds it"
        # A merge may publish between two looks, and a directory's time is coarse: look twice.
        for path in (p for fresh in (False, True) for p in self._candidates(name, fresh)):
            try:
                pack = self._open(path)
            except FileNotFoundError:
                continue
            except Corrupt as exc:
                reason = exc.reason
                continue
            except OSError as exc:
                if not is_medium_error(exc):
                    raise
                reason = str(exc)
                continue
            descriptor = pack.descriptors.get(name)
            if descriptor is not None:
                found = self._segments[name] = Segment(pack, descriptor)
                return found
        raise Corrupt(f"segment {name} cannot be read: {reason}")

    def _candidates(self, name: str, fresh: bool) -> Iterator[Path]:
        """The packs that may hold a segment, in the order of their names.

        A crash in a merge leaves a segment in two packs, which differ once a frame in one of them
        was healed: the first by name counts, for gc, too, and never depends on what was read.
        """
        names, merged = self._listing(fresh)
        own = f"{name}{PACK_SUFFIX}"
        if own in names:
            yield self._directory / own
        yield from merged

    def _listing(self, fresh: bool) -> tuple[frozenset[str], list[Path]]:
        """The names in packs/, and the merged packs; remembered while the directory is the same."""
        try:
            stamp = os.stat(self._directory).st_mtime_ns
            if fresh or self._listed[0] != stamp:
                names = frozenset(os.listdir(self._directory))
                merged = [self._directory / n for n in sorted(names) if is_merged(n)]
                self._listed = stamp, (names, merged)
        except FileNotFoundError:
            return frozenset(), []
        return self._listed[1]

    def _open(self, path: Path) -> PackFile:
        pack = self._packs.get(path)
        if pack is not None:
            return pack
        status = os.stat(path)
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
        known = self._broken.get(path)
        if known is not None and known[0] == stamp:
            # An error that is raised once more keeps the frames of all times before.
            raise Corrupt(known[1])
        try:
            pack = self._packs[path] = PackFile(path)
        except Corrupt as exc:
            # Looking for a table in a cut-off pack reads all of it: once is enough.
            self._broken[path] = (stamp, exc.reason)
            raise
        return pack

    def _replaced(self, segment: Segment) -> bool:
        """Forget a segment if its file is no longer the one behind its name; whether it was so."""
        about_to_wait()
        pack = segment.pack
        try:
            status = os.stat(pack.path)
            if (status.st_dev, status.st_ino) == pack.inode:
                return False
        except FileNotFoundError:
            pass
        self.reopen(pack)
        return True

    def reopen(self, pack: PackFile) -> None:
        """Look behind the names again for what this pack held; it stays open for its readers."""
        with self._lock:
            if self._packs.get(pack.path) is pack:
                del self._packs[pack.path]
                self._retired.append(pack)
            for name in [n for n, s in self._segments.items() if s.pack is pack]:
                del self._segments[name]

    # Reading

    def rooted(self, name: str, root: bytes) -> Segment:
        """The segment, if it is the one a map was made for. Corrupt."""
        segment = self.segment(name)
        if segment.root != root:
            raise Corrupt(f"segment {name} is not the one the map was made for")
        return segment

    def hashes(self, name: str, root: bytes, number: int, count: int) -> bytes:
        """The recorded hashes of consecutive frames of the segment with this root. Corrupt."""
        try:
            return self.rooted(name, root).hashes(number, count)
        except ValueError as exc:
            raise Corrupt(str(exc)) from exc

    def read(
        self,
        name: str,
        root: bytes,
        number: int,
        count: int,
        *,
        place: memoryview | None = None,
        fresh: bool = False,
    ) -> list[Frame]:
        """Decoded, checked frames of the segment with this root.

        With `place`, which has room for exactly that many, they are decoded into it, and parts of
        it are returned. BadFrame names the first that cannot be had. `fresh`: from the medium,
        past the page cache.
        """
        try:
            return self._read(name, root, number, count, place, fresh)
        except BadFrame as exc:
            segment = self._segments.get(exc.bad.unit)
            if segment is None or not self._replaced(segment):
                raise
        return self._read(name, root, number, count, place, fresh)

    def read_elsewhere(self, parts: Sequence[Part], place: memoryview) -> bool:
        """Fill `place` with the help of other processes, if that can be done."""
        return self.decoders is not None and self.decoders.read(self._directory, parts, place)

    def sound_elsewhere(self, parts: Sequence[Part]) -> bool:
        """Whether other processes found that frames read well from the medium."""
        return self.decoders is not None and self.decoders.check(self._directory, parts)

    def _read(
        self,
        name: str,
        root: bytes,
        number: int,
        count: int,
        place: memoryview | None,
        fresh: bool,
    ) -> list[Frame]:
        try:
            segment = self.rooted(name, root)
        except Corrupt as exc:
            raise BadFrame(Bad(name, WHOLE), exc.reason) from exc
        try:
            entries = segment.entries(number, count)
            hashes = segment.hashes(number, count)
        except (Corrupt, ValueError) as exc:
            raise BadFrame(Bad(name, number), f"its table entry: {exc}") from exc
        frames: list[Frame] = []
        for first, run in _contiguous(entries):
            data = self._stored(segment, number + first, run, fresh)
            at = 0
            for index, entry in enumerate(run, first):
                stored, at = data[at : at + entry[1]], at + entry[1]
                where = place and place[index * FRAME : (index + 1) * FRAME]
                frame = self._frame(segment, number + index, entry, stored, where)
                if blake3(frame).digest() != hashes[index * 32 : index * 32 + 32]:
                    raise BadFrame(self._culprit(segment, number + index), "wrong content")
                frames.append(frame)
        return frames

    def _stored(self, segment: Segment, number: int, run: list[Entry], fresh: bool) -> memoryview:
        """The stored bytes of entries that follow each other; `number` is the first one's."""
        start, length = run[0][0], sum(entry[1] for entry in run)
        try:
            if fresh:
                forget_pages(segment.pack.fd, start, length)
            return memoryview(segment.pack.pread(length, start))
        except OverflowError as exc:
            raise BadFrame(Bad(segment.name, number), f"cannot be read: {exc}") from exc
        except OSError as exc:
            if not is_medium_error(exc):
                raise
            raise BadFrame(Bad(segment.name, number), f"cannot be read: {exc}") from exc

    def _frame(
        self,
        segment: Segment,
        number: int,
        entry: Entry,
        stored: memoryview,
        place: memoryview | None,
    ) -> Frame:
        if place is None:
            return self._decode(segment, number, entry, stored, 0).frame
        if entry[2] == codec.ZSTD and entry[1] == len(stored):
            try:
                codec.decompress_into(stored, place)
            except ValueError as exc:
                raise BadFrame(Bad(segment.name, number), str(exc)) from exc
        else:
            place[:] = self._decode(segment, number, entry, stored, 0).frame
        return place

    def _decode(
        self, segment: Segment, number: int, entry: Entry, stored: memoryview, nested: int
    ) -> Chained:
        _, csize, kind, depth, _, base_index, _, base_number = entry
        bad = Bad(segment.name, number)
        try:
            if len(stored) != csize:
                raise ValueError("the file ends within the frame")
            if kind == codec.ZSTD:
                return Chained(codec.decompress(stored), 0, csize, None)
            if kind != codec.PATCH or nested >= codec.DEPTH_MAX:
                raise ValueError(f"kind {kind}, depth {depth} is not what a map may refer to")
            base = Bad(segment.base_name(base_index), base_number)
            below = self.chained(base, nested + 1)
            frame = codec.decompress_patch(stored, below.frame)
        except ValueError as exc:
            raise BadFrame(bad, str(exc)) from exc
        return Chained(frame, below.depth + 1, below.full_bytes, base)

    def chained(self, bad: Bad, nested: int = 0) -> Chained:
        """Decode one frame without checking its hash (its patches' hashes cover it)."""
        try:
            segment = self.segment(bad.unit)
            entry = segment.entry(bad.number)
            if entry[1] > codec.STORED_BYTES_MAX:
                raise ValueError(f"{entry[1]} bytes are impossible for a frame")
            stored = memoryview(segment.pack.pread(entry[1], entry[0]))
        except Corrupt as exc:
            raise BadFrame(Bad(bad.unit, WHOLE), exc.reason) from exc
        except (ValueError, OverflowError) as exc:
            raise BadFrame(bad, str(exc)) from exc
        except OSError as exc:
            if not is_medium_error(exc):
                raise
            raise BadFrame(bad, str(exc)) from exc
        return self._decode(segment, bad.number, entry, stored, nested)

    def checked(self, bad: Bad, expected: bytes | None = None) -> Chained:
        """As `chained`, with the frame's hash checked; `expected`, where it was read already."""
        found = self.chained(bad)
        if not self._matches(bad, found.frame, expected):
            raise BadFrame(self._culprit(self.segment(bad.unit), bad.number), "wrong content")
        return found

    def _matches(self, bad: Bad, frame: bytes, expected: bytes | None = None) -> bool:
        try:
            recorded = expected or self.segment(bad.unit).hashes(bad.number, 1)
            return blake3(frame).digest() == recorded
        except (Corrupt, ValueError) as exc:
            raise BadFrame(bad, f"its hash: {exc.args[0]}") from exc

    def _culprit(self, segment: Segment, number: int) -> Bad:
        """The deepest element of the chain whose own content is wrong."""
        wrong = here = Bad(segment.name, number)
        for _ in range(codec.DEPTH_MAX):
            base = self.chained(here).base
            if base is None:
                break
            here = base
            if not self._matches(here, self.chained(here).frame):
                wrong = here
        return wrong

    def chain(self, bad: Bad) -> list[Bad]:
        """The bases a frame's patch rests on, nearest first, from the tables alone.

        Corrupt or ValueError where one cannot be followed.
        """
        return list(self.bases(bad))

    def bases(self, bad: Bad) -> Iterator[Bad]:
        """As `chain`, one by one: those before the one that cannot be followed are given."""
        for _ in range(codec.DEPTH_MAX):
            segment = self.segment(bad.unit)
            entry = segment.entry(bad.number)
            if entry[2] != codec.PATCH:
                return
            bad = Bad(segment.base_name(entry[5]), entry[7])
            yield bad


def is_merged(name: str) -> bool:
    """Whether a file name in packs/ is that of a pack of merged segments."""
    return name.startswith(MERGED_PREFIX) and name.endswith(PACK_SUFFIX)


def _contiguous(entries: list[Entry]) -> Iterator[tuple[int, list[Entry]]]:
    """Runs of entries whose bytes follow each other, of at most 4 MiB, with their index."""
    start, expected, size = 0, -1, 0
    for index, entry in enumerate(entries):
        if entry[0] != expected or size + entry[1] > _RUN_BYTES_MAX:
            if index > start:
                yield start, entries[start:index]
            start, size = index, 0
        # A damaged length must not become a request for gigabytes of memory.
        if entry[1] > codec.STORED_BYTES_MAX:
            entries[index] = entry = (entry[0], 0, *entry[2:])
        expected, size = entry[0] + entry[1], size + entry[1]
    if len(entries) > start:
        yield start, entries[start:]
