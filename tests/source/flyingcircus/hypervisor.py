"""A double of a hypervisor that takes the snapshots it is asked for through Consul, as fc.qemu.

It watches all keys below `snapshot/` over HTTP and, at each change, sees to all that are there:
whoever is not its VM, and what is no request, it leaves alone; a snapshot that exists is not taken
again; one it cannot freeze for is not taken. The key stays, unless `removes`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Take = Callable[[str], bool]
"""Takes the snapshot of that name; False: there is one already."""


@dataclass
class Hypervisor:
    """The host of `vm`, whose disks are `disks`, in that order; `address` is its Consul's.

    `delay_s`: before freezing. `freezes` False: the guest's agent does not answer. `held`: it has
    read the request, and goes on when this is true. `names`: what it calls the snapshot.
    """

    address: str
    vm: str
    disks: Mapping[str, Take]
    token: str = ""
    delay_s: float = 0.0
    freezes: bool = True
    removes: bool = False
    held: Callable[[], bool] = lambda: True
    names: Callable[[str], str] = lambda name: name
    events: list[str] = field(default_factory=list)
    reads: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def running(self) -> Iterator[Hypervisor]:
        """Watches while entered; what it has begun it ends first."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join(60)
            assert not thread.is_alive()

    def _watch(self) -> None:
        index = 0
        while not self._over.is_set():
            try:
                found, index = self._ask("GET", f"snapshot/?recurse=true&index={index}&wait=1s")
            except OSError:  # as the watch of a Consul that is down
                self._over.wait(0.1)
                continue
            self.reads += 1
            for entry in found:
                # fc.qemu logs "handle-key-failed" and goes on
                with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                    self._handle(entry["Key"], json.loads(base64.b64decode(entry["Value"])))

    def _handle(self, key: str, request: dict[str, str]) -> None:
        name = request["snapshot"]
        if request["vm"] != self.vm:
            return
        while not self.held() and not self._over.is_set():
            time.sleep(0.01)
        self._over.wait(self.delay_s)
        if self.freezes:
            self._snapshot(self.names(name))
        else:
            self.events.append("freeze failed")
        if self.removes:
            self._ask("DELETE", key)

    def _snapshot(self, name: str) -> None:
        self.events.append("freeze")
        try:
            for disk, take in self.disks.items():
                self.events.append(f"{'take' if take(name) else 'exists'} {disk}")
        finally:
            self.events.append("thaw")

    def _ask(self, method: str, path: str) -> tuple[Any, int]:
        url = f"{self.address}/v1/kv/{path}"
        headers = {"X-Consul-Token": self.token}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, method=method, headers=headers), timeout=30
            ) as answer:
                return json.load(answer), int(answer.headers.get("X-Consul-Index", 0))
        except urllib.error.HTTPError as exc:
            with exc:
                if exc.code != 404:
                    raise
                return [], int(exc.headers["X-Consul-Index"])
