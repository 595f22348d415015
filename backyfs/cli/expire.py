"""backyfs expire: remove the revisions that the schedule no longer keeps."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from backyfs.cli import options, output
from backyfs.cli.session import Session
from backyfs.config import read_job
from backyfs.engine.expire import Expiry, expire


@click.command()
@options.dry_run
@options.wait
@options.as_json
@click.pass_obj
def command(session: Session, dry_run: bool, wait_s: float, as_json: bool) -> None:
    """Take tags away that have run out, and remove the revisions that have none left.

    A tag of the schedule runs out when the schedule's number of newer revisions have it too and
    the revision is older than that number of intervals; so missed backups never shorten history.
    Tags outside the schedule run out at once, `manual:` ones never. The newest revision and the
    newest good one always stay. `gc` frees the space; `purge` does both.
    """
    repository = session.repository()
    schedule = read_job(repository.path / "config").schedule
    with session.logging(repository):
        result = expire(repository, schedule, datetime.now(UTC), dry_run=dry_run, wait_s=wait_s)
    report(result, dry_run=dry_run, as_json=as_json, quiet=session.quiet)


def report(result: Expiry, *, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Print what became of each revision, or (dry run) would, and why."""
    removed = set(result.removed)
    for decision in result.decisions:
        if as_json:
            output.json_line(
                {
                    "message_type": "decision",
                    "id": decision.revision,
                    "removed": decision.revision in removed,
                    "in_use": decision.revision in result.in_use,
                    "tags": list(decision.tags),
                    "expired_tags": list(decision.expired),
                    "reasons": list(decision.reasons),
                    "dry_run": dry_run,
                }
            )
        elif decision.revision in removed:
            output.line(
                _line("would remove" if dry_run else "removed", decision.revision, decision.reasons)
            )
        elif decision.expired:
            tags = ", ".join(decision.expired)
            verb = f"would take {tags} from" if dry_run else f"took {tags} from"
            output.line(_line(verb, decision.revision, decision.reasons))
        elif dry_run:
            output.line(_line("keep", decision.revision, decision.reasons))
    for revision in result.in_use:
        output.warn(f"{revision} is due, but somebody reads it: it stays", as_json=as_json)
    if not as_json and not quiet and not dry_run:
        output.line(f"{len(removed)} of {len(result.decisions)} revisions removed")


def _line(what: str, revision: str, reasons: tuple[str, ...]) -> str:
    return f"{what} {revision}" + (f": {'; '.join(reasons)}" if reasons else "")
