"""backyfs check: is every VM backed up within its SLA? For Nagios, Icinga, Prometheus and people.

The first line and the exit code follow the guidelines for monitoring plug-ins.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from backyfs.cli import failure, options, output
from backyfs.cli.session import Session
from backyfs.errors import OutputError, TargetError, UsageError

if TYPE_CHECKING:
    from backyfs.engine.check import Check
    from backyfs.engine.health import Finding, JobHealth

UNKNOWN = 3
DETAILS_MAX = 20
"""Lines of details: old transports cut at 1 KiB."""
KINDS = (
    "late",
    "torn",
    "distrusted",
    "mismatch",
    "damaged",
    "unreadable",
    "frozen",
    "unverified",
    "clock",
    "readers",
    "unpurged",
    "repository",
    "status",
    "disk",
    "unmanaged",
)


class _Unanswered(OutputError):
    """The monitoring system cannot be told: only the exit code is left."""

    exit_code = UNKNOWN


class _Plugin(click.Command):
    """A command whose own failures are UNKNOWN: click's 2 would be CRITICAL, Python's 1 WARNING."""

    def make_context(
        self, info_name: str | None, args: list[str], *more: Any, **kwargs: Any
    ) -> click.Context:
        """As click's, except for wrong options."""
        with _unknown(as_json="--json" in args):
            return super().make_context(info_name, args, *more, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """As click's, except for what goes wrong."""
        with _unknown(as_json=ctx.params["as_json"]):
            return super().invoke(ctx)


@contextlib.contextmanager
def _unknown(*, as_json: bool) -> Iterator[None]:
    try:
        yield
    except (click.exceptions.Exit, KeyboardInterrupt, failure.Interrupted, BrokenPipeError):
        raise
    except OutputError as error:
        raise _Unanswered(error.message) from error
    except Exception as error:
        give_up(error, as_json=as_json)


def give_up(error: Exception, *, as_json: bool) -> NoReturn:
    """Say why there is no answer, and exit as UNKNOWN."""
    found = failure.explain(error)
    if found is None:
        import traceback

        traceback.print_exception(error)
        found = failure.Failure(UNKNOWN, f"a bug: {type(error).__name__}: {error}")
    found = found._replace(message=found.message or type(error).__name__)
    try:
        if as_json:
            output.json_line(_failed(found))
        else:
            output.line(_apology(found))
        sys.stdout.flush()
    except OutputError as exc:
        raise _Unanswered(exc.message) from error
    raise click.exceptions.Exit(UNKNOWN) from error


def _apology(found: failure.Failure) -> str:
    """One line for the monitoring system, what we know for people behind it."""
    return "\n".join([f"UNKNOWN: {found.message}", *filter(None, [found.hint])])


def _failed(found: failure.Failure) -> dict[str, Any]:
    """An answer without findings; imports nothing, for that may be what failed."""
    return {
        "message_type": "check",
        "status": "UNKNOWN",
        "code": UNKNOWN,
        "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}Z",
        "message": found.message,
        "hint": found.hint,
        "findings": [],
        "jobs": [],
        "disk": None,
        "unmanaged": [],
    }


@click.command(cls=_Plugin)
@options.config
@click.option(
    "--ignore",
    metavar="KIND",
    multiple=True,
    type=click.Choice(KINDS),
    help="Leave findings of this kind out; may be repeated.",
)
@click.option(
    "--metrics",
    metavar="FILE",
    type=options.PATH,
    help="Also write metrics for Prometheus to FILE (*.prom, for node_exporter's textfile "
    "collector).",
)
@click.option(
    "--data", is_flag=True, hidden=True, help="Not here: `verify` and `scrub` check stored data."
)
@options.as_json
@click.pass_obj
def command(
    session: Session, ignore: tuple[str, ...], metrics: Path | None, data: bool, as_json: bool
) -> int:
    """Say whether every VM was backed up within its SLA, in one line for monitoring systems.

    This does not read stored data: `verify` and `scrub` do; how long ago that was is part of the
    answer. A job is late when its newest good revision (not torn, distrusted or damaged) is older
    than 1.5 of the shortest interval of its schedule. Everything else that needs somebody counts,
    too: KIND is late, torn, distrusted, mismatch (a revision differs from its source), damaged,
    unreadable, frozen, unverified, clock, readers, unpurged, repository, status, disk or unmanaged.

    Works without the scheduler, from the configuration of all jobs (-c) and the stores. Where
    there is none, the VMs in the directory given with -b are looked at by their own.

    Exits 0 (OK), 1 (WARNING), 2 (CRITICAL) or 3 (UNKNOWN, also when the check itself fails).
    """
    if data:
        raise UsageError("check does not read data", hint="run: backyfs verify, or backyfs scrub")
    result = _checked(session, ignore)
    if metrics is not None:
        _write_metrics(metrics, result, as_json)
    if as_json:
        output.json_line(_value(result))
    else:
        output.line("\n".join([headline(result), *_details(result.findings)]))
    return int(result.severity)


def _write_metrics(path: Path, result: Check, as_json: bool) -> None:
    """That they cannot be written hides nothing that was found."""
    from backyfs.engine.health import Severity
    from backyfs.engine.metrics import write_metrics

    try:
        write_metrics(path, result)
    except TargetError as exc:
        if result.severity is Severity.OK:
            raise
        output.warn(exc.message, as_json=as_json)


def _checked(session: Session, ignore: Sequence[str]) -> Check:
    from backyfs.engine.check import check, check_directories
    from backyfs.store.repository import is_repository

    if session.has_site() or not session.directory.is_dir():
        return check(session.site(), ignore=ignore)
    own = [session.directory.resolve()] if is_repository(session.directory) else session.vms()
    if not own:
        return check(session.site(), ignore=ignore)
    return check_directories(own, session.directory, ignore=ignore)


def headline(result: Check) -> str:
    """The line a monitoring system shows, with performance data."""
    late = [job for job in result.jobs if job.late]
    count = f"{len(result.jobs)} job{'s' if len(result.jobs) != 1 else ''}"
    known = sum(job.known for job in result.jobs)
    if late:
        text = f"{len(late)} of {count} not within SLA"
    elif known < len(result.jobs):
        text = f"{known} of {count} within SLA"
    else:
        text = f"{count} within SLA"
    text += _ages(result)
    others = [finding for finding in result.findings if finding.kind != "late"]
    if others:
        text += f"; {_first(others)}"
    return f"{result.severity.name}: {_safe(text)} | {_performance(result)}"


def _ages(result: Check) -> str:
    from backyfs.engine.health import in_words

    ages = [age for job in result.jobs if (age := job.age(result.now)) is not None]
    checked = [job.checked for job in result.jobs]
    text = f", newest {in_words(min(ages))} ago" if ages else ""
    if checked and all(checked):
        oldest = min(time for time in checked if time)
        text += f", data checked {in_words(max(result.now - oldest, timedelta(0)))} ago"
    elif ages:
        never = sum(time is None for time in checked)
        text += f", data of {never} never checked"
    return text


def _first(findings: Sequence[Finding]) -> str:
    """The worst finding in full, how many more there are."""
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    return _text(findings[0]) + more


def _text(finding: Finding) -> str:
    return f"{finding.job}: {finding.text}" if finding.job else finding.text


def _safe(text: str) -> str:
    """A text that cannot be taken for performance data or another line."""
    return text.replace("|", "/").replace("\n", " ")


def _details(findings: Sequence[Finding]) -> list[str]:
    lines = [f"{f.severity.name} {_safe(_text(f))}" for f in findings[:DETAILS_MAX]]
    left = len(findings) - DETAILS_MAX
    return [*lines, f"and {left} more: backyfs check --json has all"] if left > 0 else lines


def _performance(result: Check) -> str:
    ages = [age for job in result.jobs if (age := job.age(result.now)) is not None]
    parts = [
        f"jobs={len(result.jobs)};;;0",
        f"late={sum(job.late for job in result.jobs)};0;0;0",
        f"running={sum(job.running is not None for job in result.jobs)};;;0",
        f"quarantine={sum(job.bad_frames for job in result.jobs)};0;;0",
        f"reports={sum(job.reports for job in result.jobs)};0;;0",
        f"unmanaged={len(result.unmanaged)};0;;0",
    ]
    if ages:
        parts.insert(2, f"oldest_backup={max(ages).total_seconds():.0f}s;;;0")
    if result.disk is not None:
        from backyfs.engine.check import DISK_CRITICAL, DISK_WARNING

        used = result.disk.used_percent
        parts.append(f"disk_used={used:.1f}%;{DISK_WARNING:.0f};{DISK_CRITICAL:.0f};0;100")
    return " ".join(parts)


def _value(result: Check) -> dict[str, Any]:
    return {
        "message_type": "check",
        "status": result.severity.name,
        "code": int(result.severity),
        "time": _time(result.now),
        "findings": [
            {"status": f.severity.name, "kind": f.kind, "job": f.job or None, "text": f.text}
            for f in result.findings
        ],
        "jobs": [_job(job, result) for job in result.jobs],
        "disk": {"size": result.disk.size, "available": result.disk.available}
        if result.disk
        else None,
        "unmanaged": list(result.unmanaged),
    }


def _job(job: JobHealth, result: Check) -> dict[str, Any]:
    age = job.age(result.now)
    return {
        "job": job.name,
        "tenant": job.expected.tenant or None,
        "sla": "TOO OLD" if job.late else "OK" if job.known else "UNKNOWN",
        "sla_seconds": job.expected.sla_s,
        "good": job.good.id if job.good else None,
        "good_time": _time(job.good.time) if job.good else None,
        "age": round(age.total_seconds(), 3) if age is not None else None,
        "newest": job.newest.id if job.newest else None,
        "running_since": _time(job.running) if job.running else None,
        "checked_at": _time(job.checked) if job.checked else None,
        "revisions": {str(trust): count for trust, count in job.by_trust.items()},
        "bad_frames": job.bad_frames,
        "reports": job.reports,
    }


def _time(time: Any) -> str:
    from backyfs.store.record import timestamp

    return timestamp(time)
