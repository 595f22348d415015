"""backyfs tags: set, add or remove tags of revisions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import click

from backyfs.cli import options, output, selection
from backyfs.cli.completing import complete_tags
from backyfs.cli.session import Session
from backyfs.engine.tags import add_tags, checked_tags, remove_tags, set_tags
from backyfs.store.record import State
from backyfs.store.repository import Repository


@click.group(no_args_is_help=True)
def command() -> None:
    """Set, add or remove tags: why a revision is kept.

    Tags of the schedule expire by its rules; a tag that begins with `manual:` never does, so

    \b
        backyfs tags add -r latest 'manual:before the upgrade'

    protects a revision until the tag is removed again.
    """  # noqa: D301 - click takes a backspace for: leave these lines alone


@dataclass(frozen=True)
class _Verb:
    """One way to change tags: the function that does it, and what it would come to."""

    help: str
    change: Callable[..., list[State]]
    preview: Callable[[set[str], set[str]], set[str]]
    checked: bool = True


_VERBS = {
    "set": _Verb("Give the revisions exactly these tags.", set_tags, lambda old, new: new),
    "add": _Verb("Add tags to the revisions.", add_tags, lambda old, new: old | new),
    "remove": _Verb(
        "Take tags from the revisions.", remove_tags, lambda old, gone: old - gone, checked=False
    ),
}


def _command(verb: _Verb) -> click.Command:
    @click.command(
        help=f"{verb.help}\n\nSeveral tags as several words, or as one list with commas."
    )
    @click.argument("tags", nargs=-1, required=True, shell_complete=complete_tags)
    @options.revision()
    @click.option(
        "--expect",
        metavar="TAGS",
        help="Change nothing unless the tags are exactly these (with commas) now.",
    )
    @click.option("-f", "--force", is_flag=True, help="Accept tags that are not in the schedule.")
    @options.dry_run
    @options.as_json
    @click.pass_obj
    def changing(
        session: Session,
        tags: tuple[str, ...],
        spec: str,
        expect: str | None,
        force: bool,
        dry_run: bool,
        as_json: bool,
    ) -> None:
        repository = session.repository()
        names = _split(tags)
        if verb.checked:
            names = _allowed(repository, names, force)
        records = selection.pick(repository, spec, as_json=as_json)
        if dry_run:
            old = [set(repository.known_state(record).tags) for record in records]
            found = [sorted(verb.preview(tags_now, set(names))) for tags_now in old]
        else:
            wanted = None if expect is None else _split([expect])
            with session.logging(repository):
                states = verb.change(repository, records, names, expect=wanted)
            found = [list(state.tags) for state in states]
        for record, left in zip(records, found, strict=True):
            if as_json:
                output.json_line({"id": record.id, "tags": left, "dry_run": dry_run})
            else:
                output.line(f"{record.id}: {', '.join(left) or 'no tags'}")

    return changing


def _split(tags: Iterable[str]) -> list[str]:
    return [part.strip() for tag in tags for part in tag.split(",") if part.strip()]


def _allowed(repository: Repository, names: Sequence[str], force: bool) -> list[str]:
    """The tags, checked against the schedule: others would expire at once."""
    from backyfs.config import read_job

    config = repository.path / "config"
    schedule = read_job(config).schedule if config.exists() and not force else None
    return list(checked_tags(names, schedule, force=force))


for _name, _verb in _VERBS.items():
    command.add_command(_command(_verb), _name)
