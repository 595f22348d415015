"""Healing: a good frame from the source takes the place of a damaged stored one.

The frame must be proven to be the recorded one: its BLAKE3 equals the recorded hash, or the
recorded hash itself is what was damaged (with the new hash in its place the segment's hash column
matches the root every map carries). Then all revisions that use the frame are whole again.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Mapping

from blake3 import blake3

from backyfs.errors import Corrupt
from backyfs.store.contract import Buffer
from backyfs.store.digest import HASH
from backyfs.store.format import Place
from backyfs.store.packs import codec
from backyfs.store.packs.library import Library
from backyfs.store.packs.packfile import PackFile, Segment
from backyfs.store.packs.rewrite import Replacement, Replacements, Rewriter, everything
from backyfs.store.quarantine import Bad

log = logging.getLogger(__name__)

REPAIR_BYTES_MAX = 64 << 20
"""Frames waiting to be put back, compressed; more than that is stored anew instead."""


class Repairs:
    """Collects good frames while a backup runs and puts them back when it seals."""

    def __init__(self, place: Place, library: Library) -> None:
        self._place, self._library = place, library
        self._lock = threading.Lock()
        self._frames: dict[Bad, Replacement] = {}
        self._bytes = 0
        self._sound: dict[PackFile, bool] = {}

    def offer(self, bad: Bad, frame: Buffer, fresh: bytes) -> bool:
        """Take `frame` (its hash: `fresh`) for a damaged one; False when it is not the same."""
        try:
            segment = self._library.segment(bad.unit)
            if not self._rewritable(segment.pack) or not _proven(segment, bad.number, fresh):
                return False
        except (Corrupt, ValueError, OSError):
            return False
        stored = codec.compress(frame)
        with self._lock:
            if self._bytes + len(stored) > REPAIR_BYTES_MAX:
                return False
            self._bytes += len(stored)
            self._frames[bad] = Replacement(stored, fresh)
        return True

    def _rewritable(self, pack: PackFile) -> bool:
        """Whether all of a pack's tables can be read; asked once per pack."""
        with self._lock:
            if pack not in self._sound:
                try:
                    for descriptor in pack.footer.segments:
                        segment = Segment(pack, descriptor)
                        segment.hashes(0, segment.count)
                        for _ in segment.all_entries():
                            pass
                    self._sound[pack] = True
                except (Corrupt, OSError):
                    self._sound[pack] = False
            return self._sound[pack]

    def apply(self) -> Mapping[Bad, Replacement]:
        """Rewrite the packs that hold the damaged frames and clear their quarantine records.

        Returns the frames of packs that cannot be rewritten: they are to be stored anew.
        """
        by_pack: defaultdict[PackFile, Replacements] = defaultdict(dict)
        for bad, replacement in self._frames.items():
            pack = self._library.segment(bad.unit).pack
            by_pack[pack][bad.unit, bad.number] = replacement
        left: dict[Bad, Replacement] = {}
        for pack, replacements in by_pack.items():
            try:
                self._rewrite(pack, replacements)
            except Corrupt as exc:  # another frame, which may well be readable the next time
                log.warning("damaged frames cannot be put back", {"reason": exc.reason})
                left |= {Bad(*place): frame for place, frame in replacements.items()}
        for bad in left:
            del self._frames[bad]
        for bad in self._frames:
            self._place.quarantine.clear(bad)
        if self._frames:
            log.warning("damaged frames put right from the source", {"frames": len(self._frames)})
        return left

    def notes(self) -> list[str]:
        """What is worth remembering of it, once it was applied."""
        count = len(self._frames)
        return [f"{count} damaged frame{'s' if count > 1 else ''} put right"] if count else []

    def _rewrite(self, pack: PackFile, replacements: Replacements) -> None:
        segments = [Segment(pack, descriptor) for descriptor in pack.footer.segments]
        Rewriter(self._place, pack.path).write(segments, everything, replacements)
        self._place.fs.sync_dir(pack.path.parent)
        self._library.reopen(pack)


def _proven(segment: Segment, number: int, fresh: bytes) -> bool:
    if segment.hashes(number, 1) == fresh:
        return True
    column = bytearray(segment.hashes(0, segment.count))
    column[number * HASH : (number + 1) * HASH] = fresh
    return blake3(column).digest() == segment.root
