"""Words a shell may complete: keywords and ids of the revisions in the named directory."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

KEYWORDS = (
    "latest",
    "first",
    "all",
    "tag:",
    "trust:",
    "yesterday",
    "last-week",
    "not(",
    "last(",
    "first(",
    "reverse(",
)


def complete_spec(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Beginnings of a SPEC; silent whatever goes wrong, as nobody sees an error here."""
    words = list(KEYWORDS)
    with contextlib.suppress(Exception):
        words += _ids(Path(ctx.find_root().params.get("backup_dir") or "."))
    return [word for word in words if word.startswith(incomplete)]


def _ids(directory: Path) -> list[str]:
    names = (path.name for path in (directory / "revisions").iterdir())
    return sorted((name[:-5] for name in names if name.endswith(".json")), reverse=True)
