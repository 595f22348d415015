"""backyfs gc: free the space of removed revisions."""

from __future__ import annotations

from dataclasses import asdict

import click

from backyfs.cli import options, output
from backyfs.cli.session import Session
from backyfs.store.format import GcReport


@click.command()
@options.dry_run
@options.wait
@options.as_json
@click.pass_obj
def command(session: Session, dry_run: bool, wait_s: float, as_json: bool) -> None:
    """Remove what no revision needs any more, and merge small or half-dead pack files.

    Nothing is removed while any record cannot be read or names a missing file. Readers can go on.
    """
    repository = session.repository()
    with session.logging(repository):
        result = repository.gc(dry_run=dry_run, wait_s=wait_s)
    report(result, dry_run=dry_run, as_json=as_json, quiet=session.quiet)


def report(
    result: GcReport, *, dry_run: bool, as_json: bool, quiet: bool, besides: int = 0
) -> None:
    """Print what was, or (dry run) would be, freed; `besides` what so many revisions keep yet."""
    if as_json:
        value = {key: item for key, item in asdict(result).items() if key != "more"}
        output.json_line({"message_type": "gc", **value, "dry_run": dry_run})
    elif not quiet:
        verb = "would free" if dry_run else "freed"
        output.line(
            f"{verb} {output.size(result.freed_bytes)}: {result.removed_files} files removed, "
            f"{result.merged_files} merged into {result.written_files}; "
            f"{result.files} files with {output.size(result.stored_bytes)} left"
            f"{', with the revisions to be removed' if besides else ''}"
        )
