"""backyfs jobs: all jobs, with their last and next backup."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from backyfs.cli import options, output
from backyfs.cli.completing import complete_job
from backyfs.cli.session import Session


@click.command()
@options.config
@click.argument("pattern", metavar="[FILTER]", default="", shell_complete=complete_job)
@options.as_json
@click.pass_obj
def command(session: Session, pattern: str, as_json: bool) -> None:
    """List the jobs of the configuration (-c) as the scheduler's console does.

    FILTER is a part of the name, or a pattern with * and ?. Works without the scheduler: the
    state of a job is then "not scheduled". SLA: TOO OLD means that the newest good revision is
    older than 1.5 times the shortest interval of the schedule, or that there is none by then.
    """
    from backyfs import log
    from backyfs.engine.scheduling import table
    from backyfs.engine.scheduling.overview import rows

    site = session.site()
    log.configure(verbose=session.verbose, quiet=session.quiet, as_json=as_json)
    found = [row for row in rows(site) if not pattern or table.selected(row["job"], pattern)]
    if as_json:
        for row in found:
            output.json_line(row)
        return
    output.line(table.jobs_table(found, output.zone(datetime.now(UTC))))
    output.line(table.counted(len(site.jobs), len(found)))
