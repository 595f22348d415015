"""All jobs as they stand, without the daemon: from the repositories, and what it wrote last."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from backyfs.config.site import Site, SiteJob
from backyfs.engine.scheduling import state
from backyfs.engine.scheduling.jobs import Job, Status
from backyfs.engine.scheduling.memory import Memory
from backyfs.engine.scheduling.processes import SystemClocks, contents_of
from backyfs.errors import BackyfsError

UNREADABLE = "unreadable"


def rows(site: Site) -> Iterator[dict[str, Any]]:
    """A row per job, by name, as `state.row` has it.

    `status` is the daemon's while its status file is fresh, else "not scheduled"; `last_reason`
    says why a repository cannot be read.
    """
    settings = site.settings
    memories = state.read_memories(settings.base_dir)
    written, live = state.read_status(settings.status_path)
    fresh = time.time() - written < 3 * settings.status_interval_s + 60
    for name in sorted(site.jobs):
        yield _row(site, site.jobs[name], memories.get(name), live.get(name), fresh)


def _row(
    site: Site,
    config: SiteJob,
    memory: Memory | None,
    live: dict[str, Any] | None,
    fresh: bool,
) -> dict[str, Any]:
    memory = memory or Memory(first_seen=_first_seen(site))
    job = Job(config, memory, SystemClocks(), retry_longest_s=site.settings.retry_longest_s)
    status = str(Status.WAITING)
    try:
        job.learn(contents_of(site.directory(config.name)))
    except BackyfsError as exc:
        job.known, job.memory.reason, status = True, exc.message, UNREADABLE
    found = state.row(job)
    if status != UNREADABLE:
        status = str((live or {}).get("status", Status.ENDED) if fresh else Status.ENDED)
    return {**found, "status": status}


def _first_seen(site: Site) -> float:
    """For a job no scheduler has seen yet: when the configuration was written."""
    try:
        return site.path.stat().st_mtime
    except OSError:
        return time.time()
