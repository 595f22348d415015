"""The configuration of all jobs, /etc/backy.conf: one file, and those it includes.

Backy's keys mean what they mean there; further ones are ours. Everything that is wrong in any of
the files is reported at once, with file, line and column, and nothing is used while anything is
wrong. Sections of Backy's that have no meaning here (`api`, `peers`) are accepted and warned of.

    include: /etc/backy.d/*.conf
    global: {base-dir: /srv/backy, worker-limit: 3}
    schedules: {frequent: {quarterly: {interval: 15m, keep: 96}}}
    jobs: {web01: {source: {type: file, filename: /dev/vg/web01}, schedule: daily}}
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from backyfs.config.document import Document, Node, load
from backyfs.config.job import OPTIONS, Job, job_of
from backyfs.config.keys import (
    ADDRESSES,
    INTERVAL,
    INTERVAL_OR_NEVER,
    PATH,
    PORT,
    TEXT,
    Key,
    choice,
    integer,
    read_keys,
    read_section,
)
from backyfs.config.schedule import BUILT_IN, Schedule, read_schedule
from backyfs.errors import ConfigError, Problem
from backyfs.model import vm_name

SIZE_MAX = 32 << 20
"""Bytes of the largest file that is read at all; 10,000 jobs take about 2 MiB."""

FILES_MAX = 10_000
"""Files that may be included."""

DEFAULT_PATH = Path("/etc/backy.conf")

CheckSource = Callable[[str, Mapping[str, Any]], object]
"""Raises a BackyfsError when there is no such source type or its settings are wrong."""

_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Maintenance:
    """What is done to repositories besides backups; intervals in seconds, NEVER (0) = not at all.

    `worker_limit` commands run at once. After each backup the VM is purged; `purge_interval_s`
    is for VMs whose backups fail. A scrub runs for `scrub_budget_s` and goes on the next time.
    """

    worker_limit: int = 1
    purge_interval_s: int = _DAY
    verify_interval_s: int = 30 * _DAY
    scrub_interval_s: int = 7 * _DAY
    scrub_budget_s: int = 600


@dataclass(frozen=True, slots=True)
class Settings:
    """The section `global`, with defaults; a path is absolute.

    `worker_limit` backups run at once in each of the pools fast and slow. `telnet_port` 0: no
    console. `backup_completed_callback` "": none.
    """

    base_dir: Path = Path("/srv/backy")
    worker_limit: int = 1
    status_file: Path | None = None
    status_interval_s: int = 30
    telnet_addrs: tuple[str, ...] = ("127.0.0.1", "::1")
    telnet_port: int = 6023
    backup_completed_callback: str = ""
    retry_first_s: int = 120
    retry_longest_s: int = 6 * 3600
    stop_timeout_s: int = 300

    @property
    def status_path(self) -> Path:
        """Where the daemon writes its status."""
        return self.status_file or self.base_dir / "status"

    @property
    def lock_path(self) -> Path:
        """Held while a daemon runs; the same as Backy's, so that only one of them does."""
        return self.base_dir / ".lock"


@dataclass(frozen=True, slots=True)
class SiteJob:
    """One VM: what its directory's own file says (`job`), and what only the site knows.

    `store`: format of a repository that is yet to be made (auto, packs, cow). `tenant`: whom its
    storage is billed to ("" = nobody). `schedule_name`: "" for one written out at the job.
    """

    name: str
    job: Job
    schedule_name: str = "daily"
    store: str = "auto"
    tenant: str = ""

    @property
    def schedule(self) -> Schedule:
        """The rules by tag; never empty."""
        return self.job.schedule


@dataclass(frozen=True, slots=True)
class Site:
    """A configuration without problems. `warnings`: what is accepted but has no meaning here."""

    path: Path
    settings: Settings = field(default_factory=Settings)
    maintenance: Maintenance = field(default_factory=Maintenance)
    schedules: Mapping[str, Schedule] = field(default_factory=lambda: BUILT_IN)
    jobs: Mapping[str, SiteJob] = field(default_factory=dict)
    warnings: tuple[Problem, ...] = ()

    def directory(self, job: str) -> Path:
        """The directory of a job's VM."""
        return self.settings.base_dir / job


