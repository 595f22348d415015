"""A source read at a rate: the same bytes, later."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backyfs.source.cancelling import checking
from backyfs.source.contract import Backups, Session, session
from backyfs.source.file import FileSource
from backyfs.source.throttle import Rate, ThrottledSource
from tests.engine.memory import MemorySource


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def rate(clock: Clock, bytes_per_s: int) -> Rate:
    return Rate(bytes_per_s, now=lambda: clock.now, sleep=clock.sleep)


@given(st.lists(st.integers(1, 10_000), min_size=1), st.integers(100, 5_000))
def test_no_faster_than_the_rate(counts: list[int], bytes_per_s: int) -> None:
    clock = Clock()
    limited = rate(clock, bytes_per_s)
    for count in counts:
        limited.take(count)
    # The last take waits for what was taken before it.
    assert abs(clock.now - 100 - sum(counts[:-1]) / bytes_per_s) < 1e-6 * len(counts)


def test_an_idle_second_is_not_made_up_for() -> None:
    clock = Clock()
    limited = rate(clock, 10)
    limited.take(10)
    clock.now += 60
    limited.take(10)
    assert clock.now == 160.0
    limited.take(10)
    assert clock.now == 161.0


def test_a_wait_ends_when_the_backup_is_to_stop() -> None:
    """Two megabytes, a job of the engine, take half an hour at a kilobyte a second."""
    clock = Clock()
    limited = rate(clock, 1)

    def stop() -> None:
        if clock.now >= 103:
            raise KeyboardInterrupt

    limited.take(1800)
    with checking(stop), pytest.raises(KeyboardInterrupt):
        limited.take(1)
    assert clock.now == 103.0


def test_what_a_source_remembers_is_asked_of_it() -> None:
    source = MemorySource({"disk": bytearray(10)}, tracking=True)
    with session(ThrottledSource(source, rate(Clock(), 10)), Backups(UUID(int=1), ())) as slow:
        assert isinstance(slow, Session)
        with slow.snapshot("r", {}) as snapshot:
            since = {"disk": snapshot.disks["disk"].bookmark}
        assert slow.remembers(since)
        source.kept.clear()
        assert not slow.remembers(since)


def test_the_source_says_what_it_says_without_a_rate(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * 200_000)
    clock = Clock()
    plain = FileSource({"disk": str(image)})
    slow = ThrottledSource(FileSource({"disk": str(image)}), rate(clock, 100_000))
    assert (slow.type, slow.disks()) == (plain.type, plain.disks())
    with plain.snapshot("r", {}) as a, slow.snapshot("r", {}) as b:
        assert (a.consistency, a.reason, a.frozen) == (b.consistency, b.reason, b.frozen)
        one, other = a.disks["disk"], b.disks["disk"]
        assert (one.size, one.bookmark, list(one.data())) == (
            other.size,
            other.bookmark,
            list(other.data()),
        )
        assert one.changed() == other.changed()
        assert other.read(0, 100_000) + other.read(100_000, 100_000) == one.read(0, 200_000)
        b.published()
    assert clock.now == 101.0
