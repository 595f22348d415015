"""backyfs restore: write a disk of a revision to a file, a block device, Ceph or stdout."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import click

from backyfs.cli import consent, describe, options, output, selection
from backyfs.cli.completing import complete_disk
from backyfs.cli.session import Session
from backyfs.errors import BackyfsError, Corrupt, UsageError
from backyfs.model import Extent
from backyfs.restore.decoding import decoding
from backyfs.restore.place import check, opened, overwrites
from backyfs.restore.reading import Room
from backyfs.restore.target import Rewritable, Target
from backyfs.restore.transfer import Report, damaged, restore
from backyfs.store.contract import StoredImage
from backyfs.store.record import Record
from backyfs.store.repository import Repository

if TYPE_CHECKING:
    from backyfs.ceph.settings import Settings
    from backyfs.config import Job
    from backyfs.restore.delta import DeltaReport

_LISTED_MAX = 20

Advancing = Callable[[str, Iterable[Extent]], Callable[[int], None]]
"""Who is told how far a step over some extents is."""


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
@click.option(
    "--delta", is_flag=True, help="Compare with what TARGET holds; write only what differs."
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
    delta: bool,
    force: bool,
    dry_run: bool,
    progress: bool | None,
    as_json: bool,
) -> int:
    """Write a disk of the revision SPEC to TARGET: a file, a block device, an RBD image of a Ceph
    cluster (rbd:POOL/IMAGE, rbd:POOL/NAMESPACE/IMAGE), or - for stdout.

    A new file or RBD image appears under its name only when it is complete; what is overwritten in
    place gets its first 2 MiB last, so that nothing half restored looks like a disk. Holes stay
    holes where the target allows. Every byte is checked while it is read; the structure of the
    revision before the first byte is written.

    With --delta the target keeps what is right in it already: a restore that was interrupted goes
    on where it stopped.

    The cluster of an RBD image is the one of CEPH_CONF and CEPH_ARGS, as for the program rbd;
    without them the one of the VM's source, or of /etc/ceph. An image that a running VM has open
    is refused unless --force is given; one of another size is resized.

    A restore to stdout that fails has written some bytes already: look at the exit code
    (`set -o pipefail` in a shell).

    \b
        backyfs -b /srv/backy/web01 restore -r latest /var/lib/vms/web01.img
        backyfs -b /srv/backy/web01 restore -r 2026-11-14 rbd:pool/web01
        backyfs -b /srv/backy/web01 restore --delta rbd:pool/web01
    """  # noqa: D301 - click takes a backspace for: leave these lines alone
    if not target:
        raise BackyfsError("TARGET is empty", hint="name a file, a block device, or - for stdout")
    repository = session.repository()
    record = selection.pick_one(repository, spec, as_json=as_json)
    name = selection.disk_of(record, disk)
    if delta and target == "-":
        raise UsageError("stdout holds nothing to compare with", hint="leave out --delta")
    if not salvage:
        selection.check_structure(repository, record, name)
    size = record.disks[name].size
    ceph = _cluster_of(repository) if target.startswith("rbd:") else None
    replaces = (dry_run or not force) and target != "-" and overwrites(target, size, ceph=ceph)
    if dry_run:
        check(target, size, store=repository.path, force=force)
        _preview(record, name, target, replaces, as_json)
        return 0
    if replaces and not force:
        question = f"Overwrite {target} with {record.id}/{name} ({output.size(size)})?"
        consent.ask(question, [], yes=False, option="--force")
    started = time.monotonic()
    with (
        session.logging(repository),
        contextlib.closing(repository.open_disk(record, name)) as image,
        decoding(image, target) as room,
        _advancing(session, False if as_json else progress) as advance,
    ):
        if check_first:
            _check_all(repository, record, name, image, salvage=salvage, advance=advance)
        with opened(
            target, size, store=repository.path, force=force, keep=delta, ceph=ceph
        ) as place:
            report = _fill(image, place, room, delta=delta, salvage=salvage, advance=advance)
    _report(session, record, name, target, report, time.monotonic() - started, as_json)
    return 12 if report.bad else 0


def _cluster_of(repository: Repository) -> Settings | None:
    """How the VM's own source reaches its cluster; None = as the environment says."""
    from backyfs.config import read_job

    if "CEPH_CONF" not in os.environ and "CEPH_ARGS" not in os.environ:
        with contextlib.suppress(BackyfsError):  # a broken or missing job is no reason to fail
            return _cluster_of_job(read_job(repository.path / "config"))
    return None


