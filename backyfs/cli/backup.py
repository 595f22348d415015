"""backyfs backup: back up the VM's disks as a new revision."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from backyfs.cli import describe, options, output
from backyfs.cli.completing import complete_tags
from backyfs.cli.session import Session
from backyfs.config import Job, Schedule, read_job
from backyfs.config.quiesce import Policy, Quiesce
from backyfs.errors import ConfigError, Mismatch, UsageError
from backyfs.model import DEFAULT_DISK, Consistency, Extent, Trust, disk_name, is_name
from backyfs.source.contract import Source
from backyfs.store.record import Record, State
from backyfs.store.repository import Repository

if TYPE_CHECKING:
    from backyfs.engine.sampling import Sampling


@click.command()
@click.argument("tags", nargs=-1, shell_complete=complete_tags)
@click.option("-f", "--force", is_flag=True, help="Accept tags that are not in the schedule.")
@click.option(
    "--no-verify",
    is_flag=True,
    help="Do not read back what was stored nor the source again (recorded in the revision).",
)
@options.wait
@options.progress
@click.option(
    "--changes",
    metavar="[DISK=]FILE",
    multiple=True,
    help="JSON list of all extents that may differ from the newest revision, as printed by "
    "`rbd diff --format json`. It is believed: what is not listed is not read.",
)
@click.option(
    "--rate-limit",
    metavar="BYTES",
    type=options.SIZE,
    help="Read no more than so many bytes per second from the source: 50M (default: the job's).",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Fail (exit 13) where the guest should be frozen and was not, instead of a warning.",
)
@options.as_json
@click.pass_obj
def command(
    session: Session,
    tags: tuple[str, ...],
    force: bool,
    no_verify: bool,
    wait_s: float,
    progress: bool | None,
    changes: tuple[str, ...],
    rate_limit: int | None,
    strict: bool,
    as_json: bool,
) -> None:
    """Back up all disks of the VM as one new revision, or none of them.

    TAGS say why the revision is kept (several, or one list with commas): names from the schedule,
    which expire by its rules, or `manual:WHY`, which never expires. Without TAGS: those of the
    schedule that are due, or if none is, the most frequent one.

    A second backup of the same VM at the same time exits 75, or waits with --wait. A source that
    changes while it is read gives a revision of consistency "torn", with a warning. If what was
    not read, because it had not changed, turns out to differ (a sample of it is compared), the
    revision is distrusted, evidence is kept in DIR/reports, and the exit code is 12: back up again,
    then everything is read.

    A guest that the job would rather have frozen (`quiesce`) and that was not is warned of.
    """
    from backyfs.cli.decoding import decoding
    from backyfs.cli.running import run
    from backyfs.cli.showing import showing
    from backyfs.engine.backup import back_up

    repository = session.repository()
    job = read_job(repository.path / "config")
    names = _split(tags) or due(job.schedule, repository, datetime.now(UTC))
    _refuse_vm_names(repository, names, job.schedule, force)
    lists = _change_lists(repository, changes)
    with nullcontext() if no_verify else decoding(repository):
        source = _source(session, repository, job, strict, rate_limit)
        with session.logging(repository), showing(session, progress, as_json=as_json) as shown:
            record = run(
                back_up,
                repository,
                source,
                tags=names,
                schedule=job.schedule,
                force=force,
                verify=not no_verify,
                sampling=None if no_verify else _sampling(job),
                changes=lists,
                wait_s=wait_s,
                progress=shown,
            )
    _report(session, repository, record, as_json)
    _fail_if_distrusted(repository, record)


def _source(
    session: Session, repository: Repository, job: Job, strict: bool, rate_limit: int | None
) -> Source:
    from backyfs.source import registry
    from backyfs.source.throttle import Rate, ThrottledSource

    source = registry.make(job.source_type, {**job.settings, **_secrets(session, repository, job)})
    source = _quiesced(source, repository, job, strict)
    limit = rate_limit or job.rate_limit
    return ThrottledSource(source, Rate(limit)) if limit else source


def _sampling(job: Job) -> Sampling:
    from backyfs.engine.sampling import Sampling  # not without verification

    return Sampling(job.sample_percent / 100, job.sample_budget_s)


def _quiesced(source: Source, repository: Repository, job: Job, strict: bool) -> Source:
    """The source with its guest frozen meanwhile, if the job says how; and thawed first, if a crash
    left it frozen.
    """
    from backyfs.source.quiescing import note

    directory, quiesce = repository.path, job.quiesce
    if quiesce is None and not strict and not note.place(directory).exists():
        return source
    from backyfs.source.quiescing.leftover import refuse_foreign
    from backyfs.source.quiescing.quiesced import QuiescedSource

    if quiesce is not None and quiesce.freeze_command and quiesce.policy is not Policy.NEVER:
        refuse_foreign(directory / "config", os.stat(directory / "config"))
    never = Quiesce(Policy.NEVER)
    return QuiescedSource(source, repository.name, directory, quiesce or never, strict=strict)


def _secrets(session: Session, repository: Repository, job: Job) -> dict[str, Any]:
    """Settings that the job's file leaves out, from the configuration of all jobs. ConfigError."""
    if not job.secrets:
        return {}
    known = session.site().jobs.get(repository.name)
    found = {name: known.job.settings.get(name) for name in job.secrets} if known else {}
    if missing := [name for name in job.secrets if found.get(name) is None]:
        raise ConfigError(
            f"{session.config}: the job {repository.name!r} has no {missing[0]!r}",
            hint="it is left out of the VM's directory; name the configuration with -c",
        )
    return found


