"""The file `config` in a VM's directory: what is backed up, and on which schedule.

The keys are Backy's, so that a file it wrote can be used. The file travels with the directory;
therefore it never holds a secret, and `write_job` refuses to write one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from backyfs.config.document import Document, Node
from backyfs.config.interval import format_interval, parse_interval
from backyfs.config.schedule import BUILT_IN, DAILY, MANUAL, Rule, Schedule
from backyfs.errors import ConfigError, NoSpace, UsageError
from backyfs.model import tag_name

SIZE_MAX = 1 << 20
"""Bytes of the largest file that is read at all."""

_SECRET = re.compile(r"(password|passphrase|secret|token|credential)s?\Z", re.IGNORECASE)
_HEADER = "# What is backed up here, and how often. See: backyfs init --help\n"


class Job(NamedTuple):
    """A VM's source and schedule; `settings` are the source's own keys, as plain values."""

    source_type: str
    settings: Mapping[str, Any]
    schedule: Schedule = DAILY


def read_job(path: Path) -> Job:
    """The job in the file `path`; ConfigError names everything that is wrong with it."""
    document = Document(_text(path), str(path))
    keys = document.mapping(document.root, "the file", ("source", "schedule", "path"))
    source = _source(document, keys)
    schedule = _schedule(document, keys["schedule"]) if "schedule" in keys else DAILY
    document.finish()
    return Job(*source, schedule)


def _text(path: Path) -> str:
    try:
        with open(path, "rb") as stream:
            data = stream.read(SIZE_MAX + 1)
        if len(data) > SIZE_MAX:
            raise ConfigError(f"{path} has more than {SIZE_MAX} bytes: that is no job")
        return data.decode()
    except FileNotFoundError as exc:
        raise ConfigError(
            f"{path} is missing: nothing says what to back up", hint="run: backyfs init"
        ) from exc
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is not UTF-8 text (byte {exc.start})") from exc


def _source(document: Document, keys: Mapping[str, Node]) -> tuple[str, dict[str, Any]]:
    """Type and settings. Backy's `backend` chose its store: that is not the source's matter."""
    if "source" not in keys:
        if document.root.id == "mapping":
            document.problem(document.root, "the key 'source' is missing")
        return "", {}
    found = document.mapping(keys["source"], "source")
    if "type" not in found and keys["source"].id == "mapping":
        document.problem(keys["source"], "the source has no 'type'")
    kind = document.text(found["type"], "type") if "type" in found else None
    settings = {
        key: document.plain(node) for key, node in found.items() if key not in ("type", "backend")
    }
    return kind or "", settings


def _schedule(document: Document, node: Node) -> Schedule:
    """The rules of a schedule that is written out, or the built-in one of that name."""
    if node.id != "mapping":
        name = document.text(node, "schedule") or ""
        if name and name not in BUILT_IN:
            document.problem(node, f"no schedule {name!r}; built in are: {', '.join(BUILT_IN)}")
        return BUILT_IN.get(name, DAILY)
    rules = {}
    for tag, rule in document.mapping(node, "schedule").items():
        if document.accept(rule, _schedule_tag, tag):
            rules[tag] = _rule(document, rule, tag)
    if not node.value:
        document.problem(node, "the schedule has no tags")
    return rules


def _schedule_tag(text: str) -> str:
    if text.startswith(MANUAL):
        raise UsageError(f"{text!r}: tags with {MANUAL!r} are set by hand, not by a schedule")
    return tag_name(text)


def _rule(document: Document, node: Node, tag: str) -> Rule:
    found = document.mapping(node, tag, ("interval", "keep"))
    for key in {"interval", "keep"} - found.keys():
        if node.id == "mapping":
            document.problem(node, f"{tag} has no {key!r}")
    interval = None
    if "interval" in found:
        value = document.plain(found["interval"])
        if isinstance(value, str | int):
            interval = document.accept(found["interval"], parse_interval, value)
        elif value is not None:
            document.problem(found["interval"], "an interval is a number of seconds, or like 1d")
    keep = document.integer(found["keep"], "keep", 1) if "keep" in found else None
    return Rule(interval or 1, keep or 1)


def write_job(path: Path, job: Job) -> None:
    """Make the file `path` hold `job`, durably and at once, mode 0640.

    ConfigError when a setting looks like a secret or cannot be written as YAML.
    """
    for key in _keys(job.settings):
        if _SECRET.search(key):
            raise ConfigError(
                f"{path}: {key!r} would be a secret in a file that travels with the backups",
                hint=f"put it into a file of its own and set '{key}-file'",
            )
    data = (_HEADER + _dumped(path, job)).encode()
    try:
        _publish(path, data)
    except OSError as exc:
        kind = NoSpace if exc.errno in (errno.ENOSPC, errno.EDQUOT) else ConfigError
        raise kind(f"cannot write {path}: {exc.strerror}") from exc


def _publish(path: Path, data: bytes) -> None:
    """After a crash the file is the old one or the new one."""
    with _temporary(path) as tmp:
        fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o640)
        with open(fd, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fchmod(fd, 0o640)
            os.fsync(fd)
        os.replace(tmp, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _keys(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _keys(item)


def _dumped(path: Path, job: Job) -> str:
    import yaml

    value = {
        "source": {"type": job.source_type, **job.settings},
        "schedule": {
            tag: {"interval": format_interval(rule.interval_s), "keep": rule.keep}
            for tag, rule in job.schedule.items()
        },
    }
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


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside `path` that is gone afterwards unless it was renamed."""
    tmp = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield tmp
    finally:
        tmp.unlink(missing_ok=True)
