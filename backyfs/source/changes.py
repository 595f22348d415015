"""Change lists given from outside: what may differ from the parent revision of a disk.

Read from the JSON that `rbd diff --format json` prints, `[{"offset": 0, "length": 4194304,
"exists": "true"}, ...]`. A list is believed: an extent missing from it is never read. Therefore
nothing in it is guessed, skipped or repaired; whatever is not exactly right is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise

from backyfs.errors import UsageError
from backyfs.model import Extent

_EXISTS = (True, False, "true", "false")


def parse(text: str | bytes, what: str = "the change list") -> tuple[Extent, ...]:
    """The extents in the JSON of a change list, sorted; UsageError when it is not one.

    Discarded ranges ("exists": "false") are changes too. `what` names the list in errors.
    """
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"{what} is not JSON: {exc}") from exc
    if not isinstance(entries, list):
        raise UsageError(f"{what} is not a JSON list of extents")
    return checked((_extent(entry, f"{what}, entry {n}") for n, entry in enumerate(entries)), what)


def _extent(entry: object, where: str) -> Extent:
    if not isinstance(entry, dict) or not {"offset", "length"} <= entry.keys():
        raise UsageError(f'{where} is no object with "offset" and "length"')
    if surplus := entry.keys() - {"offset", "length", "exists"}:
        raise UsageError(f"{where} has the unknown key {min(surplus)!r}")
    offset, length = entry["offset"], entry["length"]
    if type(offset) is not int or type(length) is not int:
        raise UsageError(f"{where}: offset and length must be whole numbers of bytes")
    exists = entry.get("exists", True)
    if not isinstance(exists, bool | str) or exists not in _EXISTS:
        raise UsageError(f'{where}: "exists" must be true or false')
    return Extent(offset, length)


def checked(
    extents: Iterable[Extent], what: str = "the change list", size: int | None = None
) -> tuple[Extent, ...]:
    """`extents` sorted; UsageError when one is empty, overlaps another or is not inside `size`."""
    ordered = tuple(sorted(extents))
    for extent in ordered:
        if extent.offset < 0 or extent.length <= 0:
            raise UsageError(f"{what} has an impossible extent: {_shown(extent)}")
        if size is not None and extent.end > size:
            raise UsageError(
                f"{what} reaches beyond the disk of {size} bytes: {_shown(extent)}",
                hint="make the list again from the disk as it is now",
            )
    for one, other in pairwise(ordered):
        if other.offset < one.end:
            raise UsageError(f"{what} has overlapping extents at byte {other.offset}")
    return ordered


def _shown(extent: Extent) -> str:
    return f"offset {extent.offset}, length {extent.length}"
