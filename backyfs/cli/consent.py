"""Asking before something is lost for good.

On a terminal: show the exact list, ask. Without one: refuse unless --yes was given, because
nobody is there to say no.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from backyfs.errors import BackyfsError, UsageError


def ask(question: str, items: Sequence[str], *, yes: bool, option: str = "--yes") -> None:
    """Return if the operator agrees to `question` about `items`.

    UsageError without a terminal and without `option`, BackyfsError when the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(f"{question} Not without {option}, as there is no terminal to ask on")
    for item in items:
        click.echo(f"  {item}", err=True)
    if not click.confirm(question, err=True):
        raise BackyfsError("nothing was changed")
