"""backyfs forget: remove revisions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import click

from backyfs.cli import consent, options, output, selection
from backyfs.cli.session import Session
from backyfs.errors import BackyfsError, UsageError
from backyfs.model import Trust
from backyfs.store.record import Record, State
from backyfs.store.removal import Removal
from backyfs.store.repository import Repository


@click.command()
@options.revision()
@click.option(
    "-f",
    "--force",
    is_flag=True,
    help="Also the last one that is trusted, and those somebody is reading.",
)
@options.dry_run
@options.yes
@options.wait
@options.as_json
@click.pass_obj
def command(
    session: Session,
    spec: str,
    force: bool,
    dry_run: bool,
    yes: bool,
    wait_s: float,
    as_json: bool,
) -> None:
    """Remove the revisions SPEC names, whatever their tags; `gc` frees their space.

    Asks first, with the exact list; without a terminal, --yes is needed. A revision whose record
    cannot be read is given up by its full id. Revisions that somebody reads stay, unless --force:
    the reader can go on.
    """
    repository = session.repository()
    doomed = _doomed(repository, spec, force, as_json)
    if dry_run:
        for revision, text in doomed.items():
            _print("would_forget", revision, text, as_json)
        return
    count = f"{len(doomed)} revision{'s' if len(doomed) > 1 else ''}"
    question = f"Remove {count} of {repository.name} for good?"
    consent.ask(question, list(doomed.values()), yes=yes)
    with session.logging(repository):
        still = _still(repository, doomed, force)
        removal = repository.remove(still, force=force, wait_s=wait_s)
    for revision in removal.removed:
        _print("forgotten", revision, doomed[revision], as_json)
    for revision in doomed.keys() - {*removal.removed, *removal.in_use}:
        output.warn(f"{revision} was removed by somebody else meanwhile", as_json=as_json)
    _complain(removal)


def _doomed(repository: Repository, spec: str, force: bool, as_json: bool) -> dict[str, str]:
    """What is to go: id and a line about it."""
    unreadable = repository.unreadable()
    if spec in unreadable:
        return {spec: f"{spec}  ({unreadable[spec].message})"}
    records = selection.pick(repository, spec, as_json=as_json)
    states = {record.id: repository.state(record) for record in records}
    if not force:
        _keep_one_good(repository, states)
    return {record.id: _line(record, states[record.id]) for record in records}


def _still(repository: Repository, doomed: Collection[str], force: bool) -> Iterator[str]:
    """What is there when the first is asked for: others may have removed some since we asked."""
    entries = repository.ledger.entries()
    there = [revision for revision in doomed if revision in entries]
    if not force:
        records = (entries[revision] for revision in there)
        _keep_one_good(
            repository, {r.id: repository.state(r) for r in records if isinstance(r, Record)}
        )
    yield from there


def _line(record: Record, state: State) -> str:
    tags = ", ".join(state.tags) or "no tags"
    return f"{record.id}  {output.local(record.time)}  {tags}  {state.trust}"


def _keep_one_good(repository: Repository, doomed: dict[str, State]) -> None:
    """UsageError when no revision that is not distrusted would be left of some."""
    if all(state.trust is Trust.DISTRUSTED for state in doomed.values()):
        return
    stay: Sequence[Record] = [r for r in repository.revisions() if r.id not in doomed]
    if all(repository.state(record).trust is Trust.DISTRUSTED for record in stay):
        raise UsageError(
            f"{repository.name} would have no trusted revision any more",
            hint="if that is what you want, give --force",
        )


def _print(kind: str, revision: str, text: str, as_json: bool) -> None:
    if as_json:
        output.json_line({"message_type": kind, "id": revision})
    else:
        output.line(f"{kind.replace('_', ' ')}: {text}")


def _complain(removal: Removal) -> None:
    if removal.in_use:
        raise BackyfsError(
            f"somebody reads {', '.join(removal.in_use)}: not removed",
            hint="close the reader (a mount?) and try again, or give --force",
        )
