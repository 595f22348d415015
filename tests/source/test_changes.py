"""Change lists from outside: exactly right or refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backyfs.errors import UsageError
from backyfs.model import Extent
from backyfs.source.changes import checked, parse

RBD = """[{"offset":4194304,"length":4096,"exists":"true"},
{"offset":0,"length":4194304,"exists":"false"}]"""


def test_what_rbd_prints() -> None:
    assert parse(RBD) == (Extent(0, 4_194_304), Extent(4_194_304, 4096))
    assert parse(RBD.encode()) == parse(RBD)
    assert parse("[]") == ()


def test_exists_may_be_a_boolean_or_missing() -> None:
    assert parse('[{"offset": 0, "length": 1, "exists": false}]') == (Extent(0, 1),)
    assert parse('[{"offset": 0, "length": 1}]') == (Extent(0, 1),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (b"\xff", "is not JSON"),
        ("{}", "is not a JSON list"),
        ("null", "is not a JSON list"),
        ("[[0, 1]]", r"entry 0 is no object"),
        ('[{"offset": 0}]', "entry 0 is no object"),
        ('[{"offset": 0, "length": 1, "zero": 1}]', "entry 0 has the unknown key 'zero'"),
        ('[{"offset": "0", "length": 1}]', "must be whole numbers"),
        ('[{"offset": 0.0, "length": 1}]', "must be whole numbers"),
        ('[{"offset": true, "length": 1}]', "must be whole numbers"),
        ('[{"offset": null, "length": 1}]', "must be whole numbers"),
        ('[{"offset": 0, "length": 1, "exists": "yes"}]', "must be true or false"),
        ('[{"offset": 0, "length": 1, "exists": []}]', "must be true or false"),
        ('[{"offset": 0, "length": 0}]', "impossible extent: offset 0, length 0"),
        ('[{"offset": -1, "length": 1}]', "impossible extent"),
        ('[{"offset": 0, "length": -1}]', "impossible extent"),
        ('[{"offset": 0, "length": 5}, {"offset": 4, "length": 1}]', "overlapping .* byte 4"),
        ('[{"offset": 0, "length": 5}, {"offset": 0, "length": 5}]', "overlapping .* byte 0"),
    ],
)
def test_anything_else_is_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text, "list.json")


def test_the_end_of_the_disk_is_the_limit() -> None:
    assert checked([Extent(0, 100)], size=100) == (Extent(0, 100),)
    with pytest.raises(UsageError, match="reaches beyond the disk of 99 bytes"):
        checked([Extent(0, 100)], size=99)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(["offset", "length", "exists", "x"]), inner)
        ),
    )
)
def test_no_json_whatever_gets_through_with_extents_that_are_none(value: object) -> None:
    try:
        extents = parse(json.dumps(value))
    except UsageError:
        return
    position = 0
    for extent in extents:
        assert position <= extent.offset < extent.end
        position = extent.end
