"""backyfs help: the help of a command, or a topic that belongs to none."""

from __future__ import annotations

import click

from backyfs.cli import hints, output
from backyfs.cli.commands import COMMANDS
from backyfs.cli.manual import exit_table

EXIT_CODES = f"""\
{exit_table()}

A revision that could not be made consistent (torn) is no failure: it is recorded and warned of.
Nothing that failed exits 0. `check` alone answers 0, 1, 2 or 3 as monitoring plug-ins do."""

SPEC = """\
Which revisions: SPEC

  latest, last          the newest revision
  0, 1, 2 …             by number: 0 is the newest, 1 the one before
  first                 the oldest
  all                   every one, oldest first
  20261121T220112Z-7f3a an id, or a beginning of it that no other one has
  tag:NAME              all with this tag
  trust:STATE           all that are trusted, verified or distrusted
  2026-11-14            the newest one not after that day (local time zone)
  2026-11-14T12:00      … not after that minute; also T12, with seconds, Z or +01:00
  yesterday, last-saturday, 3-days-ago, 2-hours-ago, last-week, before-last-saturday …
                        … not after the end of that day, week or moment
  NAME                  standing alone: the newest with this tag

  A..B                  from A to B, both included; either side may be missing
  2026-11-01..2026-11-14  from that day to that day
  A,B                   A, then B, no revision twice
  A&B                   those of A that are also in B (binds tighter than the comma)
  not(A)  reverse(A)    all others · in the other order
  first(A)  last(A)     the first, the last of A
  (A)                   parentheses

Blanks around words do not matter. Quotes make , & ( ) and .. part of a name: tag:"a..b".

  backyfs restore -r 'last(tag:daily & trust:verified)' disk.img
  backyfs forget -r '2026-01-01..2026-03-31 & not(tag:monthly)'"""

UNLOCK = """\
There is nothing to unlock: locks are flock(2) locks, which go with the process that holds them.
`backyfs status` of a busy repository works; a second writer exits 75 and names the first one."""

TOPICS = {"exit-codes": EXIT_CODES, "spec": SPEC, "unlock": UNLOCK}


def _complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    return [word for word in (*COMMANDS, *TOPICS) if word.startswith(incomplete)]


@click.command()
@click.argument("topic", required=False, shell_complete=_complete)
@click.pass_context
def command(ctx: click.Context, topic: str | None) -> None:
    """Explain a command, or one of the topics exit-codes, spec and unlock."""
    parent = ctx.find_root()
    if topic is None:
        output.line(parent.get_help())
    elif topic in TOPICS:
        output.line(TOPICS[topic])
    else:
        program = parent.command
        found = program.get_command(parent, topic) if isinstance(program, click.Group) else None
        if found is None:
            raise hints.unknown_command(topic, [*COMMANDS, *TOPICS])
        with click.Context(found, info_name=topic, parent=parent) as inner:
            output.line(found.get_help(inner))
