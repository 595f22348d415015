"""backyfs find: where revisions lie on disk."""

from __future__ import annotations

import click

from backyfs.cli import options, output, selection
from backyfs.cli.session import Session
from backyfs.errors import UsageError
from backyfs.store.record import Record
from backyfs.store.repository import Repository


@click.command()
@click.argument("pattern", nargs=-1)
@options.revision("latest")
@options.as_json
@click.pass_obj
def command(session: Session, pattern: tuple[str, ...], spec: str, as_json: bool) -> None:
    """Print where the revisions that SPEC names lie, one path a line.

    In a cow store that is the raw image of each disk, which cp, mount or qemu can use (read-only:
    later revisions share its blocks); in a packs store, the record.
    """
    if pattern:
        raise UsageError(
            "find takes no PATTERN", hint=f"for a revision: backyfs find -r '{pattern[0]}'"
        )
    repository = session.repository()
    for record in selection.pick(repository, spec, as_json=as_json):
        for disk, path in _paths(repository, record):
            if as_json:
                output.json_line({"id": record.id, "disk": disk, "path": path})
            else:
                output.line(path)


def _paths(repository: Repository, record: Record) -> list[tuple[str | None, str]]:
    directory = repository.layout.revisions
    images = [
        (disk.name, str(directory / file))
        for disk in record.disks.values()
        for file in disk.files
        if file.endswith(".img")
    ]
    return [*images] or [(None, str(repository.layout.record(record.id)))]
