"""The file `config` in a VM's directory: what is backed up, and on which schedule.

The keys are Backy's, so that a file it wrote can be used. The file travels with the directory;
therefore it never holds a secret, and `write_job` refuses to write one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backyfs.config.document import Document, Node, load
from backyfs.config.interval import format_interval
from backyfs.config.keys import INTERVAL, SHARE, SIZE, Key, read_keys
from backyfs.config.quiesce import QUIESCE, Quiesce
from backyfs.config.schedule import BUILT_IN, DAILY, Schedule, read_schedule
from backyfs.config.share import format_percent
from backyfs.config.size import format_size
from backyfs.errors import ConfigError, NoSpace

SIZE_MAX = 1 << 20
"""Bytes of the largest file that is read at all."""

_SECRET = re.compile(r"(password|passphrase|secret|token|credential)s?\Z", re.IGNORECASE)
_HEADER = "# What is backed up here, and how often. See: backyfs init --help\n"


class Job(NamedTuple):
    """A VM's source and schedule; `settings` are the source's own keys, as plain values.

    `rate_limit` bounds what a backup reads from the source, in bytes per second (0: no bound).
    `sample_percent` of what a backup did not read is read to verify it, for `sample_budget_s`
    seconds at most. `quiesce`: how the guest is frozen for a snapshot (None: it is not).
    `secrets`: settings that are left out here and stand in the site's configuration only.
    """

    source_type: str
    settings: Mapping[str, Any]
    schedule: Schedule = DAILY
    rate_limit: int = 0
    secrets: tuple[str, ...] = ()
    sample_percent: float = 1.0
    sample_budget_s: int = 300
    quiesce: Quiesce | None = None

    def without_secrets(self) -> Job:
        """The job as its file may hold it: of settings that look like secrets, only the names."""
        names = tuple(sorted(key for key in self.settings if _SECRET.search(key)))
        settings = {key: value for key, value in self.settings.items() if key not in names}
        return self._replace(settings=settings, secrets=names)


OPTIONS: Mapping[str, Key] = {
    "rate-limit": Key(
        SIZE, "rate_limit", "bytes per second a backup reads from the source", "none"
    ),
    "sample-share": Key(
        SHARE,
        "sample_percent",
        "share of what a backup did not read that is read and compared after it",
        "1%",
    ),
    "sample-budget": Key(INTERVAL, "sample_budget_s", "how long that may take", "5m"),
    "quiesce": Key(QUIESCE, "quiesce", "how the guest is frozen for a snapshot", "it is not"),
}
"""The keys of a job that its own file may have, too, beside source and schedule."""

_KEYS = ("source", "schedule", *OPTIONS, "secrets", "path")


def read_job(path: Path) -> Job:
    """The job in the file `path`; ConfigError names everything that is wrong with it."""
    hint = "nothing says what to back up; run: backyfs init"
    with contextlib.suppress(OSError):  # reading it says why
        if path.is_fifo():  # to open it would wait for somebody who writes
            raise ConfigError(f"cannot read {path}: it is not a file")
    return _job(load(path, bytes_max=SIZE_MAX, what="job", hint=hint))


def parse_job(text: str, name: str) -> Job:
    """The job in `text`, that of the file `name`; ConfigError."""
    return _job(Document(text, name))


def _job(document: Document) -> Job:
    keys = document.mapping(document.root, "the file", _KEYS)
    job = job_of(document, document.root, keys, BUILT_IN)
    secrets = document.plain(keys["secrets"]) if "secrets" in keys else []
    if not isinstance(secrets, list) or not all(isinstance(name, str) for name in secrets):
        document.problem(keys["secrets"], "secrets must be a list of names")
    document.finish()
    return job._replace(secrets=tuple(secrets))


def job_of(
    document: Document,
    node: Node,
    keys: Mapping[str, Node],
    schedules: Mapping[str, Schedule],
) -> Job:
    """The job in the mapping `node`, of which `keys` are the values; problems are noted."""
    source_type, settings = _source(document, node, keys)
    schedule: Schedule = DAILY
    if "schedule" in keys:
        schedule = read_schedule(document, keys["schedule"], schedules)
    return Job(source_type, settings, schedule, **read_keys(document, keys, OPTIONS))


def _source(document: Document, node: Node, keys: Mapping[str, Node]) -> tuple[str, dict[str, Any]]:
    """Type and settings. Backy's `backend` chose its store: that is not the source's matter."""
    if "source" not in keys:
        if node.id == "mapping":
            document.problem(node, "the key 'source' is missing")
        return "", {}
    found = document.mapping(keys["source"], "source")
    if "type" not in found and keys["source"].id == "mapping":
        document.problem(keys["source"], "the source has no 'type'")
    kind = document.text(found["type"], "type") if "type" in found else None
    settings = {
        key: document.plain(node) for key, node in found.items() if key not in ("type", "backend")
    }
    return kind or "", settings


def write_job(path: Path, job: Job) -> None:
    """Make the file `path` hold `job`, durably and at once, mode 0640.

    ConfigError when a setting looks like a secret or cannot be written as YAML.
    """
    data = job_text(path, job).encode()
    try:
        _publish(path, data)
    except OSError as exc:
        kind = NoSpace if exc.errno in (errno.ENOSPC, errno.EDQUOT) else ConfigError
        raise kind(f"cannot write {path}: {exc.strerror}") from exc


def job_text(path: Path, job: Job) -> str:
    """What the file `path` of `job` is to hold; ConfigError as for `write_job`."""
    for key in _keys(job.settings):
        if _SECRET.search(key):
            raise ConfigError(
                f"{path}: {key!r} would be a secret in a file that travels with the backups",
                hint=f"put it into a file of its own and set '{key}-file'",
            )
    for text in _texts(job.settings):
        if text.encode(errors="replace").decode() != text:
            raise ConfigError(
                f"{path} cannot hold {text!r}: it is not UTF-8",
                hint="give it another name, or a symbolic link that has one",
            )
    return _HEADER + _dumped(path, job)


def _publish(path: Path, data: bytes) -> None:
    """After a crash the file is the old one or the new one."""
    with _temporary(path) as tmp:
        fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        with open(fd, "wb") as stream:
            stream.write(data)
            stream.flush()
            with contextlib.suppress(PermissionError):  # a file system that has no modes
                os.fchmod(fd, 0o640)
            os.fsync(fd)
        os.replace(tmp, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        os.sync()  # a file system that cannot do it for a directory alone
    finally:
        os.close(directory)


def _keys(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _keys(item)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)


def _dumped(path: Path, job: Job) -> str:
    import yaml

    value: dict[str, Any] = {
        "source": {"type": job.source_type, **job.settings},
        "schedule": {
            tag: {"interval": format_interval(rule.interval_s), "keep": rule.keep}
            for tag, rule in job.schedule.items()
        },
    }
    value |= _options(job)
    if job.secrets:
        value["secrets"] = list(job.secrets)
    try:
        text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
        document = Document(text, str(path))
        same = document.plain(document.root) == value
        document.finish()
    except (yaml.YAMLError, UnicodeEncodeError) as exc:
        raise ConfigError(f"{path}: the settings cannot be written as YAML: {exc}") from exc
    if not same:
        raise ConfigError(f"{path}: the settings cannot be written as YAML without changing them")
    return text


def _options(job: Job) -> dict[str, Any]:
    """The keys of OPTIONS, as far as they differ from the default."""
    usual, found = Job(job.source_type, job.settings), {}
    if job.rate_limit != usual.rate_limit:
        found["rate-limit"] = format_size(job.rate_limit)
    if job.sample_percent != usual.sample_percent:
        found["sample-share"] = format_percent(job.sample_percent)
    if job.sample_budget_s != usual.sample_budget_s:
        found["sample-budget"] = format_interval(job.sample_budget_s)
    return found | ({"quiesce": job.quiesce.as_plain()} if job.quiesce else {})


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside `path` that is gone afterwards unless it was renamed."""
    tmp = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        yield tmp
    finally:
        tmp.unlink(missing_ok=True)
