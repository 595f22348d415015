"""backyfs export-diff: what rbd import-diff takes to bring an image to a revision."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import click

from backyfs.ceph.spec import snapshot_name
from backyfs.cli import consent, options, output, selection
from backyfs.cli.completing import complete_disk, complete_spec
from backyfs.cli.session import Session
from backyfs.errors import NoRevision, UsageError
from backyfs.restore.difference import differences
from backyfs.restore.diffstream import Names, StreamReport, write
from backyfs.restore.place import holds_data, opened
from backyfs.store.contract import StoredImage
from backyfs.store.record import Record
from backyfs.store.repository import Repository


@click.command()
@click.argument("specs", metavar="[REV1] REV2", nargs=-1, shell_complete=complete_spec)
@click.option(
    "-o",
    "--output",
    "target",
    metavar="FILE",
    type=click.Path(allow_dash=True, readable=False),
    default="-",
    help="Where the stream goes (default: stdout).",
)
@click.option(
    "--disk",
    metavar="NAME",
    shell_complete=complete_disk,
    help="Which disk, if the revisions have several.",
)
@click.option(
    "--from-snap",
    metavar="NAME",
    help="Snapshot the image must have (default: ours of REV1; '': none).",
)
@click.option(
    "--to-snap",
    metavar="NAME",
    help="Snapshot the image gets at the end (default: ours of REV2; '': none).",
)
@click.option("-f", "--force", is_flag=True, help="Overwrite an existing FILE without asking.")
@options.as_json
@click.pass_obj
def command(
    session: Session,
    specs: tuple[str, ...],
    target: str,
    disk: str | None,
    from_snap: str | None,
    to_snap: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write the changes from REV1 to REV2 as a stream for rbd import-diff.

    The image must be as REV1 is: have its snapshot, and no changes since. REV2 may be the older
    one. Without REV1 the stream holds all of REV2, for an empty image. Only what differs is read.

    Snapshots are named as backups name theirs, backy-<repository>-<revision>. If the image has
    that of REV2 already, say --to-snap ''.

    A stream that fails has no end record, and rbd import-diff fails, too; what came before is
    in the image by then, but not the snapshot of REV2: roll it back.

    \b
        backyfs -b /srv/backy/web01 export-diff 1 latest | rbd import-diff - pool/web01
    """  # noqa: D301 - click takes a backspace for: leave these lines alone
    repository = session.repository()
    picked = _pick(repository, specs, as_json)
    name = selection.disk_of(picked[-1], disk)
    for record in picked:
        if name not in record.disks:
            raise NoRevision(f"{record.id} has no disk {name!r}")
        selection.check_structure(repository, record, name)
    names = _names(repository, picked, from_snap, to_snap)
    if not force and target != "-" and holds_data(target):
        consent.ask(f"Overwrite {target}?", [], yes=False, option="--force")
    with (
        session.logging(repository),
        _opened(repository, picked, name) as (old, new),
        opened(target, 0, store=repository.path) as place,
    ):
        report = write(new, differences(old, new), names, place)
    _report(session, picked[-1], name, target, names, report, as_json)


def _pick(repository: Repository, specs: tuple[str, ...], as_json: bool) -> list[Record]:
    if not 1 <= len(specs) <= 2:
        raise UsageError("name one or two revisions", hint="see: backyfs export-diff --help")
    return [selection.pick_one(repository, spec, as_json=as_json) for spec in specs]


def _names(
    repository: Repository, picked: list[Record], start: str | None, end: str | None
) -> Names:
    """The snapshots to name in the stream: as told, else ours."""
    ours = [snapshot_name(repository.uuid, record.id) for record in picked]
    if start is None:
        start = ours[0] if len(ours) == 2 else ""
    return Names(start, ours[-1] if end is None else end)


@contextlib.contextmanager
def _opened(
    repository: Repository, picked: list[Record], disk: str
) -> Iterator[tuple[StoredImage | None, StoredImage]]:
    """The disk in both revisions, if there are two."""
    with contextlib.ExitStack() as stack:
        images = [
            stack.enter_context(contextlib.closing(repository.open_disk(record, disk)))
            for record in picked
        ]
        yield (images[0] if len(images) == 2 else None), images[-1]


def _report(
    session: Session,
    record: Record,
    disk: str,
    target: str,
    names: Names,
    report: StreamReport,
    as_json: bool,
) -> None:
    with contextlib.redirect_stdout(sys.stderr) if target == "-" else contextlib.nullcontext():
        if as_json:
            output.json_line(
                {
                    "message_type": "summary",
                    "revision": record.id,
                    "disk": disk,
                    "target": target,
                    "from_snap": names.start,
                    "to_snap": names.end,
                    "data": report.data,
                    "zeros": report.zeros,
                    "length": report.length,
                }
            )
        elif not session.quiet:
            output.line(
                f"{record.id}/{disk}: {output.size(report.data)} of data and"
                f" {output.size(report.zeros)} of zeros to {target}"
            )
