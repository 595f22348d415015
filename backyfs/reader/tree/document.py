"""revision.json: the record's file with the revision's state put before its first key."""

from __future__ import annotations

import json

from backyfs.reader.catalog import Revision, Vm
from backyfs.reader.tree.node import NoEntry
from backyfs.store.fs import read_file
from backyfs.store.record import Record, timestamp

_json = json.JSONEncoder(ensure_ascii=False)


def size(vm: Vm, revision: Revision, wait: bool) -> int:
    """Bytes of the file."""
    return len(_state(vm, revision, wait)) + revision.record_bytes - 1


def content(vm: Vm, revision: Revision, size: int) -> bytes:
    """The file, exactly `size` bytes of it: what was promised when it was looked at."""
    record = revision.record
    path = vm.repository.layout.record(record.id)
    try:
        data = read_file(path)
    except FileNotFoundError as exc:
        raise NoEntry(f"{vm.name}: revision {record.id} was just removed") from exc
    Record.decode(data, f"{vm.name}: the record of revision {record.id}")
    text = _state(vm, revision, wait=True) + data[data.index(b"{") + 1 :]
    return text.ljust(size, b"\n")[:size]


def _state(vm: Vm, revision: Revision, wait: bool) -> bytes:
    state = revision.state
    value = {
        "damaged": [
            {
                "disk": damage.disk,
                "offset": damage.extent.offset if damage.extent else 0,
                "length": damage.extent.length if damage.extent else None,
                "reason": damage.reason,
            }
            for damage in vm.damage(revision.record, wait=wait)
        ],
        "tags": list(state.tags),
        "trust": str(state.trust),
        "verified_at": timestamp(state.verified_at) if state.verified_at else None,
        "why": state.why,
    }
    return b'{\n "state": ' + _json.encode(value).encode() + b","
