"""backyfs copy: copy revisions into another repository, converting its format."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from backyfs.cli import options, output
from backyfs.cli.session import Session, make_way
from backyfs.errors import BackyfsError, ConfigError, Corrupt, UsageError
from backyfs.model import vm_name
from backyfs.store.repository import Repository, is_repository

if TYPE_CHECKING:
    from backyfs.store.record import Record


@click.command()
@click.argument("source", metavar="SRC", type=options.PATH)
@click.argument("target", metavar="DST", type=options.PATH)
@click.option(
    "--store",
    type=click.Choice(["auto", "packs", "cow"]),
    default="auto",
    show_default=True,
    help="Format of DST if it is made now.",
)
@options.wait
@options.progress
@options.dry_run
@options.as_json
@click.pass_obj
def command(
    session: Session,
    source: Path,
    target: Path,
    store: str,
    wait_s: float,
    progress: bool | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Copy the revisions of the repository SRC into DST, oldest first.

    DST may be of the other format, and is made if it does not exist. Copied are the revisions
    newer than the newest common one; ids, times, tags and trust stay; each copy has the digest of
    its original. What was copied stays copied when a later revision fails. What is removed from
    SRC meanwhile is left out, with a warning. Revisions whose record cannot be read are left out,
    too; unless DST has them already, the exit code is 12.
    """
    from backyfs.cli.running import run
    from backyfs.cli.showing import showing
    from backyfs.engine.copying import Copied, copy, missing

    origin = session.at(source).repository()
    exists = is_repository(target)
    if dry_run:
        opened = Repository.open(target) if exists else None
        there, origins = (opened.revisions(), opened.origins()) if opened else ([], set[str]())
        records, unreadable = origin.listing()
        for record in missing(records, there, origins):
            _print("would_copy", record.id, as_json)
        _tell_left_out(origin, unreadable, there, as_json)
        return
    copied_to = Repository.open(target) if exists else _made(_config(origin), target, store)
    result = Copied()
    try:
        with session.logging(copied_to), showing(session, progress, as_json=as_json) as shown:
            run(copy, origin, copied_to, wait_s=wait_s, progress=shown, result=result)
    finally:
        for revision in result.copied:
            _print("copied", revision, as_json)
        for revision in result.removed:
            output.warn(f"left out: {revision} was removed meanwhile", as_json=as_json)
    if not as_json and not session.quiet:
        present = len(result.present)
        output.line(f"{len(result.copied)} copied, {present} present, to {copied_to.path}")
    _tell_left_out(origin, result.unreadable, copied_to.revisions(), as_json)


def _tell_left_out(
    origin: Repository,
    unreadable: Mapping[str, BackyfsError],
    there: Sequence[Record],
    as_json: bool,
) -> None:
    """Corrupt where revisions could not be read that are not `there`: the copy is not all of it."""
    left = dict(unreadable)
    for record in there:
        left.pop(record.id, None)
    for error in left.values():
        output.warn(f"left out: {error.message}", as_json=as_json)
    if left:
        total = len(origin.revisions()) + len(left)
        raise Corrupt(f"{len(left)} of {total} revisions are not in the copy", vm=origin.name)


def _config(origin: Repository) -> bytes | None:
    """The file `config`, if there is one. ConfigError for commands that may be a stranger's: the
    copy would be ours, and they would be run.
    """
    from backyfs.config.job import SIZE_MAX, parse_job
    from backyfs.source.quiescing.leftover import refuse_foreign

    path = origin.path / "config"
    if not path.is_file():
        return None
    with open(path, "rb") as stream:
        data, owner = stream.read(SIZE_MAX + 1), os.fstat(stream.fileno())
    if len(data) > SIZE_MAX:
        raise ConfigError(f"{path} has more than {SIZE_MAX} bytes: that is no job")
    quiesce = None
    with contextlib.suppress(ConfigError, UnicodeDecodeError):  # nobody can run it
        quiesce = parse_job(data.decode(), str(path)).quiesce
    if quiesce is not None and quiesce.freeze_command:
        refuse_foreign(path, owner)
    return data


def _made(config: bytes | None, target: Path, store: str) -> Repository:
    """A new repository at `target` with the job of the original."""
    from backyfs.store.fs import publish, real_path

    directory = real_path(target)
    vm_name(directory.name)
    make_way(directory)
    try:
        made = Repository.create(target, store)
    except UsageError:
        if not is_repository(target):
            raise
        return Repository.open(target)  # another copy made it meanwhile
    if config is not None:
        publish(made.path / "config", config)
    return made


def _print(kind: str, revision: str, as_json: bool) -> None:
    if as_json:
        output.json_line({"message_type": kind, "revision": revision})
    else:
        output.line(f"{kind.replace('_', ' ')} {revision}")
