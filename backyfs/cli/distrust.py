"""backyfs distrust: mark revisions as not to be relied on."""

from __future__ import annotations

import click

from backyfs.cli import options, output, selection
from backyfs.cli.session import Session


@click.command()
@options.revision()
@click.option("--why", metavar="TEXT", default="by hand", help="The reason, kept and shown.")
@click.option("--lift", is_flag=True, help="Take it back: you know that they can be relied on.")
@options.dry_run
@options.as_json
@click.pass_obj
def command(
    session: Session, spec: str, why: str, lift: bool, dry_run: bool, as_json: bool
) -> None:
    """Mark the revisions SPEC names as distrusted: a judgement, nothing is removed.

    The next backup does not rest on a distrusted revision: it reads the whole source. `verify`
    of a distrusted revision that finds all its bytes as recorded makes it verified again, unless it
    is distrusted because its source had other bytes (or may have had): that ends only with --lift.
    """
    from backyfs.engine.trust import distrust, trust

    repository = session.repository()
    records = selection.pick(repository, spec, as_json=as_json)
    if not dry_run:
        with session.logging(repository):
            trust(repository, records) if lift else distrust(repository, records, why)
    for record in records:
        state = repository.state(record)
        if as_json:
            output.json_line({"id": record.id, "trust": str(state.trust), "why": state.why})
        else:
            judged = "trusted" if lift else "distrusted"
            output.line(f"{record.id}: {'would be ' if dry_run else ''}{judged}")
