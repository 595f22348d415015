"""Write the manual pages: backyfs.1 and one backyfs-COMMAND.1 per command.

    python contrib/manpages.py DIRECTORY

The texts are those of `--help`, so that there is one source for both.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from backyfs import __version__
from backyfs.cli.main import program


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


def page(ctx: click.Context, commands: dict[str, str]) -> str:
    """The page of one command; `commands` (name to one line) are listed in the overview."""
    name = ctx.command_path.replace(" ", "-")
    lines = [f'.TH {escaped(name.upper())} 1 "" "backyfs {__version__}" "User Commands"']
    summary = ctx.command.get_short_help_str(limit=300).rstrip(".")
    lines += [".SH NAME", f"{escaped(name)} \\- {escaped(summary)}"]
    usage = " ".join(ctx.command.collect_usage_pieces(ctx))
    lines += [".SH SYNOPSIS", f".B {escaped(ctx.command_path)}", escaped(usage)]
    lines += [".SH DESCRIPTION", *paragraphs(ctx.command.help or summary)]
    records = [param.get_help_record(ctx) for param in ctx.command.get_params(ctx)]
    options = [record for record in records if record is not None]
    lines += [".SH OPTIONS"] if options else []
    for option, text in options:
        lines += [".TP", f".B {escaped(option)}", escaped(text)]
    lines += [".SH COMMANDS"] if commands else []
    for command, text in commands.items():
        lines += [".TP", f".B backyfs\\-{escaped(command)}(1)", escaped(text)]
    if ctx.command.epilog:
        lines += [".SH NOTES", *paragraphs(ctx.command.epilog)]
    if commands:
        lines += [".SH SEE ALSO", escaped("backyfs help exit-codes, docs/ of the project")]
    else:
        lines += [".SH SEE ALSO", r".BR backyfs (1)"]
    return "\n".join(lines) + "\n"


def pages() -> Iterator[tuple[str, str]]:
    """File name and content of every page."""
    top = click.Context(program, info_name="backyfs", **program.context_settings)
    summaries = {}
    for name in program.list_commands(top):
        command = program.get_command(top, name)
        assert command is not None
        summaries[name] = command.get_short_help_str(limit=300)
        ctx = click.Context(command, info_name=name, parent=top)
        yield f"backyfs-{name}.1", page(ctx, {})
    yield "backyfs.1", page(top, summaries)


def main() -> None:
    """Write the pages into the directory named on the command line."""
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    written = [(directory / name).write_text(content) for name, content in pages()]
    print(f"{len(written)} manual pages in {directory}/")


if __name__ == "__main__":
    main()
