"""Is every VM backed up within its SLA, and is everything else as it should be?

Answers from the configuration and the stores alone: no daemon is asked. A status file that a
daemon keeps is looked at only for its age. Memory: one VM's records at a time, and per job what
JobHealth holds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from backyfs.config.job import read_job
from backyfs.config.schedule import DAILY
from backyfs.config.site import Site
from backyfs.engine.health import (
    CLOCK_SKEW,
    Expected,
    Finding,
    JobHealth,
    Severity,
    examine,
    in_words,
)
from backyfs.errors import ConfigError
from backyfs.model import is_name
from backyfs.store import lock, space
from backyfs.store.record import parse_time
from backyfs.store.repository import may_be_repository

STATUS_AGE_MIN = timedelta(minutes=5)
"""How old a daemon's status may get: this, or ten of its intervals if that is longer."""
DISK_WARNING, DISK_CRITICAL = 90.0, 95.0
"""Percent of the file system that is not available any more."""


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system of the base directory; bytes."""

    size: int
    available: int

    @property
    def used_percent(self) -> float:
        """How much of it ordinary writes can no longer use."""
        return 100.0 * (self.size - self.available) / self.size if self.size else 0.0


@dataclass(frozen=True, slots=True)
class Check:
    """What was found. `jobs` in the order of the configuration; `findings` of all, worst first."""

    now: datetime
    jobs: Sequence[JobHealth]
    findings: Sequence[Finding]
    disk: Disk | None = None
    unmanaged: Sequence[str] = field(default=())

    @property
    def severity(self) -> Severity:
        """The worst: something critical outweighs what is not known."""
        found = {finding.severity for finding in self.findings}
        order = (Severity.CRITICAL, Severity.UNKNOWN, Severity.WARNING)
        return next((severity for severity in order if severity in found), Severity.OK)


def check(site: Site, *, ignore: Collection[str] = (), now: datetime | None = None) -> Check:
    """Look at all jobs of a site. Findings of a kind in `ignore` are left out."""
    now = now or datetime.now(UTC)
    changed = _changed(site.path)
    rows = _rows(site.settings.status_path)
    verify_s = site.maintenance.verify_interval_s
    expected = [
        Expected(
            name,
            site.directory(name),
            job.schedule,
            job.tenant,
            verify_interval_s=verify_s,
            known_since=[_time(rows.get(name, {}).get("first_seen")), changed],
            told=rows.get(name, {}),
        )
        for name, job in site.jobs.items()
    ]
    base = site.settings.base_dir
    more = list(_status(site, now))
    unmanaged = _unmanaged(base, site.jobs.keys(), more)
    return _looked_at(expected, base, now, more, ignore, unmanaged)


def check_directories(
    vms: Iterable[Path],
    base: Path,
    *,
    ignore: Collection[str] = (),
    now: datetime | None = None,
) -> Check:
    """Look at VMs by their own configuration, where there is none of the site."""
    expected = [_by_itself(path) for path in vms]
    return _looked_at(expected, base, now or datetime.now(UTC), [], ignore, [])


def _by_itself(path: Path) -> Expected:
    """What the VM's own configuration says. One that cannot be read hides no other VM."""
    try:
        return Expected(path.name, path, read_job(path / "config").schedule)
    except ConfigError as exc:
        return Expected(path.name, path, DAILY, problem=f"no schedule known: {exc}")


def _looked_at(
    expected: Iterable[Expected],
    base: Path,
    now: datetime,
    findings: list[Finding],
    ignore: Collection[str],
    unmanaged: Sequence[str],
) -> Check:
    held = lock.Held.now()
    jobs = [examine(one, now, held) for one in expected]
    disk = _disk(base, findings)
    for job in jobs:
        job.findings = [finding for finding in job.findings if finding.kind not in ignore]
        findings += job.findings
    wanted = [finding for finding in findings if finding.kind not in ignore]
    wanted.sort(key=lambda finding: _RANK[finding.severity])
    return Check(now, jobs, wanted, disk, unmanaged)


_RANK = {Severity.CRITICAL: 0, Severity.UNKNOWN: 1, Severity.WARNING: 2, Severity.OK: 3}


def _rows(status: Path) -> Mapping[str, Mapping[str, Any]]:
    """What the scheduler says of jobs, if it keeps (or kept) a status."""
    if _changed(status) is None:
        return {}
    from backyfs.engine.scheduling.state import read_status  # not without one: it imports trio

    return read_status(status)[1]


def _time(text: object) -> datetime | None:
    try:
        return parse_time(text) if isinstance(text, str) else None
    except ValueError:
        return None


def _changed(path: Path) -> datetime | None:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError:
        return None


def _status(site: Site, now: datetime) -> Iterable[Finding]:
    """A daemon that keeps a status file must keep it fresh; without one, none is running."""
    written = _changed(site.settings.status_path)
    if written is None:
        return
    limit = max(STATUS_AGE_MIN, timedelta(seconds=10 * site.settings.status_interval_s))
    if written > now + CLOCK_SKEW:
        text = f"{site.settings.status_path} is dated in the future: a clock was wrong"
        yield Finding(Severity.WARNING, "clock", "", text)
    elif now - written > limit:
        runs = lock.Held.now().exclusively(site.settings.lock_path)
        why = "cannot write it, see its log" if runs else "does not run"
        text = f"the status file is {in_words(now - written)} old: the scheduler {why}"
        yield Finding(Severity.CRITICAL, "status", "", text)


def _disk(base: Path, findings: list[Finding]) -> Disk | None:
    try:
        status = os.statvfs(base)
        reserve = space.reserve_bytes(base)
    except OSError as exc:
        text = f"{base}: {exc.strerror}"
        findings.append(Finding(Severity.CRITICAL, "disk", "", text))
        return None
    disk = Disk(status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize)
    text = f"{base} is {disk.used_percent:.0f} % full"
    if disk.available < reserve:
        text += ": backups are refused"
    if disk.available < reserve or disk.used_percent >= DISK_CRITICAL:
        findings.append(Finding(Severity.CRITICAL, "disk", "", text))
    elif disk.used_percent >= DISK_WARNING:
        findings.append(Finding(Severity.WARNING, "disk", "", text))
    return disk


def _unmanaged(base: Path, jobs: Collection[str], findings: list[Finding]) -> list[str]:
    """Repositories in the base directory that no job is for."""
    found = sorted(_names(base, lambda name: name not in jobs and may_be_repository(base / name)))
    if found:
        text = f"no job for {_listed(found)} in {base}"
        findings.append(Finding(Severity.WARNING, "unmanaged", "", text))
    return found


def _names(base: Path, wanted: Callable[[str], bool]) -> list[str]:
    try:
        return [name for name in os.listdir(base) if is_name(name) and wanted(name)]
    except OSError:
        return []  # told as the disk's


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
