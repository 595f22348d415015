"""`backyfs loop`: mount the file system of a guest from a revision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from backyfs.cli import options, output, selection
from backyfs.cli.completing import complete_spec
from backyfs.cli.session import Session
from backyfs.model import Consistency, Trust

if TYPE_CHECKING:
    from backyfs.mount.loop import Loop
    from backyfs.store.record import Record
    from backyfs.store.repository import Repository

EPILOG = """\b
Examples:
  backyfs -b /srv/backy/web01 loop latest /mnt/web01
  cp /mnt/web01/etc/fstab /tmp/
  backyfs unloop /mnt/web01
  backyfs -b /srv/backy/web01 loop --partition 2 tag:weekly /mnt/web01

A file system that was in use when it was backed up has changes in its journal. The kernel replays
them in a throw-away overlay: the revision never changes, and nothing written lasts. As long as it
is mounted, the revision is in use and is not removed."""


@click.command(epilog=EPILOG)
@click.argument("spec", metavar="SPEC", shell_complete=complete_spec)
@click.argument("mountpoint", type=options.PATH)
@click.option("--disk", metavar="NAME", help="Which disk, if the revision has several.")
@click.option(
    "--partition",
    metavar="N",
    type=click.IntRange(min=1),
    help="Which partition, if several hold a file system.",
)
@click.option(
    "-o",
    "--options",
    "words",
    metavar="OPTIONS",
    default="nodev,nosuid,noexec",
    show_default=True,
    help="What mount(8) is told.",
)
@click.option(
    "--writable", is_flag=True, help="Mount it for writing, in an overlay that is dropped."
)
@click.option(
    "--noload", is_flag=True, help="Show a dirty ext4 as it is, without replaying its journal."
)
@click.option(
    "--unsafe",
    is_flag=True,
    help="As --noload, of every kind: a dirty XFS may look empty, and btrfs lack what was written.",
)
@click.option(
    "--scratch",
    metavar="DIR[:SIZE]",
    type=options.SCRATCH,
    default="/var/tmp",
    show_default=True,
    help="Where the overlay is kept, unless a mount with --scratch shows the revision.",
)
@options.as_json
@click.pass_obj
def command(
    session: Session,
    spec: str,
    mountpoint: Path,
    disk: str | None,
    partition: int | None,
    words: str,
    writable: bool,
    noload: bool,
    unsafe: bool,
    scratch: tuple[Path, int | None],
    as_json: bool,
) -> None:
    """Mount the file system on a disk of the revision SPEC at MOUNTPOINT, read-only.

    Uses the file system on the whole disk, or that of the only partition that has one.
    """
    from backyfs.mount.daemon import Logging
    from backyfs.mount.diskfile import Private
    from backyfs.mount.guest import Wishes
    from backyfs.mount.loop import loop

    repository = session.repository()
    record = selection.pick_one(repository, spec, as_json=as_json)
    name = selection.disk_of(record, disk)
    _warn(repository, record, as_json)
    done = loop(
        repository,
        record,
        name,
        mountpoint,
        partition=partition,
        wishes=Wishes(noload=noload, unsafe=unsafe, writable=writable),
        options=words,
        private=Private(*scratch, Logging(session.logfile, session.verbose, session.quiet)),
    )
    if as_json:
        output.json_line(_described(repository, record, name, done))
    elif not session.quiet:
        _say(record, name, done)


def _warn(repository: Repository, record: Record, as_json: bool) -> None:
    """Say why the revision's content may not be what one expects."""
    state = repository.state(record)
    if state.trust is Trust.DISTRUSTED:
        why = f": {state.why}" if state.why else ""
        output.warn(f"{record.id} is distrusted{why}", as_json=as_json)
    if record.consistency is Consistency.TORN:
        output.warn(f"{record.id} is torn: it was never on the disk as it is", as_json=as_json)
    if repository.damage_of(record):
        output.warn(f"{record.id} is damaged: some files cannot be read", as_json=as_json)


def _say(record: Record, disk: str, done: Loop) -> None:
    part = f" partition {done.place.partition}" if done.place.partition else ""
    view = "scratch view" if done.plan.scratch else "image"
    output.line(f"{done.device}: {done.place.kind} of {record.id}/{disk}{part}, from the {view}")
    output.line(f"  {done.plan.reason}")
    output.line(f"mounted on {done.mountpoint} ({done.options})")


def _described(
    repository: Repository, record: Record, disk: str, done: Loop
) -> dict[str, str | int | None]:
    return {
        "message_type": "loop",
        "vm": repository.name,
        "revision": record.id,
        "disk": disk,
        "partition": done.place.partition,
        "filesystem": done.place.kind,
        "view": "scratch" if done.plan.scratch else "image",
        "reason": done.plan.reason,
        "device": str(done.device),
        "mountpoint": str(done.mountpoint),
        "options": done.options,
    }
