"""What telnet clients send: negotiation, line ends, editing, in any pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backyfs.engine.scheduling.telnet import LINE_MAX, Lines


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"jobs\r\n", ["jobs"]),
        (b"jobs\r\0run a\r\0", ["jobs", "run a"]),
        (b"jobs\nstatus\n", ["jobs", "status"]),
        (b"\r\n\r\n", ["", ""]),
        (b"jobx\x08s\r\n", ["jobs"]),
        (b"jobx\x7fs\r\n", ["jobs"]),
        (b"\x7f\x7fjobs\r\n", ["jobs"]),
        ("jobsä\x7f\r\n".encode(), ["jobs"]),
        (b"wrong\x15jobs\r\n", ["jobs"]),
        (b"run wrong\x17vm1\r\n", ["run vm1"]),
        (b"wrong\x03jobs\r\n", ["jobs"]),
        (b"\xff\xfd\x01\xff\xfb\x1fjobs\r\n", ["jobs"]),
        (b"jo\xff\xfa\x1f\x00\x50\x00\x18\xff\xf0bs\r\n", ["jobs"]),
        (b"jo\xff\xfa\x1f\xff\xff\x0d\xff\xf0bs\r\n", ["jobs"]),
        (b"jobx\xff\xf7s\r\n", ["jobs"]),
        (b"wrong\xff\xf8jobs\r\n", ["jobs"]),
        (b"wrong\xff\xf4\xff\xfd\x06jobs\r\n", ["jobs"]),
        (b"a\x1b[A\tb\r\n", ["a[Ab"]),
        (b"\xc3(\r\n", ["�("]),
        (b"x" * 5000 + b"\r\n", ["x" * LINE_MAX]),
    ],
)
def test_lines(data: bytes, lines: list[str]) -> None:
    assert Lines().feed(data)[0] == lines
    one_by_one = Lines()
    found = [line for byte in data for line in one_by_one.feed(bytes([byte]))[0]]
    assert found == lines


def test_options_are_declined() -> None:
    assert Lines().feed(b"\xff\xfd\x01\xff\xfb\x1f\xff\xfe\x01\xff\xfc\x1f")[1] == (
        b"\xff\xfc\x01\xff\xfe\x1f"
    )


def test_are_you_there() -> None:
    assert b"yes" in Lines().feed(b"\xff\xf6")[1]


def test_the_end_is_an_empty_line_with_ctrl_d() -> None:
    lines = Lines()
    lines.feed(b"jo\x04bs")
    assert not lines.ended
    lines.feed(b"\r\n\x04")
    assert lines.ended


@given(st.lists(st.binary(max_size=50)))
def test_nothing_that_is_sent_breaks_it(pieces: list[bytes]) -> None:
    lines = Lines()
    for piece in pieces:
        found, answer = lines.feed(piece)
        assert all(len(line) <= LINE_MAX for line in found)
        assert len(answer) <= 3 * len(piece) + 9