GLOBAL: Mapping[str, Key] = {
    "base-dir": Key(PATH, "base_dir", "directory with one sub-directory per job", "/srv/backy"),
    "worker-limit": Key(
        integer(1), "worker_limit", "backups at once in each of the pools fast and slow", "1"
    ),
    "status-file": Key(
        PATH, "status_file", "where the daemon writes its status", "{base-dir}/status"
    ),
    "status-interval": Key(INTERVAL, "status_interval_s", "how often it does so", "30s"),
    "telnet-addrs": Key(
        ADDRESSES, "telnet_addrs", "addresses of the console, separated by commas", "127.0.0.1, ::1"
    ),
    "telnet-port": Key(PORT, "telnet_port", "port of the console; 0: no console", "6023"),
    "backup-completed-callback": Key(
        TEXT,
        "backup_completed_callback",
        "command run after each backup: argument = job, standard input = `status --yaml`",
        "none",
    ),
    "retry-first": Key(INTERVAL, "retry_first_s", "wait after a first failed backup", "2m"),
    "retry-longest": Key(
        INTERVAL, "retry_longest_s", "longest wait, after more and more failed ones", "6h"
    ),
    "stop-timeout": Key(
        INTERVAL, "stop_timeout_s", "how long running backups may go on after SIGTERM", "5m"
    ),
}

MAINTENANCE: Mapping[str, Key] = {
    "worker-limit": Key(integer(1), "worker_limit", "maintenance commands at once", "1"),
    "purge-interval": Key(
        INTERVAL_OR_NEVER, "purge_interval_s", "purge at least so often (also after backups)", "1d"
    ),
    "verify-interval": Key(
        INTERVAL_OR_NEVER, "verify_interval_s", "verify the newest revision so often", "30d"
    ),
    "scrub-interval": Key(
        INTERVAL_OR_NEVER, "scrub_interval_s", "go on with the scrub of a VM so often", "7d"
    ),
    "scrub-budget": Key(INTERVAL, "scrub_budget_s", "how long one scrub may take", "10m"),
}

JOB_EXTRA: Mapping[str, Key] = {
    "store": Key(
        choice("auto", "packs", "cow"), "store", "format of a new repository of this VM", "auto"
    ),
    "tenant": Key(TEXT, "tenant", "whom the storage is billed to", "none"),
}

JOB_KEYS = ("source", "schedule", *OPTIONS, *JOB_EXTRA)
SECTIONS = ("include", "global", "maintenance", "schedules", "jobs", "api", "peers")
_SECTIONS_INCLUDED = ("schedules", "jobs")
_NOT_USED = ("api", "peers")


def read_site(path: Path, *, check_source: CheckSource | None = None) -> Site:
    """The configuration in the file `path` and those it includes.

    ConfigError has all problems of all files. `check_source` looks at each job's source.
    """
    reader = _Reader(path, check_source)
    try:
        reader.read()
    except ConfigError as exc:
        if not exc.problems:
            raise
        reader.problems.extend(exc.problems)
    if reader.problems:
        raise ConfigError.of(reader.problems, str(path))
    return reader.site()


