"""`backyfs mount`: show revisions as a tree of files."""

from __future__ import annotations

from pathlib import Path

import click

from backyfs.cli import options, output
from backyfs.cli.session import Session

MIB = 1024 * 1024
IDLE_MIN = 10

EPILOG = """\b
Examples:
  backyfs -b /srv/backy mount /mnt/backy
  ls -l /mnt/backy/web01
  ls -l /mnt/backy/web01/at/last-saturday/partitions
  cp --sparse=always /mnt/backy/web01/latest/disk.img /var/tmp/
  backyfs umount /mnt/backy

The tree is read-only (but see --scratch). New revisions appear and removed ones vanish within two
seconds. A damaged part of an image is an I/O error for that part only."""


@click.command(epilog=EPILOG)
@click.argument("mountpoint", type=options.PATH)
@click.option(
    "-f", "--foreground", is_flag=True, help="Stay; SIGTERM or SIGINT (Ctrl-C) end the mount."
)
@click.option(
    "--allow-other", is_flag=True, help="Let all users of this host read everything in the tree."
)
@click.option(
    "--cache",
    "cache_mib",
    metavar="MIB",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Memory for decoded data.",
)
@click.option(
    "--check", is_flag=True, help="Verify every byte of cow revisions, too (packs always are)."
)
@click.option(
    "--scratch",
    metavar="DIR[:SIZE]",
    type=options.SCRATCH,
    help="Also show each image as DISK.rw.img, to which may be written; what is written is kept in"
    " DIR (SIZE at most, such as 20G, all together) and dropped at the end of the mount, or when"
    f" nobody had the file open for {IDLE_MIN} minutes.",
)
@click.pass_obj
def command(
    session: Session,
    mountpoint: Path,
    foreground: bool,
    allow_other: bool,
    cache_mib: int,
    check: bool,
    scratch: tuple[Path, int | None] | None,
) -> None:
    """Show the revisions of all VMs below the backup directory as a tree of files.

    Returns when the tree is ready.
    """
    from backyfs.mount.daemon import Logging, mount

    mount(
        session.directory,
        mountpoint,
        foreground=foreground,
        allow_other=allow_other,
        cache_bytes=cache_mib * MIB,
        check=check,
        scratch=scratch[0] if scratch else None,
        scratch_bytes=scratch[1] if scratch else None,
        logging=Logging(session.logfile, session.verbose, session.quiet),
    )
    if not foreground:
        output.say(session, f"mounted on {mountpoint}; end it with: backyfs umount {mountpoint}")