def _report(session: Session, repository: Repository, record: Record, as_json: bool) -> None:
    if record.consistency is Consistency.TORN:
        output.warn(f"{record.id} is torn: {record.reason}", as_json=as_json)
    if record.quiescing.result == "failed":
        output.warn(f"{record.id}: {record.reason}", as_json=as_json)
    if as_json:
        value = describe.revision(record, State.of(record))
        output.json_line({"message_type": "summary", "vm": repository.name, **value})
    elif not session.quiet:
        stats = record.stats
        output.line(
            f"{record.id}: read {output.size(stats.read)}, changed {output.size(stats.changed)}, "
            f"stored {output.size(stats.stored)} in {output.duration(stats.seconds)}; "
            f"{record.consistency}, {_verified(record)}; "
            f"{', '.join(record.tags) or 'no tags'}"
        )


def _verified(record: Record) -> str:
    if record.verification == "sample":
        return "verified by sample" if record.stats.sampled_frames else "verified where read"
    return "verified" if record.verification == "full" else "not verified"


def _fail_if_distrusted(repository: Repository, record: Record) -> None:
    if record.trust is Trust.DISTRUSTED:
        raise Mismatch(
            f"{repository.name}: {record.id} is distrusted: {record.reason}",
            hint="back up again, which reads everything; the evidence: "
            f"{repository.reports.path(record.id)}",
        )


def _split(tags: Iterable[str]) -> list[str]:
    return [part.strip() for tag in tags for part in tag.split(",") if part.strip()]


def due(schedule: Schedule, repository: Repository, now: datetime) -> list[str]:
    """The tags a good revision of which is missing for an interval; at least the most frequent.

    Half of the shortest interval early counts as due, so that a nightly job that starts a little
    earlier than a week ago still makes the weekly one.
    """
    if not schedule:
        return []
    shortest = min(rule.interval_s for rule in schedule.values())
    newest: dict[str, datetime] = {}
    for record in repository.revisions():
        state = repository.state(record)
        if record.consistency is not Consistency.TORN and state.trust is not Trust.DISTRUSTED:
            newest |= dict.fromkeys(state.tags, record.time)
    found = [
        tag
        for tag, rule in schedule.items()
        if tag not in newest
        or (now - newest[tag]).total_seconds() >= rule.interval_s - shortest / 2
    ]
    return found or [tag for tag, rule in schedule.items() if rule.interval_s == shortest][:1]


def _refuse_vm_names(
    repository: Repository, tags: Iterable[str], schedule: Schedule, force: bool
) -> None:
    """UsageError for what was meant as the name of another VM."""
    from backyfs.store.repository import is_repository

    for tag in tags:
        if tag in schedule or force or not is_name(tag):
            continue
        for base in (repository.path.parent, repository.path):
            if is_repository(base / tag):
                raise UsageError(
                    f"{tag!r} is no tag of the schedule, but a VM",
                    hint=f"did you mean: backyfs -b {base / tag} backup",
                )


def _change_lists(
    repository: Repository, changes: Sequence[str]
) -> Mapping[str, Sequence[Extent]] | None:
    """The change list of each disk one is given for."""
    from backyfs.source.changes import parse

    if not changes:
        return None
    if not repository.revisions():
        raise UsageError(
            "--changes needs a revision that the list is relative to",
            hint="make the first backup without it",
        )
    lists: dict[str, Sequence[Extent]] = {}
    for text in changes:
        name, path = _disk_and_path(text)
        if name in lists:
            raise UsageError(f"two change lists for the disk {name!r}")
        try:
            lists[name] = parse(Path(path).read_bytes(), path)
        except OSError as exc:
            raise UsageError(f"cannot read the change list {path}: {exc.strerror}") from exc
    return lists


def _disk_and_path(text: str) -> tuple[str, str]:
    name, sign, path = text.partition("=")
    if not sign or "/" in name or os.path.exists(text):
        return DEFAULT_DISK, text
    return disk_name(name), path
