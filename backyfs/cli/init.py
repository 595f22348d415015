"""backyfs init: make a directory the repository of a VM."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from backyfs.cli import output
from backyfs.cli.session import Session, make_way
from backyfs.errors import UsageError
from backyfs.model import DEFAULT_DISK, disk_name, vm_name

_PRICE = {
    "cow": "restores with cp and mounts at native speed; needs this btrfs or XFS",
    "packs": "compressed, checked on every read, moves with cp and rsync",
}


@click.command()
@click.argument("kind", metavar="TYPE")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option(
    "--store",
    type=click.Choice(["auto", "packs", "cow"]),
    default="auto",
    show_default=True,
    help="How to keep the data: packs (any file system) or cow (btrfs, XFS); auto takes cow on "
    "btrfs.",
)
@click.option(
    "--schedule",
    metavar="NAME",
    default="daily",
    show_default=True,
    help="Which tags backups get and how long they stay: daily or hourly.",
)
@click.pass_obj
def command(
    session: Session, kind: str, sources: tuple[str, ...], store: str, schedule: str
) -> None:
    """Make the directory given with -b the repository of a VM and note what is backed up there.

    TYPE is the type of the source. For `file`, SOURCE is the path of an image file or a block
    device, for `ceph-rbd` and `flyingcircus` it is POOL/IMAGE or POOL/NAMESPACE/IMAGE; several
    disks are written as NAME=SOURCE each:

    \b
        backyfs -b /srv/backy/web01 init file /var/lib/vms/web01.img
        backyfs -b /srv/backy/db01 init file root=/dev/vg/db01 data=/dev/vg/db01-data
        backyfs -b /srv/backy/app01 init ceph-rbd rbd/app01

    The directory's name is the VM's name. What is backed up, and when, is written to the file
    `config` in it, which may be edited.
    """  # noqa: D301 - click takes a backspace for: leave these lines alone
    from backyfs.config import BUILT_IN, Job, job_text, write_job
    from backyfs.source import containers, registry
    from backyfs.store.fs import real_path
    from backyfs.store.repository import Repository, is_repository

    if schedule not in BUILT_IN:
        raise UsageError(f"no schedule {schedule!r}", hint=f"there are: {', '.join(BUILT_IN)}")
    directory = real_path(session.directory)
    vm_name(directory.name)
    settings = _settings(kind, sources, directory.name)
    source = registry.make(kind, settings)
    disks = source.disks()
    config = directory / "config"
    job = Job(kind, settings, BUILT_IN[schedule])
    job_text(config, job)  # what cannot be written is refused before anything is made
    if is_repository(directory) and not config.exists():
        repository = Repository.open(directory)  # an init that was interrupted, or a copy
    else:
        make_way(directory)
        _spare(config)
        repository = Repository.create(directory, store)
    write_job(config, job)
    if kind == "file":
        for warning in containers.warnings(settings):
            output.warn(warning)
    if not session.quiet:
        what = f"{len(disks)} disks" if len(disks) > 1 else "1 disk"
        output.line(f"{repository.name}: {what}, store {repository.store} in {directory}")
        output.line(f"  {repository.store}: {_PRICE[repository.store]}")


def _spare(config: Path) -> None:
    """Nobody's file is replaced; UsageError. (Of a repository, `create` says that it is one.)"""
    from backyfs.store.repository import is_repository

    if os.path.lexists(config) and not is_repository(config.parent):
        raise UsageError(
            f"there is a file {config}, which init would replace",
            hint="name a directory for this VM alone, -b BASE/VM; or move the file away",
        )


def _settings(kind: str, sources: Sequence[str], vm: str) -> dict[str, Any]:
    """The `source` section of the job."""
    if kind == "file":
        return _of_files(sources)
    if kind == "ceph-rbd":
        return _of_images(sources)
    if kind == "flyingcircus":
        return {**_of_images(sources), "vm": vm}
    if len(sources) > 1:
        raise UsageError(f"a source of type {kind} is named by one word")
    return {"image": sources[0]}


def _of_files(sources: Sequence[str]) -> dict[str, Any]:
    if len(sources) == 1 and not _named(sources[0]):
        return {"filename": os.path.abspath(sources[0])}
    return {"disks": {n: os.path.abspath(path) for n, path in _by_name(sources).items()}}


def _of_images(sources: Sequence[str]) -> dict[str, Any]:
    from backyfs.ceph.spec import image_spec

    named = {name: image_spec(text) for name, text in _by_name(sources).items()}
    if len(sources) > 1 or _named(sources[0]):
        return {"images": {name: str(spec) for name, spec in named.items()}}
    return {key: value for key, value in named[DEFAULT_DISK]._asdict().items() if value}


def _by_name(sources: Sequence[str]) -> dict[str, str]:
    """What NAME=SOURCE words say; a SOURCE alone is that of the default disk."""
    disks: dict[str, str] = {}
    for text in sources:
        name, source = _named(text) or (DEFAULT_DISK, text)
        if name in disks:
            raise UsageError(
                f"two disks are called {name!r}", hint="name each one: root=SOURCE data=SOURCE"
            )
        disks[name] = source
    return disks


def _named(text: str) -> tuple[str, str] | None:
    """NAME=PATH in two parts; None for a path (also one with a = in it that exists)."""
    name, sign, path = text.partition("=")
    if not sign or "/" in name or os.path.exists(text):
        return None
    return disk_name(name), path
