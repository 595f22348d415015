"""`backyfs unloop`: end what `backyfs loop` mounted."""

from __future__ import annotations

from pathlib import Path

import click

from backyfs.cli import options


@click.command()
@click.argument("mountpoint", type=options.PATH)
@click.option(
    "-l",
    "--lazy",
    is_flag=True,
    help="Detach it even while it is in use; the rest goes when the last user ends.",
)
def command(mountpoint: Path, lazy: bool) -> None:
    """Unmount a guest's file system, and wait until its loop device and its process are gone."""
    from backyfs.mount.loop import unloop

    unloop(mountpoint, lazy=lazy)
