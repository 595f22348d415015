"""backyfs status: the revisions of a VM, or the VMs of a base directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from backyfs.cli import describe, failure, options, output
from backyfs.cli.session import Session
from backyfs.errors import BackyfsError, UsageError
from backyfs.model import Consistency, Trust
from backyfs.store.format import Damage
from backyfs.store.record import Record, State
from backyfs.store.repository import Repository, is_repository


@click.command()
@options.as_json
@click.option("--yaml", "as_yaml", is_flag=True, help="Print the revisions of a VM as Backy does.")
@click.pass_obj
def command(session: Session, as_json: bool, as_yaml: bool) -> int | None:
    """List the revisions of the VM, oldest first; of a base directory, its VMs.

    Dates are in the local zone, which the header names. Stored is what the backup added to the
    store. Trust is a judgement (trusted, verified, distrusted); Health is what is known: ok,
    damaged (bytes or files of it fail their checksum) or unreadable (its record cannot be read).
    Known damage comes from verify, scrub, backups and readers: `backyfs verify` looks for more.
    Below are the reports of revisions that were found to differ from their source. Exits 1 when a
    VM of a base directory cannot be read; the others are listed.
    """
    if as_yaml and as_json:
        raise UsageError("--json and --yaml exclude each other")
    if as_yaml:
        _show_yaml(session.repository())
        return None
    if session.directory.is_dir() and not is_repository(session.directory):
        vms = session.vms()
        if vms:
            return _show_base(session.directory, vms, as_json)
    _show_vm(session.repository(), as_json)
    return None


def _show_vm(repository: Repository, as_json: bool) -> None:
    damage = repository.damage()
    records, unreadable = repository.listing()
    revisions = [(record, repository.state(record)) for record in records]
    if as_json:
        output.json_line(_value(repository, revisions, damage, unreadable))
        return
    now = datetime.now(UTC)
    header = (f"Date ({output.zone(now)})", "ID", "Size", "Stored", "Duration", "Tags", "Trust")
    rows = [_row(record, state, damage) for record, state in revisions]
    rows += [["-", i, "-", "-", "-", "-", "-", "-", "unreadable"] for i in unreadable]
    if rows:
        output.line(output.table((*header, "Consistency", "Health"), rows, right=(2, 3, 4)))
    output.line(_summary(revisions, bool(unreadable)))
    for found in describe.reports(repository.reports):
        output.line(_told(found))
    for error in unreadable.values():
        output.warn(error.message)


def _show_yaml(repository: Repository) -> None:
    """The list that callbacks written for Backy read from their standard input."""
    import yaml

    values = []
    for record in repository.revisions():
        state = repository.state(record)
        values.append(
            {
                "backend_type": repository.store,
                "parent": record.parent,
                "stats": {"bytes_written": record.stats.stored, "duration": record.stats.seconds},
                "tags": list(state.tags),
                "timestamp": record.time,
                "trust": str(state.trust),
                "uuid": record.id,
            }
        )
    output.line(yaml.safe_dump(values, allow_unicode=True).rstrip("\n"))


def _row(record: Record, state: State, damage: Mapping[str, object]) -> list[str]:
    return [
        output.local(record.time),
        record.id,
        output.size(record.size),
        output.size(record.stats.stored),
        output.duration(record.stats.seconds),
        ", ".join(state.tags) or "-",
        str(state.trust),
        str(record.consistency),
        "damaged" if record.id in damage else "ok",
    ]


def _summary(revisions: Sequence[tuple[Record, State]], others: bool) -> str:
    """`others`: there are revisions that cannot be read."""
    if not revisions and others:
        return "no revision can be read"
    if not revisions:
        return "no revisions yet; make one with: backyfs backup"
    stored = sum(record.stats.stored for record, _ in revisions)
    count = f"{len(revisions)} revision{'s' if len(revisions) > 1 else ''}"
    return f"{count}, whose backups stored {output.size(stored)}"


def _told(report: Mapping[str, Any]) -> str:
    count = f"{report['wrong_frames']} of {report['sampled_frames']} sampled frames differ"
    what = count if report["found"] else "it cannot be read"
    return f"report about {report['revision']}: {what}: {report['path']}"


def _value(
    repository: Repository,
    revisions: Sequence[tuple[Record, State]],
    damage: Mapping[str, Sequence[Damage]],
    unreadable: Mapping[str, BackyfsError],
) -> dict[str, Any]:
    return {
        "vm": repository.name,
        "path": str(repository.path),
        "uuid": str(repository.uuid),
        "store": repository.store,
        "revisions": [
            {
                **describe.revision(record, state),
                "health": "damaged" if record.id in damage else "ok",
                "damage": describe.damage(damage.get(record.id, ())),
            }
            for record, state in revisions
        ],
        "unreadable": [{"id": i, "reason": error.message} for i, error in unreadable.items()],
        "reports": describe.reports(repository.reports),
    }


def _show_base(base: Path, vms: Sequence[Path], as_json: bool) -> int | None:
    summaries = [_summarised(path) for path in vms]
    code = 1 if any("error" in summary for summary in summaries) else None
    if as_json:
        output.json_line({"base": str(base.resolve()), "vms": summaries})
        return code
    latest = f"Latest ({output.zone(datetime.now(UTC))})"
    header = ("VM", "Store", "Revisions", latest, "ID", "Size", "Stored", "Health")
    output.line(output.table(header, [_base_row(s) for s in summaries], right=(2, 5, 6)))
    output.line(f"{len(vms)} VM{'s' if len(vms) > 1 else ''}")
    return code


def _summarised(path: Path) -> dict[str, Any]:
    """One VM in the overview; a repository that cannot be opened has an `error` only."""
    try:
        repository = Repository.open(path)
        damage = repository.damage()
        records, unreadable = repository.listing()
        pairs = [(record, repository.state(record)) for record in records]
    except (BackyfsError, OSError) as exc:
        found = failure.explain(exc)
        message = found.message if found else str(exc)
        return {"vm": path.name, "path": str(path), "error": message}
    newest, state = pairs[-1] if pairs else (None, None)
    return {
        "vm": repository.name,
        "path": str(repository.path),
        "store": repository.store,
        "revisions": len(pairs),
        "latest": describe.revision(newest, state) if newest and state else None,
        "stored": sum(record.stats.stored for record, _ in pairs),
        "damaged": sorted(damage.keys() - unreadable.keys()),
        "unreadable": sorted(unreadable),
        "distrusted": [r.id for r, s in pairs if s.trust is Trust.DISTRUSTED],
        "torn": [r.id for r, _ in pairs if r.consistency is Consistency.TORN],
        "reports": repository.reports.revisions(),
    }


def _base_row(summary: Mapping[str, Any]) -> list[str]:
    if "error" in summary:
        return [summary["vm"], "-", "-", "-", "-", "-", "-", summary["error"]]
    latest = summary["latest"]
    time, revision, size = "-", "-", "-"
    if latest:
        time = output.local(datetime.fromisoformat(latest["time"]))
        revision, size = latest["id"], output.size(latest["size"])
    problems = [
        f"{len(summary[key])} {key}"
        for key in ("damaged", "unreadable", "distrusted", "torn", "reports")
        if summary[key]
    ]
    return [
        summary["vm"],
        summary["store"],
        str(summary["revisions"]),
        time,
        revision,
        size,
        output.size(summary["stored"]),
        ", ".join(problems) or "ok",
    ]
