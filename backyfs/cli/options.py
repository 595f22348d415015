"""Options that several commands share, so that they look and read the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from backyfs.cli.completing import complete_spec

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


def as_json(function: F) -> F:
    """--json, passed as `as_json`: results as JSON on stdout, errors as JSON on stderr."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON (docs/cli.md).")(
        function
    )


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
