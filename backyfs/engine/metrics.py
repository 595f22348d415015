"""What a check found as metrics for Prometheus: a file for node_exporter's textfile collector.

Labels are `job` and `tenant` (jobs are few and live long), `trust`, `severity` and `kind`; nothing
that is new with every backup. All names begin with `backyfs_`. The client library is imported
only by who writes metrics.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from backyfs import __version__
from backyfs.engine.health import Severity
from backyfs.errors import TargetError
from backyfs.store.fs import open_file, refuse_special
from backyfs.store.meter import Meter

if TYPE_CHECKING:
    from backyfs.engine.check import Check
    from backyfs.engine.health import JobHealth
    from backyfs.store.meter import Reading


def write_metrics(path: Path, check: Check) -> None:
    """Replace the file `path`, at once. TargetError when it cannot be written."""
    registry = CollectorRegistry()
    registry.register(_Metrics(check))
    try:
        refuse_special(path)
        write_to_textfile(str(path), registry)
        # node_exporter is another user, who may be able to put a link there meanwhile.
        with open(open_file(path), "rb") as stream:
            os.fchmod(stream.fileno(), 0o644)
    except OSError as exc:
        raise TargetError(f"cannot write metrics to {path}: {exc.strerror}") from exc


class _Metrics(Collector):
    def __init__(self, check: Check) -> None:
        self._check = check

    def collect(self) -> Iterator[Metric]:
        """Every metric family with all its samples."""
        build = GaugeMetricFamily(
            "backyfs_build_info", "The version of backyfs.", labels=["version"]
        )
        build.add_metric([__version__], 1)
        yield build
        yield from self._site()
        for family in (_JobTimes(), _JobTold(), _JobState(), _JobBytes()):
            for job in self._check.jobs:
                family.add(job)
            yield from family.metrics

    def _site(self) -> Iterator[Metric]:
        check = self._check
        yield GaugeMetricFamily(
            "backyfs_check_timestamp_seconds",
            "When these metrics were collected.",
            value=check.now.timestamp(),
        )
        yield GaugeMetricFamily(
            "backyfs_check_severity",
            "0 ok, 1 warning, 2 critical, 3 unknown, as of `backyfs check`.",
            value=int(check.severity),
        )
        yield self._findings()
        yield GaugeMetricFamily(
            "backyfs_unmanaged_directories",
            "Repositories in the base directory that no job is for.",
            value=len(check.unmanaged),
        )
        if check.disk is not None:
            yield GaugeMetricFamily(
                "backyfs_filesystem_size_bytes",
                "Size of the file system of the base directory.",
                value=check.disk.size,
            )
            yield GaugeMetricFamily(
                "backyfs_filesystem_avail_bytes",
                "What ordinary writes may still use of it.",
                value=check.disk.available,
            )

    def _findings(self) -> Metric:
        family = GaugeMetricFamily(
            "backyfs_check_findings", "Findings of the check.", labels=["severity", "kind"]
        )
        counts: dict[tuple[str, str], int] = {}
        for finding in self._check.findings:
            key = (Severity(finding.severity).name.lower(), finding.kind)
            counts[key] = counts.get(key, 0) + 1
        for key, count in sorted(counts.items()):
            family.add_metric(key, count)
        return family


def _labels(job: JobHealth) -> list[str]:
    return [job.name, job.expected.tenant]


def _gauge(name: str, text: str, *more: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"backyfs_{name}", text, labels=["job", "tenant", *more])


def _seconds(time: datetime | None) -> float:
    return time.timestamp() if time else 0.0


class _JobTimes:
    def __init__(self) -> None:
        self._success = _gauge(
            "job_last_success_timestamp_seconds",
            "Time of the newest revision that is neither torn, distrusted nor damaged (0 = none).",
        )
        self._attempt = _gauge(
            "job_last_attempt_timestamp_seconds", "Time of the newest revision (0 = none)."
        )
        self._duration = _gauge(
            "job_last_duration_seconds", "How long the newest good revision took to make."
        )
        self._freeze = _gauge(
            "freeze_seconds", "How long the guest was frozen for the newest revision (0 = was not)."
        )
        self._verified = _gauge(
            "job_last_verified_timestamp_seconds",
            "When stored data was last read and compared, beyond each backup's own (0 = never).",
        )
        self._sla = _gauge(
            "job_sla_seconds", "How old the newest good revision of the job may get."
        )

    @property
    def metrics(self) -> Sequence[Metric]:
        return (
            self._success,
            self._attempt,
            self._duration,
            self._freeze,
            self._verified,
            self._sla,
        )

    def add(self, job: JobHealth) -> None:
        labels = _labels(job)
        self._success.add_metric(labels, _seconds(job.good.time if job.good else None))
        self._attempt.add_metric(labels, _seconds(job.newest.time if job.newest else None))
        if job.good is not None:
            self._duration.add_metric(labels, job.good.stats.seconds)
        if job.newest is not None and job.newest.quiescing.result != "none":
            done = job.newest.quiescing.result == "done"
            self._freeze.add_metric(labels, job.newest.quiescing.frozen_s if done else 0.0)
        self._verified.add_metric(labels, _seconds(job.checked))
        self._sla.add_metric(labels, job.expected.sla_s)


class _JobTold:
    """What the scheduler alone knows; nothing of a job it says nothing of."""

    def __init__(self) -> None:
        self._next = _gauge(
            "job_next_run_timestamp_seconds", "When the scheduler means to back the job up next."
        )
        self._result = _gauge(
            "job_last_result",
            "Exit code of the scheduler's last attempt, as class; always 1.",
            "class",
        )
        self._failures = _gauge(
            "job_failures", "Attempts that failed since the last one that did not."
        )

    @property
    def metrics(self) -> Sequence[Metric]:
        return (self._next, self._result, self._failures)

    def add(self, job: JobHealth) -> None:
        told, labels = job.expected.told, _labels(job)
        with contextlib.suppress(TypeError, ValueError):
            at = datetime.fromisoformat(told.get("next_time") or "")
            self._next.add_metric(labels, at.timestamp())
        code, failures = told.get("last_code"), told.get("failures")
        if isinstance(code, int):
            self._result.add_metric([*labels, _CLASSES.get(code, "failed")], 1)
        if isinstance(failures, int):
            self._failures.add_metric(labels, failures)


_CLASSES = {
    0: "success",
    2: "configuration",
    10: "repository",
    12: "damaged",
    13: "source",
    14: "space",
    75: "busy",
}


class _JobState:
    def __init__(self) -> None:
        self._late = _gauge("job_late", "Whether the job is not within its SLA.")
        self._running = _gauge("job_running", "Whether a backup of the job is running.")
        self._revisions = _gauge("job_revisions", "Revisions by trust.", "trust")
        self._quarantine = _gauge("quarantine_reports", "Stored frames known to be bad.")
        self._reports = _gauge(
            "job_mismatch_reports", "Reports of revisions that differ from their source."
        )

    @property
    def metrics(self) -> Sequence[Metric]:
        return (self._late, self._running, self._revisions, self._quarantine, self._reports)

    def add(self, job: JobHealth) -> None:
        labels = _labels(job)
        self._late.add_metric(labels, job.late)
        self._running.add_metric(labels, job.running is not None)
        for trust, count in job.by_trust.items():
            self._revisions.add_metric([*labels, str(trust)], count)
        self._quarantine.add_metric(labels, job.bad_frames)
        self._reports.add_metric(labels, job.reports)


class _JobBytes:
    """From the meter: nothing of a job whose meter was never read."""

    def __init__(self) -> None:
        self._logical = _gauge("job_logical_bytes", "Size of the disks of the newest revision.")
        self._stored = _gauge("job_stored_bytes", "What the job's revisions take on disk.")
        self._read = CounterMetricFamily(
            "backyfs_backup_read_bytes",
            "Read from the source by all backups of the job.",
            labels=["job", "tenant"],
        )
        self._written = CounterMetricFamily(
            "backyfs_backup_written_bytes",
            "Added to the store by all backups of the job.",
            labels=["job", "tenant"],
        )

    @property
    def metrics(self) -> Sequence[Metric]:
        return (self._logical, self._stored, self._read, self._written)

    def add(self, job: JobHealth) -> None:
        reading = _last(job)
        if reading is None:
            return
        labels = _labels(job)
        self._logical.add_metric(labels, reading.logical)
        self._stored.add_metric(labels, reading.stored)
        self._read.add_metric(labels, reading.read)
        self._written.add_metric(labels, reading.written)


def _last(job: JobHealth) -> Reading | None:
    try:
        return Meter(job.expected.path).last()
    except OSError:
        return None
