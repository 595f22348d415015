"""How far is decoded ahead: shared by those that read in sequence, and by no others."""

from __future__ import annotations

import time

import pytest

from backyfs.nbd.session import ahead
from backyfs.nbd.session.ahead import PIECE_BYTES, READ_AHEAD_BYTES, Window

MIB = 1 << 20


def test_readers_share_a_quarter_of_the_cache() -> None:
    window = Window(64 * MIB)
    readers = [object() for _ in range(9)]
    found = [window.of(reader) for reader in readers]
    assert found[:4] == [READ_AHEAD_BYTES, 8 * MIB, 16 * MIB // 3, 4 * MIB]
    assert found[7:] == [2 * PIECE_BYTES, 0]  # too little for nine: nobody gets anything
    assert window.of(readers[0]) == 0


def test_a_large_cache_is_no_reason_to_go_further() -> None:
    assert Window(1 << 40).of(object()) == READ_AHEAD_BYTES


def test_who_pauses_needs_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_PAUSE_S", 0.05)
    window = Window(64 * MIB)
    idle, reader = object(), object()
    assert [window.of(idle), window.of(reader)] == [READ_AHEAD_BYTES, 8 * MIB]
    time.sleep(0.2)
    assert window.of(reader) == READ_AHEAD_BYTES
