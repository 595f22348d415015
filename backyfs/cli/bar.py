"""Bars on a terminal. Imports rich: 100 ms that only somebody who watches should pay for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich import progress
from rich.console import Console

Add = Callable[[str, int], Callable[[int], None]]
"""Starts a bar: what is being done and how many bytes of it; returns what moves the bar on."""


@contextlib.contextmanager
def bars() -> Iterator[Add]:
    """Bars on stderr, gone when done. Safe to move from several threads."""
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as shown:

        def add(what: str, total: int) -> Callable[[int], None]:
            task = shown.add_task(what, total=total or None)
            return lambda count: shown.advance(task, count)

        yield add
