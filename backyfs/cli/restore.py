"""backyfs restore: write a disk of a revision to a file, a block device or stdout."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import click

from backyfs.cli import consent, describe, options, output, selection
from backyfs.cli.completing import complete_disk
from backyfs.cli.session import Session
from backyfs.errors import Corrupt
from backyfs.model import Extent
from backyfs.restore.place import holds_data, opened
from backyfs.restore.transfer import Report, damaged, restore
from backyfs.store.contract import StoredImage
from backyfs.store.record import Record
from backyfs.store.repository import Repository

_LISTED_MAX = 20


@click.command()
@click.argument("target", type=click.Path(allow_dash=True, readable=False))
@options.revision("latest")
@click.option(
    "--disk",
    metavar="NAME",
    shell_complete=complete_disk,
    help="Which disk, if the revision has several.",
)
@click.option(
    "--check-first", is_flag=True, help="Read and check everything before touching TARGET."
)
@click.option(
    "--salvage",
    is_flag=True,
    help="Write zeros where data is damaged, list those ranges and exit 12.",
)
@click.option("-f", "--force", is_flag=True, help="Overwrite existing data without asking.")
@options.dry_run
@options.progress
@options.as_json
@click.pass_obj
def command(
    session: Session,
    target: str,
    spec: str,
    disk: str | None,
    check_first: bool,
    salvage: bool,
    force: bool,
    dry_run: bool,
    progress: bool | None,
    as_json: bool,
) -> int:
    """Write a disk of the revision SPEC to TARGET: a file, a block device, or - for stdout.

    A new file appears under its name only when it is complete; what is overwritten in place gets
    its first 2 MiB last, so that nothing half restored looks like a disk. Holes stay holes where
    the target allows. Every byte is checked while it is read; the structure of the revision before
    the first byte is written.

    A restore to stdout that fails has written some bytes already: look at the exit code
    (`set -o pipefail` in a shell).

    \b
        backyfs -b /srv/backy/web01 restore -r latest /var/lib/vms/web01.img
        backyfs -b /srv/backy/web01 restore -r 2026-11-14 - | rbd import - pool/web01
    """  # noqa: D301 - click takes a backspace for: leave these lines alone
    repository = session.repository()
    record = selection.pick_one(repository, spec, as_json=as_json)
    name = selection.disk_of(record, disk)
    if not salvage:
        _check_structure(repository, record, name)
    if dry_run:
        _preview(record, name, target, as_json)
        return 0
    if not force and target != "-" and holds_data(target):
        question = f"Overwrite {target} with {record.id}/{name}?"
        consent.ask(question, [], yes=False, option="--force")
    started = time.monotonic()
    with (
        session.logging(repository),
        contextlib.closing(repository.open_disk(record, name)) as image,
        _advancing(session, False if as_json else progress, image) as advance,
    ):
        if check_first:
            _check_all(
                repository, record, name, image, salvage=salvage, advance=advance("checking")
            )
        with opened(target, image.size, store=repository.path, force=force) as place:
            report = restore(image, place, salvage=salvage, advance=advance("restoring"))
    _report(session, record, name, target, report, time.monotonic() - started, as_json)
    return 12 if report.bad else 0


def _preview(record: Record, disk: str, target: str, as_json: bool) -> None:
    overwrites = target != "-" and holds_data(target)
    size = record.disks[disk].size
    if as_json:
        output.json_line(
            {
                "message_type": "would_restore",
                "revision": record.id,
                "disk": disk,
                "target": target,
                "size": size,
                "overwrites": overwrites,
            }
        )
    else:
        over = ", over existing data" if overwrites else ""
        output.line(f"would restore {record.id}/{disk} ({output.size(size)}) to {target}{over}")


def _check_structure(repository: Repository, record: Record, disk: str) -> None:
    for item in repository.structure(record):
        if item.disk in ("", disk):
            raise Corrupt(item.reason, vm=repository.name, revision=record.id, disk=disk)


def _check_all(
    repository: Repository,
    record: Record,
    disk: str,
    image: StoredImage,
    *,
    salvage: bool,
    advance: Callable[[int], None],
) -> None:
    bad = damaged(image, advance=advance)
    if bad and not salvage:
        raise Corrupt(
            f"{len(bad)} damaged ranges; nothing was written",
            vm=repository.name,
            revision=record.id,
            disk=disk,
            offset=bad[0].offset,
            length=bad[0].length,
        )


def _report(
    session: Session,
    record: Record,
    disk: str,
    target: str,
    report: Report,
    seconds: float,
    as_json: bool,
) -> None:
    # With the image on stdout, even a summary has to go elsewhere.
    with contextlib.redirect_stdout(sys.stderr) if target == "-" else contextlib.nullcontext():
        if as_json:
            output.json_line(
                {
                    "message_type": "summary",
                    "revision": record.id,
                    "disk": disk,
                    "target": target,
                    "size": report.size,
                    "data": report.data,
                    "bad": describe.extents(report.bad),
                    "seconds": round(seconds, 3),
                }
            )
        elif not session.quiet:
            output.line(
                f"{record.id}/{disk}: restored {output.size(report.size)} "
                f"({output.size(report.data)} of data) to {target} in {output.duration(seconds)}"
            )
    if report.bad and not as_json:
        _list_bad(record, disk, report.bad)


def _list_bad(record: Record, disk: str, bad: tuple[Extent, ...]) -> None:
    count = sum(extent.length for extent in bad)
    output.warn(f"{record.id}/{disk}: {count} bytes were damaged and are zeros now:")
    for extent in bad[:_LISTED_MAX]:
        print(f"  offset {extent.offset}, length {extent.length}", file=sys.stderr)
    if len(bad) > _LISTED_MAX:
        print(f"  and {len(bad) - _LISTED_MAX} more (all with --json)", file=sys.stderr)


@contextlib.contextmanager
def _advancing(
    session: Session, wanted: bool | None, image: StoredImage
) -> Iterator[Callable[[str], Callable[[int], None]]]:
    """For each step of the work, who is told how far it is; a bar only for those who watch."""
    if not (sys.stderr.isatty() and not session.quiet if wanted is None else wanted):
        yield lambda step: lambda count: None
        return
    from backyfs.cli.bar import bars

    total = sum(extent.length for extent in image.extents())
    with bars() as add:
        yield lambda step: add(step, total)
