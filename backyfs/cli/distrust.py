"""backyfs distrust: mark revisions as not to be relied on."""

from __future__ import annotations

import click

from backyfs.cli import options, output, selection
from backyfs.cli.session import Session
from backyfs.store.record import State


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
    A revision whose state is damaged gets a new one, with the tags it was made with.
    """
    from backyfs.engine.trust import distrust, trust

    repository = session.repository()
    records = selection.pick(repository, spec, as_json=as_json)
    damaged = {record.id for record in records if repository.state_problem(record.id)}
    if not dry_run:
        with session.logging(repository):
            trust(repository, records) if lift else distrust(repository, records, why)
    elif lift:
        for record in records:
            repository.known_state(record)
    for record in records:
        state = repository.state(record)
        if as_json:
            output.json_line({"id": record.id, "trust": str(state.trust), "why": state.why})
        else:
            judged = "trusted" if lift else "distrusted"
            output.line(f"{record.id}: {'would be ' if dry_run else ''}{judged}")
        if record.id in damaged and not dry_run:
            _warn_of_tags(record.id, state, as_json)


def _warn_of_tags(revision: str, state: State, as_json: bool) -> None:
    tags = ", ".join(state.tags) or "none"
    text = f"its state was damaged; its tags are those of its backup again: {tags}"
    output.warn(f"{revision}: {text}", as_json=as_json)
