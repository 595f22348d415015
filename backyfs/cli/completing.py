"""Words a shell may complete: VMs, revisions, tags, disks, as they are in the named directory.

Each key press starts the program, so nothing here reads more than names and small files. Nobody
sees an error here: whatever goes wrong, there is nothing to offer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

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
_TRUST = ("trust:trusted", "trust:verified", "trust:distrusted")
_NEWEST = 30
"""Revisions whose records are read for their tags."""

Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def _quietly(words: Callable[[Path], Iterable[str]]) -> Complete:
    """A completion out of the named directory; nothing where that fails."""

    def complete(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
        with contextlib.suppress(Exception):
            found = words(_directory(ctx))
            return list(dict.fromkeys(word for word in found if word.startswith(incomplete)))
        return []

    return complete


def _directory(ctx: click.Context) -> Path:
    return Path(ctx.find_root().params.get("backup_dir") or ".")


def _ids(directory: Path) -> list[str]:
    names = (path.name for path in (directory / "revisions").iterdir())
    return sorted((name[:-5] for name in names if name.endswith(".json")), reverse=True)


def _tags_there(directory: Path) -> list[str]:
    """Tags of the newest revisions."""
    from backyfs.store.repository import Repository

    repository = Repository.open(directory)
    records = [repository.record(revision) for revision in _ids(directory)[:_NEWEST]]
    return sorted({tag for record in records for tag in repository.state(record).tags})


def _specs(directory: Path) -> Iterable[str]:
    yield from KEYWORDS
    with contextlib.suppress(Exception):
        yield from _ids(directory)
    yield from _TRUST
    with contextlib.suppress(Exception):
        yield from (f"tag:{tag}" for tag in _tags_there(directory))


def _tags(directory: Path) -> Iterable[str]:
    from backyfs.config import read_job

    with contextlib.suppress(Exception):
        yield from read_job(directory / "config").schedule
    with contextlib.suppress(Exception):
        yield from _tags_there(directory)
    yield "manual:"


def _disks(directory: Path) -> Iterable[str]:
    from backyfs.store.repository import Repository

    return Repository.open(directory).record(_ids(directory)[0]).disks


def _jobs(_: Path) -> Iterable[str]:
    from backyfs.config.site import read_site

    config = click.get_current_context().find_root().params.get("config") or "/etc/backy.conf"
    return read_site(Path(config)).jobs


complete_spec = _quietly(_specs)
complete_tags = _quietly(_tags)
complete_disk = _quietly(_disks)


def complete_job(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of jobs in the configuration."""
    with ctx.scope(cleanup=False):
        return _quietly(_jobs)(ctx, param, incomplete)


def complete_directory(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The VMs below the directory that is being typed; where there are none, any directory."""
    from click.shell_completion import CompletionItem

    with contextlib.suppress(Exception):
        above, _, beginning = incomplete.rpartition("/")
        parent = Path(f"{above}/") if "/" in incomplete else Path(".")
        names = (name for name in sorted(os.listdir(parent)) if name.startswith(beginning))
        found = [name for name in names if (parent / name / "repository.json").is_file()]
        if found:
            head = f"{above}/" if "/" in incomplete else ""
            return [CompletionItem(head + name) for name in found]
    return [CompletionItem(incomplete, type="dir")]
