"""`backyfs unloop`: end what `backyfs loop` mounted."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
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
