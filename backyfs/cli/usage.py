"""backyfs usage: what VMs and tenants store and move, for bills and for planning."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backyfs.cli import failure, options, output
from backyfs.cli.session import Session
from backyfs.errors import BackyfsError, UsageError

if TYPE_CHECKING:
    from backyfs.engine.usage import Usage
    from backyfs.store.repository import Repository

_KEYS = (
    "kind",
    "vm",
    "tenant",
    "since",
    "until",
    "logical",
    "stored",
    "exclusive",
    "read",
    "written",
    "gb_hours",
    "backups",
    "estimated",
)


@click.command()
@options.config
@click.option(
    "--since",
    metavar="DATE",
    help="Beginning of the span, as in a revision's SPEC: 2026-11-01, last-month, 3-days-ago,"
    " 2026-11-01T12:00 (default: this-month).",
)
@click.option("--until", metavar="DATE", help="End of the span, not included (default: now).")
@click.option(
    "--exclusive",
    is_flag=True,
    help="Also look into all maps for what each revision needs alone (takes a while).",
)
@options.as_json
@click.option("--csv", "as_csv", is_flag=True, help="Print comma-separated values.")
@click.pass_obj
def command(
    session: Session,
    since: str | None,
    until: str | None,
    exclusive: bool,
    as_json: bool,
    as_csv: bool,
) -> int | None:
    """Report what the VMs store and move: of a base directory with sums by tenant, or of one VM.

    Logical is the size of the disks; Stored is what their revisions take on disk, shared data
    counted once; Read and Written were moved by backups within the span. GB-hours are stored bytes
    summed over the span (1 GB = 10^9 bytes), revisions that are gone since included. Tenants are
    those of the configuration of all jobs (-c). Exclusive, with --exclusive, is what would be freed
    if one revision were removed; of one VM, it is listed by revision.

    Dates are in the local zone, and mean the beginning of the day (week, month): `--since
    last-month --until this-month` is what a month's bill needs. Exits 1 when a VM cannot be
    read; the others are reported.
    """
    if as_json and as_csv:
        raise UsageError("--json and --csv exclude each other")
    span = _span(since, until, datetime.now(UTC))
    single, directories = _directories(session)
    tenants = _tenants(session)
    found: list[Usage] = []
    failed = False
    for path in directories:
        try:
            found.append(_one(path, span, tenants.get(path.name, ""), exclusive))
        except (BackyfsError, OSError) as exc:
            if single:
                raise
            known = failure.explain(exc)
            output.warn(f"{path.name}: {known.message if known else exc}", as_json=as_json)
            failed = True
    if single and exclusive and not as_csv:
        _show_revisions(session.repository(), as_json)
    _show(found, span, as_json=as_json, as_csv=as_csv)
    return 1 if failed else None


def _one(path: Path, span: tuple[datetime, datetime], tenant: str, exclusive: bool) -> Usage:
    from backyfs.engine.usage import usage_of
    from backyfs.store.repository import Repository

    return usage_of(Repository.open(path), *span, tenant=tenant, exclusive=exclusive)


def _directories(session: Session) -> tuple[bool, list[Path]]:
    """One VM's directory, or those of all VMs; of a configuration, where -b names none."""
    from backyfs.store.repository import is_repository

    if session.directory.is_dir() and not is_repository(session.directory):
        found = session.vms()
        base = session.site().settings.base_dir if not found and session.config.exists() else None
        if base is not None and base.is_dir():
            found = session.at(base).vms()
        if found:
            return False, found
    return True, [session.repository().path]


def _tenants(session: Session) -> dict[str, str]:
    """By VM; nobody has one without a configuration of all jobs."""
    if not session.has_site():
        return {}
    return {name: job.tenant for name, job in session.site().jobs.items()}


def _span(since: str | None, until: str | None, now: datetime) -> tuple[datetime, datetime]:
    begin = _date("--since", since or "this-month", now)
    end = _date("--until", until, now) if until else now
    if begin > now:
        raise UsageError(f"the span begins in the future ({_iso(begin)})")
    if end <= begin:
        raise UsageError(f"the span ends ({_iso(end)}) before it begins ({_iso(begin)})")
    return begin, min(end, now)


def _date(option: str, text: str, now: datetime) -> datetime:
    from backyfs.reader.times import period

    try:
        named = period(text, now=now)
        return named.start if named else datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError) as exc:
        raise UsageError(
            f"{option}: {text!r} is no date",
            hint="write it as 2026-11-01, 2026-11-01T12:00 or last-month",
        ) from exc


def _iso(time: datetime) -> str:
    from backyfs.store.record import timestamp

    return timestamp(time)


def _show(
    found: Sequence[Usage], span: tuple[datetime, datetime], *, as_json: bool, as_csv: bool
) -> None:
    from backyfs.engine.usage import by_tenant

    sums = by_tenant(found) if len(found) > 1 else []
    if as_json or as_csv:
        values = [_value("vm", usage, span) for usage in found]
        values += [_value("tenant", usage, span) for usage in sums]
        _print(values, as_csv=as_csv)
        return
    output.line(f"{output.local(span[0])} to {output.local(span[1])} ({output.zone(span[0])})")
    header = ("VM", "Tenant", "Logical", "Stored", "Exclusive", "Read", "Written", "GB-hours")
    rows = [_row(usage) for usage in [*found, *sums]]
    output.line(output.table(header, rows, right=range(2, 8)))
    if any(usage.estimated for usage in found):
        output.line("* estimated from the revisions there are: not metered in all of the span")


def _row(usage: Usage) -> list[str]:
    return [
        usage.vm or "(all)",
        usage.tenant or "-",
        output.size(usage.logical),
        output.size(usage.stored),
        "-" if usage.exclusive is None else output.size(usage.exclusive),
        output.size(usage.read),
        output.size(usage.written),
        f"{usage.gb_hours:.2f}" + ("*" if usage.estimated else ""),
    ]


def _value(kind: str, usage: Usage, span: tuple[datetime, datetime]) -> dict[str, Any]:
    value = {
        "kind": kind,
        "vm": usage.vm or None,
        "tenant": usage.tenant or None,
        "since": _iso(span[0]),
        "until": _iso(span[1]),
        "logical": usage.logical,
        "stored": usage.stored,
        "exclusive": usage.exclusive,
        "read": usage.read,
        "written": usage.written,
        "gb_hours": round(usage.gb_hours, 6),
        "backups": usage.backups,
        "estimated": usage.estimated,
    }
    assert tuple(value) == _KEYS
    return value


def _print(values: Sequence[dict[str, Any]], *, as_csv: bool) -> None:
    if not as_csv:
        for value in values:
            output.json_line(value)
        return
    writer = csv.DictWriter(sys.stdout, _KEYS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(values)


def _show_revisions(repository: Repository, as_json: bool) -> None:
    own = repository.exclusive()
    rows = list(_revisions(repository, own))
    if as_json:
        for row in rows:
            output.json_line(row)
    elif rows:
        header = ("ID", "Size", "Stored", "Exclusive")
        cells = [
            [row["id"], *(output.size(row[key]) for key in ("size", "stored", "exclusive"))]
            for row in rows
        ]
        output.line(output.table(header, cells, right=(1, 2, 3)) + "\n")


def _revisions(repository: Repository, own: Any) -> Iterator[dict[str, Any]]:
    for record in repository.revisions():
        yield {
            "kind": "revision",
            "vm": repository.name,
            "id": record.id,
            "time": _iso(record.time),
            "size": record.size,
            "stored": record.stats.stored,
            "exclusive": own.get(record.id, 0),
        }
