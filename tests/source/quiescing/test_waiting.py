"""Waiting has an end, whatever a peer does."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from backyfs.source.quiescing.lines import LINE_MAX, Lines
from backyfs.source.quiescing.waiting import Stopped, Waiting


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    yield readable, writable
    os.close(readable)
    os.close(writable)


def test_a_peer_that_never_ends_sending_gains_no_time(pipe: tuple[int, int]) -> None:
    readable, writable = pipe
    os.write(writable, b"x")
    assert Waiting(30).for_any([readable]) == [readable]
    with pytest.raises(TimeoutError, match="no answer within -1 s"):
        Waiting(-1).for_any([readable])


def test_stopping_goes_first(pipe: tuple[int, int]) -> None:
    readable, writable = pipe
    os.write(writable, b"x")
    with pytest.raises(Stopped):
        Waiting(30, [readable]).for_any([readable])


def test_lines_are_cut_where_they_end(pipe: tuple[int, int]) -> None:
    readable, writable = pipe
    lines = Lines(readable)
    os.write(writable, b"one\ntwo\n\nthr")
    assert [lines.line(Waiting(5)) for _ in range(3)] == [b"one", b"two", b""]
    with pytest.raises(TimeoutError):
        lines.line(Waiting(0.05))
    os.write(writable, b"ee\n")
    assert lines.line(Waiting(5)) == b"three"


def test_a_line_has_a_limit(pipe: tuple[int, int]) -> None:
    readable, writable = pipe
    os.set_blocking(writable, False)
    lines, written = Lines(readable), 0
    with pytest.raises(ValueError, match="bytes without an end"):
        while True:
            written += os.write(writable, bytes(4096))
            try:
                lines.line(Waiting(0.01))
            except TimeoutError:
                assert written <= LINE_MAX + 4096
