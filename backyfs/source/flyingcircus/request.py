"""Asks a VM's hypervisor, through Consul, to take a snapshot of the VM's disks.

    key    snapshot/<uuid4>
    value  {"vm": VM, "snapshot": NAME}

Every hypervisor watches all below `snapshot/`. The one that runs the VM freezes the guest's file
systems, takes the RBD snapshot and thaws; what it cannot freeze it does not take. Whether the key
goes then is not settled: fc.qemu leaves it, and does whatever is asked there again at the next
change of any key. So the snapshot itself is the answer, and who asked takes the request away,
always.

A snapshot may still come when the request is gone: the hypervisor has read it before. It has the
name that was asked for, and there is one snapshot of a name: a late one is no second one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

from backyfs.source.cancelling import checkpoint
from backyfs.source.flyingcircus.agent import ConsulError
from backyfs.source.flyingcircus.consul import Consul, Entry

PREFIX = "snapshot/"

_LOOK_S = 1
"""How often to look for the snapshot while the request stands, in seconds."""

_BLINK_S = 0.25

log = logging.getLogger(__name__)


def ask(
    consul: Consul,
    vm: str,
    snapshot: str,
    missing: Callable[[], Sequence[str]],
    *,
    own: str,
    timeout_s: float,
) -> str:
    """Have `snapshot` taken; returns "" when no disk is `missing` it any more, else why one is.

    `missing` looks which disks have no such snapshot yet. Requests for this VM whose snapshots
    begin with `own` were left by a run that was killed: they are taken away first.
    """
    try:
        withdraw_leftover(consul, vm, own)
        with _posted(consul, vm, snapshot) as request:
            reason = _await(request, missing, timeout_s)
    except ConsulError as exc:
        reason = exc.message
    # Without the request nothing new begins; what had begun may have been finished.
    return reason if reason and missing() else ""


def withdraw_leftover(consul: Consul, vm: str, own: str) -> None:
    """Take away requests for `vm` whose snapshots begin with `own`, and nothing else.

    What is no request at all is told in the log. ConsulError.
    """
    strange = []
    for entry in consul.below(PREFIX).entries:
        request = _request(entry)
        if request is None:
            strange.append(entry.key)
        elif request["vm"] == vm and request["snapshot"].startswith(own):
            log.info("withdrawing a snapshot request that was left over", {"key": entry.key})
            consul.delete(entry.key, modified=entry.modified)
    if strange:
        values = {"keys": len(strange), "first": strange[0]}
        log.warning("Consul holds values that are no snapshot requests", values)


def _request(entry: Entry) -> dict[str, str] | None:
    """The request an entry is; None when it is something else."""
    try:
        value = json.loads(entry.value)
        found = {name: value[name] for name in ("vm", "snapshot")}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return found if all(isinstance(text, str) for text in found.values()) else None


class _Posted:
    """A request that stands in Consul; `gone`: somebody has taken it away."""

    def __init__(self, consul: Consul, key: str) -> None:
        self.gone = False
        self._consul, self._key = consul, key
        self._index = 0

    def wait(self) -> None:
        """Return when the request is gone, and every so often. ConsulError."""
        blink = time.monotonic() + _BLINK_S
        listing = self._consul.read(self._key, after=self._index, wait_s=_LOOK_S)
        self.gone = not listing.entries
        # An index that went back is another Consul's: what it knows is to be asked for anew.
        self._index = listing.index if listing.index >= self._index else 0
        if not self.gone:  # a Consul that does not wait shall not be asked all the time
            time.sleep(max(0.0, blink - time.monotonic()))


@contextlib.contextmanager
def _posted(consul: Consul, vm: str, snapshot: str) -> Iterator[_Posted]:
    """A request that stands while entered. ConsulError when it cannot be made."""
    key = f"{PREFIX}{uuid.uuid4()}"
    log.info("asking the hypervisor for a snapshot", {"snapshot": snapshot, "key": key})
    try:
        consul.write(key, json.dumps({"vm": vm, "snapshot": snapshot}).encode())
        yield _Posted(consul, key)
    finally:  # also when writing failed: its answer may have been lost
        _withdraw(consul, key)


def _withdraw(consul: Consul, key: str) -> None:
    try:
        consul.delete(key)
    except ConsulError as exc:
        values = {"key": key, "reason": exc.message}
        log.warning("a snapshot request may be left over until the next backup", values)


def _await(request: _Posted, missing: Callable[[], Sequence[str]], timeout_s: float) -> str:
    """Wait until no disk is missing the snapshot; returns "" then, else why waiting is over."""
    end = time.monotonic() + timeout_s
    trouble = ""
    while lacking := missing():
        if request.gone:
            return f"the request was taken away without a snapshot of {', '.join(lacking)}"
        if time.monotonic() >= end:
            what = f"the hypervisor has taken no snapshot of {', '.join(lacking)}"
            return f"{what} within {timeout_s:g} s{trouble}"
        checkpoint()
        try:
            request.wait()
            trouble = ""
        except ConsulError as exc:  # the hypervisor may know of the request nevertheless
            trouble = f"; {exc.message}"
            time.sleep(_LOOK_S)
    return ""
