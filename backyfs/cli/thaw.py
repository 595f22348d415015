"""backyfs thaw: thaw the guest of the VM."""

from __future__ import annotations

import click

from backyfs.cli import options, output
from backyfs.cli.session import Session


@click.command()
@click.option(
    "--forget",
    is_flag=True,
    help="Only forget that the guest may be frozen: the VM is gone, or was thawed by hand.",
)
@options.as_json
@click.pass_obj
def command(session: Session, forget: bool, as_json: bool) -> None:
    """Thaw the guest of the VM as its job says (`quiesce`), whoever froze it.

    Backups thaw by themselves, also when they are killed. Only if everything was killed at once
    (the host lost power) a guest may stay frozen. Then a file freeze.json is left in the VM's
    directory: the scheduler runs this command when it starts, the next backup thaws, too, and
    `check` is CRITICAL until it succeeds. Thawing a guest that is not frozen does no harm.
    """
    from backyfs.source.quiescing import leftover

    repository = session.repository()
    directory = repository.path
    with session.logging(repository):
        if forget:
            result = "forgotten" if leftover.forget(directory) else "nothing to forget"
        else:
            result = "thawed"
            if not leftover.thaw_leftover(directory):
                leftover.thaw_guest(directory)
    if as_json:
        output.json_line({"message_type": "thaw", "vm": repository.name, "result": result})
    elif not session.quiet:
        output.line(f"{repository.name}: {result}")
