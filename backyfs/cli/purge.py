"""backyfs purge: expire revisions, then free their space."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from backyfs.cli import expire, gc, options
from backyfs.cli.session import Session
from backyfs.config import read_job
from backyfs.engine.purge import purge


@click.command()
@options.dry_run
@options.wait
@options.as_json
@click.pass_obj
def command(session: Session, dry_run: bool, wait_s: float, as_json: bool) -> None:
    """Do what `expire` does, then what `gc` does.

    With --dry-run: say of each revision what would become of it and why; the space counted then
    is that of what is unneeded already.
    """
    repository = session.repository()
    schedule = read_job(repository.path / "config").schedule
    with session.logging(repository):
        result = purge(repository, schedule, datetime.now(UTC), dry_run=dry_run, wait_s=wait_s)
    expire.report(result.expiry, dry_run=dry_run, as_json=as_json, quiet=session.quiet)
    besides = len(result.expiry.removed) if dry_run else 0
    gc.report(result.gc, dry_run=dry_run, as_json=as_json, quiet=session.quiet, besides=besides)
