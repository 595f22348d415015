"""How a VM's backups are: what its repository alone tells, without reading any stored data.

Looks at records, states, the quarantine's names and the kernel's table of locks; takes no lock and
opens no map. What costs more is asked only where something is known to be wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any

from backyfs.config.schedule import Schedule
from backyfs.engine.retention import Candidate, Decision, decide
from backyfs.engine.scrub_position import position
from backyfs.errors import BackyfsError, Corrupt, Unsupported
from backyfs.model import Consistency, Trust
from backyfs.source.quiescing import note
from backyfs.store import lock
from backyfs.store.layout import RECORD_SUFFIX
from backyfs.store.record import Record, State, parse_time
from backyfs.store.repository import Repository, may_be_repository

SLA_FACTOR = 1.5
"""A job is late when its newest good revision is older than so many of its shortest intervals."""
CLOCK_SKEW = timedelta(minutes=5)
"""A time this far ahead of the clock is no rounding: one of the two clocks was wrong."""
OVERSTAY = timedelta(hours=24)
"""How long an expired revision may stay because somebody reads it."""
UNPURGED = timedelta(hours=72)
"""How long one may stay for no reason at all."""


class Severity(IntEnum):
    """As the exit codes of monitoring plug-ins; UNKNOWN is what could not be looked at."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """Something an operator should know. `job` "" = it is about the whole site.

    `kind` is a word to choose by: late, torn, distrusted, mismatch, damaged, unreadable,
    unverified, clock, readers, unpurged, frozen, repository, status, disk, unmanaged.
    """

    severity: Severity
    kind: str
    job: str
    text: str


@dataclass(frozen=True, slots=True)
class Expected:
    """What a VM should have: the rules of its schedule; times in seconds.

    `known_since`: when the job was first seen, for one that never had a backup: the first time
    that is one and not in the future, which a wrong clock may have made of it.
    `verify_interval_s`: how old the last look at its data may get (0 = any age). `told`: the row
    of the scheduler's status about it, if there is one: for details, never for the judgement.
    `problem`: why its own configuration cannot be read; the schedule is a guess then.
    """

    name: str
    path: Path
    schedule: Schedule
    tenant: str = ""
    verify_interval_s: int = 0
    known_since: Sequence[datetime | None] = ()
    told: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def sla_s(self) -> float:
        """How old the newest good revision may be."""
        return SLA_FACTOR * min(rule.interval_s for rule in self.schedule.values())


@dataclass(slots=True)
class JobHealth:
    """What was found of one job. Times are UTC; None = never, or not known.

    `good`: the newest revision one may rely on: not torn, distrusted or damaged, nor of a time
    that is still to come. `attempted`: the newest of whatever kind. `running`: since when a
    backup is being made. `by_trust`: revisions by trust. `bad_frames`: in quarantine. `reports`:
    of revisions that differ from their source.
    `checked`: when stored data was last read and compared. `found`: the kinds of what was found,
    of findings that are then ignored, too.
    """

    expected: Expected
    good: Record | None = None
    newest: Record | None = None
    running: datetime | None = None
    checked: datetime | None = None
    by_trust: dict[Trust, int] = field(default_factory=lambda: dict.fromkeys(Trust, 0))
    bad_frames: int = 0
    reports: int = 0
    findings: list[Finding] = field(default_factory=list)
    found: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The job's name."""
        return self.expected.name

    @property
    def late(self) -> bool:
        """Whether it is not within its SLA."""
        return "late" in self.found

    @property
    def known(self) -> bool:
        """Whether it could be told."""
        return "repository" not in self.found

    def age(self, now: datetime) -> timedelta | None:
        """Of the newest good revision."""
        return max(now - self.good.time, timedelta(0)) if self.good else None

    def find(self, severity: Severity, kind: str, text: str) -> None:
        """Note a finding."""
        self.findings.append(Finding(severity, kind, self.name, text))
        self.found.add(kind)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A revision with all that is judged of it."""

    record: Record
    state: State
    damaged: bool

    @property
    def candidate(self) -> Candidate:
        """As retention sees it."""
        return Candidate.of(self.record, self.state, damaged=self.damaged)

    @property
    def good(self) -> bool:
        """Whether one could rely on it alone."""
        return self.candidate.good


def examine(expected: Expected, now: datetime, held: lock.Held) -> JobHealth:
    """Look at one VM. Never raises for what is wrong with it: that is a finding."""
    health = JobHealth(expected)
    if expected.problem:
        health.find(Severity.UNKNOWN, "repository", expected.problem)
    try:
        repository = Repository.open(expected.path)
        _examine(health, repository, now, held)
    except PermissionError as exc:
        health.find(Severity.UNKNOWN, "repository", f"may not be read: {exc.filename}")
    except (BackyfsError, OSError) as exc:
        if may_be_repository(expected.path):
            health.find(Severity.CRITICAL, "repository", f"cannot be read: {exc}")
        else:
            _judge_age(health, now, created=None)
    return health


def _examine(health: JobHealth, repository: Repository, now: datetime, held: lock.Held) -> None:
    # Listed after the records: what was published meanwhile is whole, what was removed is not here.
    entries = repository.ledger.entries()
    there = {path.name for path in repository.layout.revisions.iterdir()}
    entries = {i: entry for i, entry in entries.items() if f"{i}{RECORD_SUFFIX}" in there}
    records = sorted((r for r in entries.values() if isinstance(r, Record)), key=lambda r: r.seq)
    health.newest = records[-1] if records else None
    if held.exclusively(repository.layout.lock):
        at_work = lock.begun(repository.layout.lock)
        health.running = at_work[1] if at_work else None
    health.bad_frames = len(repository.quarantine.bad())
    damaged = set(repository.damage()) if health.bad_frames else _incomplete(records, there)
    damaged |= position(repository).damaged
    seen = [_see(repository, record, there, record.id in damaged) for record in records]
    for one in seen:
        health.by_trust[one.state.trust] += 1
    _judge_guest(health, note.place(repository.path), held)
    _judge_clock(health, records, now)
    _judge_revisions(health, seen, now)
    _judge_reports(health, repository.reports.revisions())
    _judge_age(health, now, created=_time(repository.identity.created))
    for revision in sorted(entries.keys() - {record.id for record in records}):
        health.find(Severity.WARNING, "unreadable", f"the record of {revision} cannot be read")
    _judge_data(health, repository, seen, now)
    _judge_expiry(health, repository, seen, now, held)


def _time(text: str) -> datetime | None:
    try:
        return parse_time(text)
    except ValueError:
        return None


def _see(repository: Repository, record: Record, there: Collection[str], damaged: bool) -> _Seen:
    """Most revisions have no state of their own: nothing is opened for those."""
    if repository.layout.state(record.id).name not in there:
        return _Seen(record, State.of(record), damaged)
    try:
        return _Seen(record, repository.known_state(record), damaged)
    except (Corrupt, Unsupported):
        return _Seen(record, repository.state(record), damaged=True)


def _incomplete(records: Sequence[Record], there: Collection[str]) -> set[str]:
    """Revisions that name a file which is not there."""
    return {
        record.id
        for record in records
        for disk in record.disks.values()
        if not all(name in there for name in disk.files)
    }


def _judge_guest(health: JobHealth, left: Path, held: lock.Held) -> None:
    """A guest may be frozen, and no process sees to it."""
    if left.exists() and not held.exclusively(left):
        text = f"a killed backup left the guest frozen: run backyfs -b {left.parent} thaw"
        health.find(Severity.CRITICAL, "frozen", text)


def _judge_clock(health: JobHealth, records: Sequence[Record], now: datetime) -> None:
    ahead = [record for record in records if record.time > now + CLOCK_SKEW]
    if ahead:
        text = f"{_count(ahead)} dated in the future, such as {ahead[-1].id}: a clock was wrong"
        health.find(Severity.WARNING, "clock", text)
    elif len(records) > 1 and records[-1].time < records[-2].time - CLOCK_SKEW:
        text = f"{records[-1].id} is dated before the one made earlier: the clock went back"
        health.find(Severity.WARNING, "clock", text)


def _judge_revisions(health: JobHealth, seen: Sequence[_Seen], now: datetime) -> None:
    good = [c for c in seen if c.good and c.record.time <= now + CLOCK_SKEW]
    health.good = good[-1].record if good else None
    after = health.good.seq if health.good else -1
    torn = [
        c.record for c in seen if c.record.seq > after and c.record.consistency is Consistency.TORN
    ]
    if torn:
        text = f"the newest {_count(torn)} torn: the source changed while it was read"
        health.find(Severity.WARNING, "torn", text)
    distrusted = [c.record for c in seen if c.state.trust is Trust.DISTRUSTED]
    if distrusted:
        text = f"{_count(distrusted)} distrusted, the newest is {distrusted[-1].id}"
        health.find(Severity.WARNING, "distrusted", text)
    damaged = [c.record for c in seen if c.damaged]
    if damaged or health.bad_frames:
        frames = f" ({health.bad_frames} bad frames in quarantine)" if health.bad_frames else ""
        health.find(Severity.WARNING, "damaged", f"{_count(damaged)} damaged{frames}")


def _judge_reports(health: JobHealth, revisions: Sequence[str]) -> None:
    """Evidence stays until an operator removes it, whatever became of the revisions."""
    health.reports = len(revisions)
    if revisions:
        are = "revisions were" if len(revisions) > 1 else "revision was"
        text = f"{len(revisions)} {are} found to differ from the source, the last {revisions[-1]}"
        health.find(Severity.WARNING, "mismatch", f"{text}: see reports/")


def _judge_age(health: JobHealth, now: datetime, created: datetime | None) -> None:
    """Late: nothing good within the SLA; less bad while a backup is at it for less than that."""
    sla = timedelta(seconds=health.expected.sla_s)
    age = health.age(now)
    if age is None:
        known = _known_since([created, *health.expected.known_since], now)
        if known is not None and now - known <= sla:
            return  # its first slot is still to come
        text = "has never had a good backup"
        text += f", and is known for {in_words(now - known)}" if known else ""
    elif age <= sla:
        return
    else:
        text = f"last good backup {in_words(age)} ago, allowed are {in_words(sla)}"
    if reason := health.expected.told.get("last_reason"):
        text += f"; the last attempt failed: {reason}"
    if health.running is not None and now - health.running <= sla:
        text += f"; a backup is running for {in_words(max(now - health.running, timedelta(0)))}"
        health.find(Severity.WARNING, "late", text)
    else:
        health.find(Severity.CRITICAL, "late", text)


def _known_since(times: Sequence[datetime | None], now: datetime) -> datetime | None:
    """The first of these times that can be: None when there is none."""
    return next((time for time in times if time and time <= now + CLOCK_SKEW), None)


def _judge_data(
    health: JobHealth, repository: Repository, seen: Sequence[_Seen], now: datetime
) -> None:
    """When the data was last read; a backup that verified itself has read its own."""
    times = [c.state.verified_at for c in seen if c.state.verified_at]
    finished = position(repository).finished
    times += [finished] if finished else []
    health.checked = max(times, default=None)
    interval = timedelta(seconds=health.expected.verify_interval_s)
    if not interval or not seen:
        return
    since = health.checked or seen[0].record.time
    if now - since > 2 * interval:
        text = f"stored data was not verified for {in_words(now - since)}"
        health.find(Severity.WARNING, "unverified", text)


def _judge_expiry(
    health: JobHealth,
    repository: Repository,
    seen: Sequence[_Seen],
    now: datetime,
    held: lock.Held,
) -> None:
    """Revisions that should have gone a while ago: because of readers, or without a reason."""
    if not any(decision.remove for decision in _decided(now, health, seen)):
        return
    for limit, kind in ((OVERSTAY, "readers"), (UNPURGED, "unpurged")):
        then = now - limit
        known = [c for c in seen if c.record.time <= then]
        due = {d.revision for d in _decided(then, health, known) if d.remove}
        over = [c.record for c in seen if c.record.id in due]
        if kind == "readers":
            over = [record for record in over if _is_read(repository, record, held)]
            why = "kept by readers"
        else:
            over = [record for record in over if not _is_read(repository, record, held)]
            why = "not purged"
        if over:
            text = f"{_count(over)} expired for more than {in_words(limit)}, but {why}"
            health.find(Severity.WARNING, kind, text)


def _decided(now: datetime, health: JobHealth, seen: Sequence[_Seen]) -> list[Decision]:
    return decide(now, health.expected.schedule, [one.candidate for one in seen])


def _is_read(repository: Repository, record: Record, held: lock.Held) -> bool:
    paths = map(repository.format.lockable, record.disks.values())
    return any(held.shared(path) for path in paths if path is not None)


def _count(records: Sequence[Record]) -> str:
    return f"{len(records)} revision{'s are' if len(records) != 1 else ' is'}"


def in_words(span: timedelta) -> str:
    """A length of time for people, in its largest unit: `12 min`, `36 h`, `5 d`."""
    seconds = max(0, round(span.total_seconds()))
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 2 * 3600:
        return f"{seconds // 60} min"
    if seconds < 3 * 86_400:
        return f"{seconds // 3600} h"
    return f"{seconds // 86_400} d"
