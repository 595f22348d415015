"""backyfs distrust: mark revisions as not to be relied on."""

from __future__ import annotations

import click

from backyfs.cli import options, output, selection
from backyfs.cli.session import Session


@click.command()
@options.revision()
@click.option("--why", metavar="TEXT", default="by hand", help="The reason, kept and shown.")
@options.dry_run
@options.as_json
@click.pass_obj
def command(session: Session, spec: str, why: str, dry_run: bool, as_json: bool) -> None:
    """Mark the revisions SPEC names as distrusted: a judgement, nothing is removed.

    The next backup does not rest on a distrusted revision: it reads the whole source. `verify`
    of a distrusted revision that finds all its bytes as recorded makes it verified again.
    """
    from backyfs.engine.trust import distrust

    repository = session.repository()
    records = selection.pick(repository, spec, as_json=as_json)
    if not dry_run:
        with session.logging(repository):
            distrust(repository, records, why)
    for record in records:
        state = repository.state(record)
        if as_json:
            output.json_line({"id": record.id, "trust": str(state.trust), "why": state.why})
        else:
            output.line(f"{record.id}: {'would be ' if dry_run else ''}distrusted")
