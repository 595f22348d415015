"""The program `backyfs`: finds the command, runs it, turns what it raises into an exit code.

A command is a module of this package: `backyfs/cli/NAME.py` (`-` in the name becomes `_`) holding
a click command in the variable `command`, and a line in commands.py. The module is imported only
when the command runs or its own help is asked for, so what one command imports costs no other one.
The pattern:

    @click.command(epilog=EPILOG)               # the name comes from COMMANDS
    @click.option("-r", "--revision", "spec", metavar="SPEC", default="latest")
    @options.as_json                            # --json, passed as `as_json`
    @click.pass_obj
    def command(session: Session, spec: str, as_json: bool) -> int | None:
        from backyfs.x import y                 # heavy or rarely needed imports go in here
        result = y(session.repository(), ...)   # one library call
        output.line(...)                        # then print
        return None                             # or an exit code other than 0

- `Session` (session.py) carries the global options; `session.repository()` opens the repository.
- `selection.pick` and `selection.pick_one` turn a SPEC into records.
- An async library function runs through `running.run(function, *arguments)`, which imports trio
  and turns signals that end a run into cancellation; synchronous commands get `Interrupted` (a
  BaseException) raised in the main thread, so `finally` and `with` clean up in both.
- Expected errors are raised as BackyfsError (or OSError); they are printed here and nowhere else.
- Results go to stdout, everything else to stderr; `output.warn` writes a warning.

Exit codes: docs/cli.md, `backyfs help exit-codes`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from backyfs import __version__, descriptors, signals
from backyfs.cli import failure, hints, options, streams
from backyfs.cli.commands import COMMANDS
from backyfs.cli.completing import complete_directory
from backyfs.cli.session import Session

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class Program(click.Group):
    """The top-level group: knows the commands by name and imports one when it is wanted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the overview."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command; None when there is no such command."""
        name = hints.ALIASES.get(cmd_name, cmd_name)
        if name not in COMMANDS:
            return None
        with signals.held():
            module = importlib.import_module(f"backyfs.cli.{name.replace('-', '_')}")
        command: click.Command = module.command
        command.name = name
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete commands without importing any."""
        from click.shell_completion import CompletionItem

        names = [name for name in COMMANDS if name.startswith(incomplete)]
        items = [CompletionItem(name, help=COMMANDS[name]) for name in names]
        return items + click.Command.shell_complete(self, ctx, incomplete)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, but an unknown command gets the hint of someone who knows other tools."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            raise hints.unknown_command(name, COMMANDS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Explain a command: backyfs help COMMAND. Exit codes: backyfs help exit-codes.",
)
@click.option(
    "-b",
    "--backup-dir",
    metavar="DIR",
    type=options.PATH,
    default=Path("."),
    envvar="BACKYFS_BACKUP_DIR",
    show_envvar=True,
    shell_complete=complete_directory,
    help="Directory of one VM, or the base directory of many (default: the current one).",
)
@click.option(
    "-c",
    "--config",
    metavar="FILE",
    type=options.PATH,
    default=Path("/etc/backy.conf"),
    envvar="BACKYFS_CONFIG",
    show_envvar=True,
    help="Configuration of all jobs (default: /etc/backy.conf).",
)
@click.option(
    "-l",
    "--logfile",
    metavar="FILE",
    type=options.PATH,
    help="Log file of commands that write (default: backy.log in the VM's directory).",
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    envvar="BACKYFS_LOG_FORMAT",
    show_envvar=True,
    help="How lines in log files look: text for people (default) or one JSON object each.",
)
@click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.version_option(__version__, prog_name="backyfs", message="%(prog)s %(version)s")
@click.pass_context
def program(
    ctx: click.Context,
    backup_dir: Path,
    config: Path,
    logfile: Path | None,
    log_format: str | None,
    verbose: bool,
    quiet: bool,
) -> None:
    """Back up the disks of virtual machines; restore and browse every revision of them."""
    if os.environ.get("NO_COLOR"):
        ctx.color = False
    if log_format is not None:
        os.environ["BACKYFS_LOG_FORMAT"] = log_format  # also for the processes we start
    ctx.obj = Session(backup_dir, config, logfile, verbose, quiet)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code, having printed what went wrong."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in args
    streams.prepare()
    descriptors.allow(descriptors.COMMAND)
    try:
        failure.raise_on_signals()
        if "_BACKYFS_COMPLETE" in os.environ:
            program.main(args, prog_name="backyfs", complete_var="_BACKYFS_COMPLETE")
        return _run(args)
    except BaseException as error:
        return failure.report(error, as_json=as_json)


def _run(args: list[str]) -> int:
    try:
        with _context(args) as ctx:
            code = program.invoke(ctx)
    except click.exceptions.Exit as exit_:
        code = exit_.exit_code
    sys.stdout.flush()  # here, where a reader that went away is still an error we handle
    return code if isinstance(code, int) else 0


def _context(args: list[str]) -> click.Context:
    """The global options, parsed. For `check` even a wrong one must not look like an answer."""
    try:
        return program.make_context("backyfs", list(args))
    except click.UsageError as error:
        if "check" in args:
            from backyfs.cli.check import give_up

            give_up(error, as_json="--json" in args)
        raise


if __name__ == "__main__":
    sys.exit(main())
