"""Rooms of shared memory: nobody gets one that somebody still refers to."""

from __future__ import annotations

import mmap
import random
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from backyfs.store.packs.rooms import WARM_ROOMS, Rooms

ROOM = mmap.PAGESIZE
COUNT = WARM_ROOMS + 4


def test_what_does_not_fit() -> None:
    rooms = Rooms(2, ROOM)
    assert rooms.take(ROOM + 1) is None
    assert rooms.take(0) is None
    assert rooms.free == 2


def test_a_part_keeps_its_room() -> None:
    rooms = Rooms(1, ROOM)
    place = rooms.take(100)
    assert place is not None
    part = place[10:20].toreadonly()
    del place
    assert rooms.take(1) is None
    del part
    assert rooms.take(1) is not None


def test_where_a_place_lies() -> None:
    rooms = Rooms(3, ROOM)
    kept = [rooms.take(ROOM) for _ in range(3)]
    for place in kept:
        assert place is not None
        at = rooms.position(place[7:9])
        assert at is not None
        place[7] = 42
        assert rooms.memory[at] == 42
        place[7] = 0
    assert rooms.position(memoryview(bytearray(10))) is None
    assert rooms.position(memoryview(Rooms(1, ROOM).memory)) is None


def test_memory_of_many_free_rooms_is_given_back() -> None:
    rooms = Rooms(64, 1 << 20)
    kept = [rooms.take(1 << 20) for _ in range(64)]
    for place in kept:
        assert place is not None
        place[:] = b"x" * len(place)
    full = _shared_kib()
    kept.clear()
    del place
    assert rooms.free == 64
    assert full - _shared_kib() >= (64 - WARM_ROOMS) << 10


def _shared_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssShmem:")[1].split()[0])


def test_many_threads_share_none() -> None:
    rooms = Rooms(COUNT, ROOM)
    wrong: list[bytes] = []

    def use(number: int) -> None:
        rng = random.Random(number)
        for _ in range(2000):
            place = rooms.take(rng.randint(1, ROOM))
            if place is None:
                continue
            mark = rng.randbytes(1)
            place[:] = mark * len(place)
            if bytes(place) != mark * len(place):
                wrong.append(mark)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(COUNT + 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert rooms.free == COUNT


@settings(max_examples=50, stateful_step_count=60, deadline=None)
class Tenants(RuleBasedStateMachine):
    """Takes and forgets; what is held never changes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.rooms = Rooms(COUNT, ROOM)
        self.held: list[tuple[memoryview, bytes]] = []

    @rule(length=st.integers(1, ROOM), fill=st.binary(min_size=1, max_size=1))
    def take(self, length: int, fill: bytes) -> None:
        place = self.rooms.take(length)
        assert (place is None) == (len(self.held) == COUNT)
        if place is not None:
            assert len(place) == length
            place[:] = fill * length
            self.held.append((place, fill * length))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        del self.held[data.draw(st.integers(0, len(self.held) - 1))]

    @invariant()
    def nothing_changed(self) -> None:
        assert self.rooms.free == COUNT - len(self.held)
        assert all(place == content for place, content in self.held)


test_tenants = pytest.mark.filterwarnings("error")(Tenants.TestCase)
