"""backyfs check-config: say whether the configuration is right, and everything that is not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from backyfs.cli import options, output
from backyfs.cli.session import Session
from backyfs.errors import ConfigError, Problem

if TYPE_CHECKING:
    from backyfs.config.site import Site


@click.command()
@options.config
@options.as_json
@click.option("--schema", is_flag=True, help="Print the JSON schema of the file, for editors.")
@click.pass_obj
def command(session: Session, as_json: bool, schema: bool) -> None:
    """Read the configuration of all jobs (-c) as the scheduler would, and change nothing.

    Every problem is told with its file, line and column. Exits 2 if there is any. Sources are
    not opened.
    """
    if schema:
        from backyfs.config.editor import json_schema

        output.line(json.dumps(json_schema(), indent=2))
        return
    try:
        site = session.site()
    except ConfigError as exc:
        for problem in sorted(exc.problems) if as_json else ():
            _json("problem", problem)
        raise
    _report(session, site, as_json)


def _report(session: Session, site: Site, as_json: bool) -> None:
    for warning in site.warnings:
        if as_json:
            _json("warning", warning)
        else:
            output.warn(str(warning))
    if as_json:
        output.json_line(
            {
                "message_type": "summary",
                "file": str(site.path),
                "base_dir": str(site.settings.base_dir),
                "jobs": len(site.jobs),
                "schedules": sorted(site.schedules),
            }
        )
    elif not session.quiet:
        count = len(site.jobs)
        output.line(
            f"{site.path}: {count} job{'' if count == 1 else 's'}, "
            f"base directory {site.settings.base_dir}: no problems"
        )


def _json(kind: str, problem: Problem) -> None:
    output.json_line(
        {
            "message_type": kind,
            "file": problem.file,
            "line": problem.line,
            "column": problem.column,
            "message": problem.text,
        }
    )
