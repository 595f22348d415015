"""`backyfs umount`: end a mount."""

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
    help="Detach the tree even while it is in use; what is open stays readable.",
)
def command(mountpoint: Path, lazy: bool) -> None:
    """End the mount at MOUNTPOINT, and wait until its process is gone."""
    from backyfs.mount.daemon import umount

    umount(mountpoint, lazy=lazy)
