"""Options that several commands share, so that they look and read the same everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from backyfs.cli.completing import complete_spec
from backyfs.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


class _Seconds(click.ParamType[float]):
    """A number of seconds: finite, not negative."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse a word of the command line."""
        try:
            seconds = float(value)
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds < float("inf"):
            self.fail(f"{value!r} is no number of seconds", param, ctx)
        return seconds


SECONDS = _Seconds()


def parse_size(text: str) -> int | None:
    """Bytes from `512`, `20G`, `20GiB` (units of 1024); None when it is no such thing."""
    from backyfs.config import size

    try:
        return size.parse_size(text)
    except UsageError:
        return None


class _Path(click.Path):
    """A path, taken as it is, but not the empty one: that is a shell's variable that was not set,
    and the current directory to Python.

    Click's own type asks for the path's attributes. A mount whose process hangs never tells them,
    and who waits for them is not even ended by SIGTERM.
    """

    def convert(
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Path:
        """Parse a word of the command line."""
        if value == "":
            self.fail("it is empty", param, ctx)
        return Path(value)


PATH = _Path()


class _Scratch(click.ParamType[tuple[Path, int | None]]):
    """DIR or DIR:SIZE: where overlays are kept, and how many bytes they may take."""

    name = "dir[:size]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Path, int | None]:
        """Parse a word of the command line; a directory may have a colon in its name."""
        if not value:
            self.fail("it is empty", param, ctx)
        directory, colon, size = str(value).rpartition(":")
        if not colon or (bytes_max := parse_size(size)) is None:
            return Path(value), None
        if not directory:
            self.fail(f"{value!r} names no directory", param, ctx)
        return Path(directory), bytes_max


SCRATCH = _Scratch()


class _Size(click.ParamType[int]):
    """A number of bytes, with or without a unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse a word of the command line."""
        from backyfs.config.size import parse_size

        try:
            return parse_size(value)
        except UsageError as exc:
            self.fail(f"{exc.message}: {exc.hint}", param, ctx)


SIZE = _Size()


def as_json(function: F) -> F:
    """--json, passed as `as_json`: results as JSON on stdout, errors as JSON on stderr."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON (docs/cli.md).")(
        function
    )


def config(function: F) -> F:
    """-c/--config FILE after the command, as Backy has it; the same as before the command."""

    def keep(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
        if value is not None:
            ctx.obj = replace(ctx.obj, config=value)

    return click.option(
        "-c",
        "--config",
        metavar="FILE",
        type=PATH,
        expose_value=False,
        callback=keep,
        help="Configuration of all jobs (default: /etc/backy.conf).",
    )(function)


def revision(default: str = "") -> Callable[[F], F]:
    """-r/--revision SPEC, passed as `spec`; required without a `default`."""
    optional = {"default": default, "show_default": True} if default else {"required": True}
    return click.option(
        "-r",
        "--revision",
        "spec",
        metavar="SPEC",
        shell_complete=complete_spec,
        help="Which revisions: an id, latest, tag:NAME, a date … (backyfs help spec).",
        **optional,
    )


def dry_run(function: F) -> F:
    """-n/--dry-run, passed as `dry_run`."""
    return click.option(
        "-n", "--dry-run", is_flag=True, help="Say what would happen; change nothing."
    )(function)


def yes(function: F) -> F:
    """-y/--yes, passed as `yes`: do not ask."""
    return click.option("-y", "--yes", is_flag=True, help="Do not ask.")(function)


def wait(function: F) -> F:
    """--wait S, passed as `wait_s`: how long to wait for another writer."""
    return click.option(
        "--wait",
        "wait_s",
        metavar="S",
        type=SECONDS,
        default=0.0,
        help="Wait up to S seconds for another writer (default: exit 75 at once).",
    )(function)


def progress(function: F) -> F:
    """--progress/--no-progress, passed as `progress` (None: as the terminal suggests)."""
    return click.option(
        "--progress/--no-progress",
        "progress",
        default=None,
        help="Show progress (default: on a terminal).",
    )(function)
