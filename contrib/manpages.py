"""Write the manual pages: backyfs.1, one backyfs-COMMAND.1 per command, and backy.conf.5.

    python contrib/manpages.py DIRECTORY

The texts are those of `--help` and of the tables the configuration is read by, so that there is
one source for both; examples and exit codes come from backyfs/cli/manual.py.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from backyfs import __version__
from backyfs.cli import manual
from backyfs.cli.commands import COMMANDS
from backyfs.cli.main import program
from backyfs.config import BUILT_IN, format_interval, job, site
from backyfs.config.quiesce import KEYS as QUIESCE


def escaped(text: str) -> str:
    """Text as roff input: nothing in it is taken for a request."""
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("…", "...")
    text = "".join(char if ord(char) < 128 else rf"\[u{ord(char):04X}]" for char in text)
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def paragraphs(text: str) -> Iterator[str]:
    """A help text; a paragraph that click is told to leave alone (a backspace) keeps its lines."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text).split("\f")[0]):
        yield ".PP"
        if paragraph.startswith("\b"):
            yield f".nf\n{escaped(paragraph[1:].strip(chr(10)))}\n.fi"
        else:
            yield escaped(" ".join(paragraph.split()))


def heading(name: str, section: int) -> str:
    """The request every page begins with."""
    return f'.TH {escaped(name.upper())} {section} "" "backyfs {__version__}" "Backyfs Manual"'


def options(ctx: click.Context) -> Iterator[str]:
    """Each option with its text."""
    for param in ctx.command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is not None:
            yield from (".TP", f".B {escaped(record[0])}", escaped(record[1]))


def subcommands(ctx: click.Context) -> Iterator[str]:
    """Those of a group, each with its options."""
    assert isinstance(ctx.command, click.Group)
    for name in ctx.command.list_commands(ctx):
        command = ctx.command.get_command(ctx, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=ctx)
        usage = " ".join(command.collect_usage_pieces(inner))
        yield f".SS {escaped(name)}"
        yield f".B {escaped(inner.command_path)}\n{escaped(usage)}"
        yield from paragraphs(command.help or "")
        yield from options(inner)


def examples(command: str) -> Iterator[str]:
    """Commands one may type, with what they are for."""
    for text, line in manual.EXAMPLES[command]:
        if text:
            yield f".PP\n{escaped(text)}"
        yield f".PP\n.RS 4\n.nf\n{escaped(line)}\n.fi\n.RE"


def exit_status(command: str) -> Iterator[str]:
    """What the command's exit code means."""
    for code, text in manual.exit_codes(command).items():
        yield from (".TP", f".B {code}", escaped(text))


def page(ctx: click.Context, commands: dict[str, str]) -> str:
    """The page of one command; `commands` (name to one line) are listed in the overview."""
    name = ctx.command_path.replace(" ", "-")
    key = "" if commands else str(ctx.info_name)
    lines = [heading(name, 1)]
    summary = COMMANDS.get(key) or ctx.command.get_short_help_str(limit=300)
    lines += [".SH NAME", f"{escaped(name)} \\- {escaped(summary.rstrip('.'))}"]
    usage = " ".join(ctx.command.collect_usage_pieces(ctx))
    lines += [".SH SYNOPSIS", f".B {escaped(ctx.command_path)}", escaped(usage)]
    lines += [".SH DESCRIPTION", *paragraphs(ctx.command.help or summary)]
    lines += [".SH OPTIONS", *options(ctx)]
    if commands:
        lines += [".SH COMMANDS"]
        for command, text in commands.items():
            lines += [".TP", f".BR backyfs\\-{escaped(command)} (1)", escaped(text)]
    elif isinstance(ctx.command, click.Group):
        lines += [".SH COMMANDS", *subcommands(ctx)]
    lines += [".SH EXAMPLES", *examples(key)]
    lines += [".SH EXIT STATUS", *exit_status(key)]
    if ctx.command.epilog:
        lines += [".SH NOTES", *paragraphs(ctx.command.epilog)]
    see = [f".BR backyfs\\-{escaped(name)} (1)," for name in commands] or [".BR backyfs (1),"]
    lines += [".SH SEE ALSO", *see, ".BR backy.conf (5)"]
    return "\n".join(lines) + "\n"


