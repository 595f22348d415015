"""backyfs verify: read revisions and check every byte of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from backyfs.cli import describe, options, output, selection
from backyfs.cli.session import Session
from backyfs.errors import Corrupt
from backyfs.store.format import Damage
from backyfs.store.repository import Repository

if TYPE_CHECKING:
    from backyfs.engine.verification import Verdict

_LISTED_MAX = 10


@click.command()
@options.revision("all")
@click.option("--quick", is_flag=True, help="Check files and their structure only; read no data.")
@options.progress
@options.as_json
@click.pass_obj
def command(session: Session, spec: str, quick: bool, progress: bool | None, as_json: bool) -> None:
    """Read the revisions SPEC names from the medium and check every byte against its hash.

    A sound revision becomes `verified`, unless it is distrusted because its source had other bytes:
    what is stored cannot tell. Damage is listed and remembered: `status` shows the
    damaged revisions, the next backup tries to heal them from the source. Nothing is removed.
    Exits 12 when anything is damaged. Frames that several revisions share are read once. Where the
    store is full or read-only, the results are shown all the same, and a warning says that they
    are not recorded.
    """
    from backyfs.cli.decoding import decoding
    from backyfs.cli.running import run
    from backyfs.cli.showing import showing
    from backyfs.engine.verification import verify

    repository = session.repository()
    unreadable = repository.unreadable() if spec == "all" else {}
    records = (
        []
        if unreadable and not repository.revisions()
        else selection.pick(repository, spec, as_json=as_json)
    )
    with (
        session.logging(repository),
        nullcontext() if quick else decoding(repository),
        showing(session, progress, as_json=as_json) as shown,
    ):
        verdicts = run(verify, repository, records, quick=quick, progress=shown)
    for verdict in verdicts:
        _print_verdict(verdict, quick, as_json, session.quiet)
        _warn_if_doubtful(repository, verdict, as_json)
    for revision, error in unreadable.items():
        _print(revision, "unreadable", [Damage("", None, error.message)], as_json)
    _warn_if_unrecorded(verdicts, as_json)
    _fail_if_damaged(repository, verdicts, unreadable)


def _warn_if_unrecorded(verdicts: Sequence[Verdict], as_json: bool) -> None:
    reasons = [verdict.unrecorded for verdict in verdicts if verdict.unrecorded]
    if reasons:
        count = f"{len(reasons)} of {len(verdicts)} results are"
        output.warn(f"{count} not recorded: {reasons[0]}", as_json=as_json)


def _fail_if_damaged(
    repository: Repository, verdicts: Sequence[Verdict], unreadable: Iterable[str]
) -> None:
    bad = [verdict.record.id for verdict in verdicts if verdict.damage] + list(unreadable)
    if bad:
        raise Corrupt(
            f"{len(bad)} of {len(verdicts) + len(list(unreadable))} revisions", vm=repository.name
        )


def _print_verdict(verdict: Verdict, quick: bool, as_json: bool, quiet: bool) -> None:
    if verdict.removed:
        state = "removed meanwhile"
    elif verdict.damage:
        state = "damaged"
    else:
        state = "structure ok" if quick else "ok"
    if as_json or verdict.damage or not quiet:
        _print(verdict.record.id, state, verdict.damage, as_json)


def _warn_if_doubtful(repository: Repository, verdict: Verdict, as_json: bool) -> None:
    if verdict.sound and (state := repository.state(verdict.record)).lasting:
        output.warn(f"{verdict.record.id} stays distrusted: {state.why}", as_json=as_json)


def _print(revision: str, state: str, damage: Sequence[Damage], as_json: bool) -> None:
    if as_json:
        output.json_line({"id": revision, "result": state, "damage": describe.damage(damage)})
        return
    output.line(f"{revision}: {state}")
    for item in damage[:_LISTED_MAX]:
        output.line(f"  {_place(item)}{item.reason}")
    if len(damage) > _LISTED_MAX:
        output.line(f"  and {len(damage) - _LISTED_MAX} more (all with --json)")


def _place(item: Damage) -> str:
    where = f", offset {item.extent.offset}, length {item.extent.length}" if item.extent else ""
    return f"disk {item.disk}{where}: " if item.disk else ""
