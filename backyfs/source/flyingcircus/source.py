"""The source: the images of `ceph-rbd`, with snapshots that the VM's hypervisor takes.

When it takes none in time, or not of all disks, and that is allowed, the backup takes them itself:
a revision as after a power failure, with the reason recorded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from backyfs.config.quiesce import Policy
from backyfs.errors import SourceUnavailable
from backyfs.model import Consistency, Quiescing
from backyfs.source.ceph.heads import Head, Taken, take
from backyfs.source.ceph.points import Kind, Snap
from backyfs.source.ceph.source import CephSource
from backyfs.source.flyingcircus.config import Config, read_config

TYPE = "flyingcircus"

log = logging.getLogger(__name__)


def from_settings(settings: Mapping[str, Any]) -> CephSource:
    """The source a job's `source` section describes (without `type`); ConfigError."""
    config = read_config(settings)
    return CephSource(config.ceph, kind=TYPE, take=Hypervisor(config).take)


class Hypervisor:
    """Whoever runs the VM, as far as a backup needs it."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def take(self, heads: Mapping[str, Head], name: str) -> Taken:
        """The snapshot `name` of all images, by the hypervisor if it can be had.

        SourceUnavailable when it cannot and is required.
        """
        policy = self._config.policy
        if policy is Policy.NEVER:
            return take(heads, name)
        started = time.monotonic()
        reason = self._ask(heads, name)
        if not reason:
            seconds = time.monotonic() - started
            how = f"taken by the hypervisor, with the guest frozen, after {seconds:.1f} s"
            return Taken(Consistency.FILESYSTEM, how, Quiescing("done"))
        if policy is Policy.REQUIRE:
            raise SourceUnavailable(
                f"no snapshot by the hypervisor of {self._config.vm}: {reason}",
                hint="or set `hypervisor-snapshot: prefer` in the job's source",
            )
        log.warning("backup without the hypervisor's snapshot", {"reason": reason})
        for head in heads.values():  # what it took of some disks is of another time
            head.remove(_named(head, name))
        taken = take(heads, name)
        return taken._replace(reason=f"{taken.reason}; {reason}", quiescing=Quiescing("failed"))

    def _ask(self, heads: Mapping[str, Head], name: str) -> str:
        """Ask for the snapshot; returns "" when it is there, else why it is not."""
        from backyfs.source.flyingcircus.consul import Consul
        from backyfs.source.flyingcircus.request import ask

        def missing() -> Sequence[str]:
            return [disk for disk, head in heads.items() if not _named(head, name)]

        return ask(
            Consul(self._config.agent),
            self._config.vm,
            name,
            missing,
            own=_prefix(name),
            timeout_s=self._config.timeout_s,
        )


def _named(head: Head, name: str) -> list[Snap]:
    """The snapshot of a name, if it is there."""
    return [snap for snap in head.snaps() if snap.name == name and snap.kind is Kind.USER]


def _prefix(name: str) -> str:
    """What all snapshots of the repository begin with: all but the revision, TIME-SUFFIX."""
    return "".join(f"{part}-" for part in name.split("-")[:-2])
