"""The keys of a configuration section: what each may hold, its default and its meaning.

One table serves three ends: reading a section (with all its problems), the JSON schema for
editors, and the documentation.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backyfs.config.document import Document, Node
from backyfs.config.interval import parse_interval
from backyfs.config.share import parse_percent
from backyfs.config.size import parse_size
from backyfs.errors import UsageError

NEVER = 0
"""What an interval that may be `never` is then."""
WAIT_MAX = 86_400
"""Seconds for which something is waited at most."""

Read = Callable[[Document, Node, str], Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value may be: how it is read (None and a noted problem if not), and its schema."""

    read: Read
    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a section; `argument` is what its value is called in the program."""

    kind: Kind
    argument: str
    meaning: str
    default: str


def described(key: Key) -> dict[str, Any]:
    """The schema of a key's value."""
    return {**key.kind.schema, "description": f"{key.meaning} (default: {key.default})"}


def section_schema(keys: Mapping[str, Key]) -> dict[str, Any]:
    """The schema of a section with these keys, none of which it must have."""
    properties = {name: described(key) for name, key in keys.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def read_section(
    document: Document, node: Node, what: str, keys: Mapping[str, Key]
) -> dict[str, Any]:
    """The values in the mapping `node` by argument, without those missing or wrong."""
    return read_keys(document, document.mapping(node, what, keys), keys)


def read_keys(
    document: Document, nodes: Mapping[str, Node], keys: Mapping[str, Key]
) -> dict[str, Any]:
    """Of `nodes` those that `keys` has, read, by argument; without those wrong."""
    return {
        key.argument: value
        for name, key in keys.items()
        if name in nodes and (value := key.kind.read(document, nodes[name], name)) is not None
    }


def _parsed(parse: Callable[[Any], Any]) -> Read:
    def read(document: Document, node: Node, what: str) -> Any:
        value = document.plain(node)
        if isinstance(value, str | int) and not isinstance(value, bool):
            return document.accept(node, parse, value)
        if value is not None:
            document.problem(node, f"{what} must be a text or a number")
        return None

    return read


def _path(text: str) -> Path:
    path = Path(str(text))
    if not path.is_absolute():
        raise UsageError(f"{str(text)!r} is a relative path", hint="write it from / on")
    return Path(os.path.normpath(path))


def _interval_or_never(value: str | int) -> int:
    return NEVER if value == "never" else parse_interval(value)


def _wait(value: str | int) -> int:
    seconds = parse_interval(value)
    if seconds > WAIT_MAX:
        raise UsageError(f"{value!r} is more than a day", hint="nothing is waited for so long")
    return seconds


def _addresses(value: str | int) -> tuple[str, ...]:
    from ipaddress import ip_address

    parts = [part.strip() for part in str(value).split(",") if part.strip()]
    try:
        return tuple(str(ip_address(part)) for part in parts)
    except ValueError as exc:
        raise UsageError(
            f"{value!r} is no list of IP addresses", hint="write it like 127.0.0.1, ::1"
        ) from exc


def _port(value: str | int) -> int:
    if not str(value).isascii() or not str(value).isdigit() or not 0 <= int(value) <= 65535:
        raise UsageError(f"{value!r} is no port", hint="use 1 to 65535, or 0 for none")
    return int(value)


def _texts(document: Document, node: Node, what: str) -> tuple[str, ...] | None:
    if node.id != "sequence":
        document.problem(node, f"{what} must be a list")
        return None
    found = [document.text(item, what) for item in node.value]
    if not found:
        document.problem(node, f"{what} must not be empty")
    return tuple(text for text in found if text is not None) or None


def _command(document: Document, node: Node, what: str) -> tuple[str, ...] | None:
    """A program and its arguments: a list, or a text that is split as a shell would; no shell."""
    if node.id == "sequence":
        return _texts(document, node, what)
    text = document.text(node, what)
    return document.accept(node, _split, text) if text else None


def _split(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as exc:
        raise UsageError(f"{text!r} is no command: {exc}") from exc


def integer(least: int) -> Kind:
    """A whole number, at least `least`."""
    return Kind(
        lambda document, node, what: document.integer(node, what, least),
        {"type": "integer", "minimum": least},
    )


def choice(*words: str) -> Kind:
    """One of some words."""

    def parse(value: str | int) -> str:
        if value not in words:
            raise UsageError(f"{value!r} is none of: {', '.join(words)}")
        return str(value)

    return Kind(_parsed(parse), {"enum": list(words)})


_INTERVAL_SCHEMA = {"type": ["string", "integer"], "minimum": 1, "examples": ["30m", "1d12h"]}

TEXT = Kind(
    lambda document, node, what: document.text(node, what), {"type": "string", "minLength": 1}
)
PATH = Kind(_parsed(_path), {"type": "string", "pattern": "^/"})
INTERVAL = Kind(_parsed(parse_interval), _INTERVAL_SCHEMA)
WAIT = Kind(_parsed(_wait), _INTERVAL_SCHEMA)
INTERVAL_OR_NEVER = Kind(
    _parsed(_interval_or_never), {**_INTERVAL_SCHEMA, "examples": ["1d", "never"]}
)
SIZE = Kind(
    _parsed(parse_size), {"type": ["string", "integer"], "minimum": 1, "examples": ["50M", "1.5G"]}
)
SHARE = Kind(
    _parsed(parse_percent),
    {"type": "string", "pattern": r"^[0-9]{1,3}(\.[0-9]{1,4})? ?%$", "examples": ["1%", "0.25%"]},
)
TEXTS = Kind(_texts, {"type": "array", "items": {"type": "string"}, "minItems": 1})
COMMAND = Kind(_command, {"oneOf": [TEXT.schema, TEXTS.schema]})
ADDRESSES = Kind(_parsed(_addresses), {"type": "string", "examples": ["127.0.0.1, ::1"]})
PORT = Kind(_parsed(_port), {"type": ["integer", "string"], "minimum": 0, "maximum": 65535})
