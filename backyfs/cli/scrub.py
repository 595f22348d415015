"""backyfs scrub: check the stored bytes little by little, within a time budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from backyfs.cli import options, output
from backyfs.cli.session import Session
from backyfs.errors import Corrupt

if TYPE_CHECKING:
    from backyfs.engine.scrub import Scrubbed


@click.command()
@click.option(
    "--budget",
    "budget_s",
    metavar="S",
    type=options.SECONDS,
    help="Stop after S seconds; the next run goes on there (default: to the end).",
)
@options.progress
@options.as_json
@click.pass_obj
def command(session: Session, budget_s: float | None, progress: bool | None, as_json: bool) -> None:
    """Read every stored byte once, oldest first, over as many runs as it takes.

    Meant for the scheduler: a few minutes each night. Damage is remembered as by `verify`. Exits
    12 while any revision is known to be damaged. A store that is full or read-only is read all the
    same; a warning says that nothing is recorded, so the next run begins where this one did.
    """
    from backyfs.cli.decoding import decoding
    from backyfs.cli.running import run
    from backyfs.cli.showing import showing
    from backyfs.engine.scrub import scrub

    repository = session.repository()
    with (
        session.logging(repository),
        decoding(repository),
        showing(session, progress, as_json=as_json) as shown,
    ):
        result = run(scrub, repository, budget_s, progress=shown)
    if as_json:
        output.json_line(
            {
                "message_type": "summary",
                "checked_bytes": result.checked_bytes,
                "bad_frames": result.bad_frames,
                "complete": result.complete,
                "damaged": sorted(result.damage),
            }
        )
    elif not session.quiet:
        output.line(
            f"checked {output.size(result.checked_bytes)}, {result.bad_frames} bad frames;"
            f" {_rest(result)}"
        )
    if result.unrecorded:
        output.warn(f"what the scrub did is not recorded: {result.unrecorded}", as_json=as_json)
    if result.damage:
        teller = "verify" if result.unrecorded else "status"
        raise Corrupt(f"{len(result.damage)} revisions (see: backyfs {teller})", vm=repository.name)


def _rest(result: Scrubbed) -> str:
    if result.complete:
        return "all is read"
    return "the next run goes on here" if not result.unrecorded else "not all is read"