def _cluster_of_job(job: Job) -> Settings | None:
    from backyfs.source.ceph import config as ceph
    from backyfs.source.flyingcircus import config as flyingcircus

    if job.source_type == "ceph-rbd":
        return ceph.read_config(job.settings).cluster
    if job.source_type == "flyingcircus":
        return flyingcircus.read_config(job.settings).ceph.cluster
    return None


def _fill(
    image: StoredImage,
    place: Target,
    room: Room,
    *,
    delta: bool,
    salvage: bool,
    advance: Advancing,
) -> Report | DeltaReport:
    """All of the image, or with `delta` what differs; a new target has nothing to compare with."""
    if delta and isinstance(place, Rewritable):
        from backyfs.restore.delta import candidates, update

        where = candidates(image, place)
        told = advance("comparing", where)
        return update(image, place, where, salvage=salvage, advance=told)
    told = advance("restoring", image.extents())
    return restore(image, place, salvage=salvage, advance=told, room=room)


def _preview(record: Record, disk: str, target: str, replaces: bool, as_json: bool) -> None:
    size = record.disks[disk].size
    if as_json:
        output.json_line(
            {
                "message_type": "would_restore",
                "revision": record.id,
                "disk": disk,
                "target": target,
                "size": size,
                "overwrites": replaces,
            }
        )
    else:
        over = ", over existing data" if replaces else ""
        output.line(f"would restore {record.id}/{disk} ({output.size(size)}) to {target}{over}")


def _check_all(
    repository: Repository,
    record: Record,
    disk: str,
    image: StoredImage,
    *,
    salvage: bool,
    advance: Advancing,
) -> None:
    bad = damaged(image, advance=advance("checking", image.extents()))
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
    report: Report | DeltaReport,
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
                    **_counts(report),
                    "bad": describe.extents(report.bad),
                    "seconds": round(seconds, 3),
                }
            )
        elif not session.quiet:
            output.line(
                f"{record.id}/{disk}: restored {output.size(report.size)} ({_words(report)})"
                f" to {target} in {output.duration(seconds)}"
            )
    if report.bad and not as_json:
        _list_bad(record, disk, report.bad)


def _counts(report: Report | DeltaReport) -> dict[str, int]:
    if isinstance(report, Report):
        return {"data": report.data}
    return {"compared": report.compared, "written": report.written, "zeroed": report.zeroed}


def _words(report: Report | DeltaReport) -> str:
    if isinstance(report, Report):
        return f"{output.size(report.data)} of data"
    changed = report.written + report.zeroed
    return f"{output.size(report.compared)} compared, {output.size(changed)} changed"


def _list_bad(record: Record, disk: str, bad: tuple[Extent, ...]) -> None:
    count = sum(extent.length for extent in bad)
    output.warn(f"{record.id}/{disk}: {count} bytes were damaged and are zeros now:")
    for extent in bad[:_LISTED_MAX]:
        print(f"  offset {extent.offset}, length {extent.length}", file=sys.stderr)
    if len(bad) > _LISTED_MAX:
        print(f"  and {len(bad) - _LISTED_MAX} more (all with --json)", file=sys.stderr)


@contextlib.contextmanager
def _advancing(session: Session, wanted: bool | None) -> Iterator[Advancing]:
    """For each step of the work, who is told how far it is; a bar only for those who watch."""
    if not (sys.stderr.isatty() and not session.quiet if wanted is None else wanted):
        yield lambda step, extents: lambda count: None
        return
    from backyfs.cli.bar import bars

    with bars() as add:
        yield lambda step, extents: add(step, sum(extent.length for extent in extents))
