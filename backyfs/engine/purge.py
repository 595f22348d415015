"""Purge: expire revisions, then free the space nothing needs any more."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from backyfs.config.schedule import Schedule
from backyfs.engine.expire import Expiry, expire
from backyfs.store.format import GcReport
from backyfs.store.repository import Repository


@dataclass(frozen=True, slots=True)
class Purge:
    """What a purge did, or (dry run) would do.

    A dry run counts the space of what is unneeded now, not of what would expire.
    """

    expiry: Expiry
    gc: GcReport


def purge(
    repository: Repository,
    schedule: Schedule,
    now: datetime,
    *,
    dry_run: bool = False,
    wait_s: float = 0.0,
) -> Purge:
    """Expire by `schedule`, then collect garbage. Busy; Corrupt while anything is unreadable."""
    expiry = expire(repository, schedule, now, dry_run=dry_run, wait_s=wait_s)
    return Purge(expiry, repository.gc(dry_run=dry_run, wait_s=wait_s))