def configuration() -> str:
    """The page of the configuration file, from the tables it is read by."""
    lines = [heading("backy.conf", 5)]
    lines += [".SH NAME", r"backy.conf \- configuration of all backup jobs of backyfs"]
    lines += [".SH SYNOPSIS", ".B /etc/backy.conf"]
    lines += [".SH DESCRIPTION", *paragraphs(_CONFIGURATION)]
    for title, keys in (
        ("global", site.GLOBAL),
        ("maintenance", site.MAINTENANCE),
        ("jobs", {**job.OPTIONS, **site.JOB_EXTRA}),
        ("quiesce", QUIESCE),
    ):
        lines += [f".SH SECTION {title.upper()}", *paragraphs(_SECTIONS[title])]
        for name, key in keys.items():
            text = f"{key.meaning} (default: {key.default})"
            lines += [".TP", f".B {escaped(name)}", escaped(text)]
    lines += [".SH SECTION SCHEDULES", *paragraphs(_SECTIONS["schedules"])]
    for name, schedule in BUILT_IN.items():
        rules = (
            f"{tag}: every {format_interval(r.interval_s)}, keep {r.keep}"
            for tag, r in schedule.items()
        )
        lines += [".TP", f".B {escaped(name)}", escaped("; ".join(rules))]
    lines += [".SH EXAMPLES", f".nf\n{escaped(_EXAMPLE)}\n.fi"]
    lines += [".SH EXIT STATUS", escaped("backyfs check-config exits 2 if anything is wrong.")]
    lines += [".SH FILES", ".B /etc/backy.conf"]
    lines += [".SH SEE ALSO", r".BR backyfs\-check\-config (1),", r".BR backyfs\-scheduler (1)"]
    return "\n".join(lines) + "\n"


_CONFIGURATION = """
YAML, with the sections global, maintenance, schedules and jobs, all of which may be missing. A
key that is not known is an error, and so is what YAML 1.1 would silently convert (no, 1:30, 022):
put it in quotes. `backyfs check-config` tells every problem with its place.

The key include names further files with schedules and jobs: a pattern, or a list of them, relative
to the file. The sections api and peers of Backy are accepted and not used.

An interval is a number of seconds, or numbers with units from large to small: 30m, 1d12h, 2w.
"""

_SECTIONS = {
    "global": "Where things are, and how much is done at once.",
    "maintenance": "What is done to the backups besides making them; never: not at all.",
    "jobs": """
One entry per VM, by its name, which is also the name of its directory in base-dir. The key source
(required) holds type and the keys of that type of source, such as filename; schedule is the name
of a schedule (default: daily), or its tags written out.
""",
    "quiesce": """
A section of a job: how its guest is made to hold still while the snapshots are taken, by its agent,
by commands, or by both. Without it nothing is frozen.
""",
    "schedules": """
By name, the tags of a schedule with two keys each: interval, the time between two revisions with
the tag, and keep, how many stay at least. Built in are:
""",
}

_EXAMPLE = """\
global:
  base-dir: /srv/backy
  worker-limit: 3
schedules:
  frequent:
    quarterly: {interval: 15m, keep: 96}
    daily: {interval: 1d, keep: 30}
jobs:
  web01:
    source: {type: file, filename: /dev/vg0/web01}
    schedule: frequent
    tenant: acme"""


def pages() -> Iterator[tuple[str, str]]:
    """File name and content of every page."""
    top = click.Context(program, info_name="backyfs", **program.context_settings)
    for name in COMMANDS:
        command = program.get_command(top, name)
        assert command is not None
        yield f"backyfs-{name}.1", page(click.Context(command, info_name=name, parent=top), {})
    yield "backyfs.1", page(top, COMMANDS)
    yield "backy.conf.5", configuration()


def tidied(text: str) -> str:
    """Without requests that do nothing: a paragraph begins at each heading anyway."""
    return re.sub(r"^(\.S[HS] .*\n)\.PP\n", r"\1", text, flags=re.MULTILINE)


def main() -> None:
    """Write the pages into the directory named on the command line."""
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    written = [(directory / name).write_text(tidied(content)) for name, content in pages()]
    print(f"{len(written)} manual pages in {directory}/")


if __name__ == "__main__":
    main()