class _Reader:
    """Collects what the files say, and what is wrong in them."""

    def __init__(self, path: Path, check_source: CheckSource | None) -> None:
        self.problems: list[Problem] = []
        self._path, self._check_source = path, check_source
        self._settings: dict[str, Any] = {}
        self._maintenance: dict[str, Any] = {}
        self._schedules: dict[str, Schedule] = dict(BUILT_IN)
        self._jobs: dict[str, SiteJob] = {}
        self._places: dict[tuple[str, str], str] = {}
        self._warnings: list[Problem] = []

    def read(self) -> None:
        """Read all files: schedules of all of them first, because a job may name any."""
        main = load(self._path, bytes_max=SIZE_MAX, what="configuration", hint=_HOW_TO_BEGIN)
        sections = main.mapping(main.root, "the file", SECTIONS)
        if "global" in sections:
            self._settings = read_section(main, sections["global"], "global", GLOBAL)
        if "maintenance" in sections:
            node = sections["maintenance"]
            self._maintenance = read_section(main, node, "maintenance", MAINTENANCE)
        for name in _NOT_USED:
            if name in sections:
                self._warnings.append(main.at(sections[name], f"{name!r} is not used here"))
        parts = [(main, sections), *self._included(main, sections)]
        for document, found in parts:
            if "schedules" in found:
                self._read_schedules(document, found["schedules"])
        for document, found in parts:
            if "jobs" in found:
                self._read_jobs(document, found["jobs"])
            self.problems.extend(document.problems)

    def site(self) -> Site:
        """What was read."""
        return Site(
            self._path,
            Settings(**self._settings),
            Maintenance(**self._maintenance),
            MappingProxyType(self._schedules),
            MappingProxyType(self._jobs),
            tuple(self._warnings),
        )

    def _included(
        self, main: Document, sections: Mapping[str, Node]
    ) -> list[tuple[Document, Mapping[str, Node]]]:
        if "include" not in sections:
            return []
        node = sections["include"]
        parts: list[tuple[Document, Mapping[str, Node]]] = []
        for item in node.value if node.id == "sequence" else [node]:
            for path in self._matching(main, item):
                try:
                    document = load(path, bytes_max=SIZE_MAX, what="configuration")
                except ConfigError as exc:
                    self.problems.extend(exc.problems or [main.at(item, exc.message)])
                    continue
                found = document.mapping(document.root, "an included file", _SECTIONS_INCLUDED)
                parts.append((document, found))
        return parts

    def _matching(self, main: Document, node: Node) -> list[Path]:
        """Files a pattern names, sorted; a plain path must be there, a pattern may match none."""
        text = main.text(node, "include")
        if text is None:
            return []
        pattern = os.path.join(glob.escape(str(self._path.absolute().parent)), text)
        if not glob.has_magic(text):
            return [self._path.absolute().parent / text]
        found = sorted(Path(name) for name in glob.glob(pattern))
        if len(found) > FILES_MAX:
            main.problem(node, f"{text!r} names more than {FILES_MAX} files")
            return []
        return found

    def _read_schedules(self, document: Document, node: Node) -> None:
        for name, rules in _entries(document, node, "schedules"):
            if self._is_new(document, rules, "schedule", name):
                if rules.id != "mapping":
                    document.problem(rules, f"the schedule {name!r} must be a mapping of tags")
                    continue
                self._schedules[name] = read_schedule(document, rules, {})

    def _read_jobs(self, document: Document, node: Node) -> None:
        for name, value in _entries(document, node, "jobs"):
            if document.accept(value, vm_name, name) and self._is_new(document, value, "job", name):
                self._jobs[name] = self._job(document, value, name)

    def _job(self, document: Document, node: Node, name: str) -> SiteJob:
        settings = Settings(**self._settings)
        if settings.base_dir / name == settings.status_path:
            text = f"the directory of the job {name!r} has the name of the status file"
            document.problem(node, f"{text}: rename the job, or give global `status-file`")
        keys = document.mapping(node, f"the job {name!r}", JOB_KEYS)
        job = job_of(document, node, keys, self._schedules)
        if "source" in keys and job.source_type and self._check_source:
            check = self._check_source
            document.accept(keys["source"], lambda job: check(job.source_type, job.settings), job)
        extra = read_keys(document, keys, JOB_EXTRA)
        return SiteJob(name, job, _schedule_name(keys.get("schedule")), **extra)

    def _is_new(self, document: Document, node: Node, kind: str, name: str) -> bool:
        """Note where a job or schedule stands; a second one of the name is a problem."""
        first = self._places.setdefault((kind, name), str(document.at(node, "")).rstrip(": "))
        here = str(document.at(node, "")).rstrip(": ")
        if first != here:
            document.problem(node, f"the {kind} {name!r} is here a second time, first at {first}")
        return first == here


def _entries(document: Document, node: Node, what: str) -> list[tuple[str, Node]]:
    """What is in a section; nothing at all (`jobs:`) is an empty one."""
    if node.id == "scalar" and not node.value:
        return []
    return list(document.mapping(node, what).items())


def _schedule_name(node: Node | None) -> str:
    if node is None:
        return "daily"
    return str(node.value) if node.id == "scalar" else ""


_HOW_TO_BEGIN = "name one with -c, or write it: docs/operations.md shows how"
