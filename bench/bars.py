"""The bars: what backyfs promises, each as one comparison of what was measured.

A bar holds when the median of its ratios, round by round, is at most its limit; a bar without a
floor is in bytes or seconds and holds when no sample exceeds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench import backups, ceph, cow, floors, imagefs, listing, memory, mounts, nbd, restores
from bench.ledger import Ledger, Spread
from bench.systems import PEERS

_RSS_MAX = 256 << 20
_LISTING_RSS_MAX = 128 << 20
_UNCHANGED_MAX = 64 << 10
# Not `later`: the stores of the others hold no generations there.
_OURS = (backups.OURS, backups.VERIFIED, backups.LISTED)


@dataclass(frozen=True, slots=True)
class Bar:
    """`quantity` of a side, over that of `floor` on the same line; "" = the quantity itself.

    `at` picks the sample of one round (0 = the first) where the bar speaks of one generation.
    """

    line: str
    side: str
    quantity: str
    limit: float
    floor: str = ""
    at: int | None = None

    def values(self, ledger: Ledger) -> list[float]:
        """What is compared with the limit, round by round."""
        if self.floor:
            return ledger.ratios(self.line, self.side, self.floor, self.quantity)
        return ledger.values(self.line, self.side, self.quantity)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bar and what was found."""

    bar: Bar
    found: Spread

    @property
    def holds(self) -> bool:
        """Whether the bar holds."""
        return self.found.value <= self.bar.limit

    def as_json(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return {**asdict(self.bar), **asdict(self.found), "holds": self.holds}


def verdicts(ledger: Ledger, generations: int) -> list[Verdict]:
    """Every promise for which both sides were measured."""
    return judged(ledger, [*_promised(generations), *_against_peers(ledger)])


def judged(ledger: Ledger, bars: Sequence[Bar]) -> list[Verdict]:
    """The verdicts on those bars for which both sides were measured."""
    found = ((bar, _spread(bar, bar.values(ledger))) for bar in bars)
    return [Verdict(bar, spread) for bar, spread in found if spread]


def _spread(bar: Bar, values: list[float]) -> Spread | None:
    if len(values) <= (bar.at or 0):
        return None
    spread = Spread.median(values)
    chosen = spread.value if bar.floor else spread.high
    value = chosen if bar.at is None else values[bar.at]
    return Spread(value, spread.low, spread.high, spread.count)


def _promised(generations: int) -> Iterator[Bar]:
    yield from _full()
    yield from _increments(generations)
    yield from _unchanged()
    yield from _restores()
    for name in cow.FILE_SYSTEMS:
        yield from _cow(name)
    yield from _mounts()
    yield from _listing()
    yield from _memory()
    yield from _nbd()
    yield from _ceph()


def _full() -> Iterator[Bar]:
    yield Bar(backups.FULL, backups.OURS, "wall_s", 1.0, floors.ZSTD)
    yield Bar(backups.FULL, backups.VERIFIED, "wall_s", 1 / 0.6, floors.ZSTD)
    yield Bar(backups.FULL, backups.OURS, "stored_bytes", 1.03, floors.ZSTD)


def _increments(generations: int) -> Iterator[Bar]:
    for side in (backups.OURS, backups.LISTED):
        for at in (0, generations - 1):
            yield Bar("random4k", side, "stored_bytes", 1.15, floors.ALONE, at)
        yield Bar("clustered", side, "stored_bytes", 1.10, floors.TOGETHER)
    full = backups.OWN_FULL
    yield Bar("random4k", backups.OURS, "wall_s", 0.5, full)
    yield Bar("random4k", backups.LISTED, "wall_s", 0.25, full)
    yield Bar("clustered", backups.OURS, "wall_s", 0.5, full)
    yield Bar("clustered", backups.LISTED, "wall_s", 0.1, full)


def _unchanged() -> Iterator[Bar]:
    for line in (backups.UNCHANGED, backups.UNCHANGED_LATER):
        for side in (backups.OURS, backups.LISTED):
            yield Bar(line, side, "allocated_bytes", _UNCHANGED_MAX)


def _restores() -> Iterator[Bar]:
    for side in (backups.OURS, restores.LATER):
        yield Bar(restores.TO_NULL, side, "wall_s", 1.0, floors.UNZSTD)
        yield Bar(restores.TO_FILE, side, "wall_s", 1 / 0.8, floors.COPY)


def _cow(name: str) -> Iterator[Bar]:
    for pattern in cow.PATTERNS:
        line = cow.line(name, pattern)
        yield Bar(line, backups.LISTED, "wall_s", 1.1, floors.CLONE)
        yield Bar(line, backups.LISTED, "wall_s", 0.1, backups.OWN_FULL)
        yield Bar(line, backups.OURS, "wall_s", 0.5, backups.OWN_FULL)


def _mounts() -> Iterator[Bar]:
    ours = backups.OURS
    yield Bar(mounts.SEQUENTIAL, ours, "wall_s", 1 / 0.8, imagefs.SQUASHFUSE)
    yield Bar(mounts.SEQUENTIAL, ours, "wall_s", 1 / 0.5, mounts.DECODED)
    yield Bar(mounts.RANDOM, ours, "wall_s", 1.0, imagefs.SQUASHFUSE)
    yield Bar(mounts.RANDOM, ours, "wall_s", 1.0, imagefs.QEMU)
    for name in cow.FILE_SYSTEMS:
        shares = {mounts.SEQUENTIAL: 0.7, mounts.RANDOM: 0.4, mounts.DEEP: 0.25}
        for what, share in shares.items():
            yield Bar(cow.line(name, what), ours, "wall_s", 1 / share, imagefs.PASSTHROUGH)


def _listing() -> Iterator[Bar]:
    yield Bar(listing.ALL, backups.OURS, "wall_s", 2.0, imagefs.PASSTHROUGH)
    yield Bar(listing.FIRST, backups.OURS, "wall_s", 0.5)
    for line in (listing.ALL, listing.FIRST):
        yield Bar(line, backups.OURS, "rss_bytes", _LISTING_RSS_MAX)


def _memory() -> Iterator[Bar]:
    places = [
        *((backups.FULL, side) for side in (backups.OURS, backups.VERIFIED)),
        *(("random4k", side) for side in (backups.OURS, backups.LISTED)),
        (backups.GC, backups.OURS),
        (restores.TO_NULL, restores.LATER),
        (restores.TO_FILE, restores.LATER),
        (mounts.SEQUENTIAL, restores.LATER),
        (mounts.RANDOM, restores.LATER),
        *((memory.BACKUP, side) for side in (backups.OURS, backups.VERIFIED)),
        *((line, backups.OURS) for line in (memory.GC, memory.RESTORE, memory.MOUNT)),
    ]
    yield from (Bar(line, side, "rss_bytes", _RSS_MAX) for line, side in places)
    yield Bar(memory.BACKUP, backups.OURS, "wall_s", memory.LIMIT, memory.SMALL)


def _nbd() -> Iterator[Bar]:
    for line, speed in (
        (nbd.COW_ONE, 0.9),
        (nbd.COW_FOUR, 0.5),
        (nbd.COW_RANDOM, 1.0),
        (nbd.PACKS_ONE, 0.5),
        (nbd.PACKS_RANDOM, 0.35),
    ):
        yield Bar(line, backups.OURS, "wall_s", 1 / speed, nbd.RAW)
        yield Bar(line, backups.OURS, "rss_bytes", _RSS_MAX)
        for other in nbd.OTHERS:
            yield Bar(line, backups.OURS, "wall_s", 1.0, other)


def _ceph() -> Iterator[Bar]:
    yield Bar(ceph.TO_RBD, backups.OURS, "wall_s", 1 / 1.2, ceph.PIPED)
    yield Bar(ceph.TO_RBD, backups.OURS, "rss_bytes", _RSS_MAX)
    yield Bar(ceph.FROM_RBD, backups.OURS, "wall_s", 1.0, ceph.EXPORTED)
    yield Bar(ceph.DIFF, backups.OURS, "wall_s", 0.05)


def _against_peers(ledger: Ledger) -> Iterator[Bar]:
    """Faster than each of them, in wall and processor time, on every line that both are on."""
    for line, sides in ledger.lines():
        if line == mounts.FIRST_BYTE:
            continue
        for side in (side for side in _OURS if side in sides):
            for peer in (peer.name for peer in PEERS if peer.name in sides):
                yield Bar(line, side, "wall_s", 1.0, peer)
                yield Bar(line, side, "cpu_s", 1.0, peer)
