"""A YAML file read strictly: what it says, where it says it, and everything that is wrong with it.

YAML 1.1 turns `no` into false, `1:30` into 90 and `022` into 18, and keeps the last of two equal
keys; each of these is a problem here. Keys are texts as written. Aliases and own tags are not
supported, so that a small file stays small. Problems are collected with line and column; `finish`
raises them together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from backyfs.errors import BackyfsError, ConfigError, Problem

T = TypeVar("T")

DEPTH_MAX = 32
"""Mappings and lists inside each other; deeper ones are refused."""

_TAG = "tag:yaml.org,2002:"
_TAGS = (None, "!", *(_TAG + kind for kind in ("str", "int", "float", "bool", "map", "seq")))
_OPENING = ("MappingStartEvent", "SequenceStartEvent")
_CLOSING = ("MappingEndEvent", "SequenceEndEvent")
_INTEGER = re.compile("-?(0|[1-9][0-9]{0,17})", re.ASCII)
_FRACTION = re.compile(r"-?(0|[1-9][0-9]{0,17})\.[0-9]{1,17}", re.ASCII)
_BOOLEANS = {"true": True, "false": False}
_CONVERTED = {
    _TAG + "int": "a number that YAML reads in its own way",
    _TAG + "float": "a number that YAML reads in its own way",
    _TAG + "bool": "true or false to YAML",
    _TAG + "null": "nothing to YAML",
    _TAG + "timestamp": "a date to YAML",
}


class Mark(Protocol):
    """A place in the file; both count from 0."""

    line: int
    column: int


class Node(Protocol):
    """As PyYAML composes it. `id`: mapping, sequence or scalar; `value`: pairs, items or text."""

    id: str
    tag: str
    value: Any
    start_mark: Mark


class Document:
    """One YAML file. Its methods take nodes; what is wrong they note and return None for."""

    def __init__(self, text: str, name: str) -> None:
        """Parse `text`; `name` is how errors call the file. ConfigError: it is not YAML."""
        self.name = name
        self.problems: list[Problem] = []
        self.root = _composed(text, name)

    def problem(self, node: Node, text: str) -> None:
        """Note that something is wrong at `node`."""
        self.problems.append(self.at(node, text))

    def at(self, node: Node, text: str) -> Problem:
        """A problem at `node` that is not noted here."""
        mark = node.start_mark
        return Problem(self.name, mark.line + 1, mark.column + 1, text)

    def finish(self) -> None:
        """Raise one ConfigError with all problems noted so far, in the order of the file."""
        if self.problems:
            raise ConfigError.of(sorted(self.problems), self.name)

    def mapping(
        self, node: Node, what: str, known: Collection[str] | None = None
    ) -> dict[str, Node]:
        """The values of a mapping by key. `known` = all the keys it may have (None: any)."""
        if node.id != "mapping":
            self.problem(node, f"{what} must be a mapping (`key: value`)")
            return {}
        found: dict[str, Node] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            name = str(key.value)
            if key.id != "scalar":
                self.problem(key, "a key must be a plain text")
            elif name in lines:
                self.problem(key, f"{name!r} is here a second time, first in line {lines[name]}")
            elif known is not None and name not in known:
                self.problem(key, f"unknown key {name!r}{self.suggestion(name, known)}")
            else:
                found[name] = value
            lines.setdefault(name, key.start_mark.line + 1)
        return found

    @staticmethod
    def suggestion(name: str, known: Collection[str]) -> str:
        """What was probably meant by `name`, or all that is known; follows an error's text."""
        from difflib import get_close_matches

        close = get_close_matches(name, known, n=1)
        return f", did you mean {close[0]!r}?" if close else f"; known are: {', '.join(known)}"

    def text(self, node: Node, what: str) -> str | None:
        """A text that is not empty."""
        value = self.plain(node)
        if isinstance(value, str) and value:
            return value
        if value is not None:
            missing = "must not be empty" if value == "" else "must be text: put it in quotes"
            self.problem(node, f"{what} {missing}")
        return None

    def integer(self, node: Node, what: str, least: int) -> int | None:
        """A whole number, at least `least`."""
        value = self.plain(node)
        if type(value) is int and value >= least:
            return value
        if value is not None:
            self.problem(node, f"{what} must be a whole number from {least} on")
        return None

    def plain(self, node: Node) -> Any:
        """Whatever the node holds: text, whole number, fraction, bool, list or mapping."""
        if node.id == "mapping":
            return {key: self.plain(value) for key, value in self.mapping(node, "this").items()}
        if node.id == "sequence":
            return [self.plain(value) for value in node.value]
        return self._scalar(node)

    def _scalar(self, node: Node) -> str | int | float | bool | None:
        text = str(node.value)
        if node.tag == _TAG + "str":
            return text
        if node.tag == _TAG + "bool" and text in _BOOLEANS:
            return _BOOLEANS[text]
        if node.tag == _TAG + "int" and _INTEGER.fullmatch(text):
            return int(text)
        if node.tag == _TAG + "float" and _FRACTION.fullmatch(text):
            return float(text)
        if not text:
            self.problem(node, "there is no value here")
        else:
            meaning = _CONVERTED.get(node.tag, "something special to YAML")
            self.problem(node, f"{text!r} is {meaning}: put it in quotes, or write it plainly")
        return None

    def accept(self, node: Node, parse: Callable[[Any], T], value: Any) -> T | None:
        """`parse(value)`; a BackyfsError it raises is noted as a problem of the node."""
        try:
            return parse(value)
        except BackyfsError as exc:
            self.problem(node, exc.message + (exc.hint and f" ({exc.hint})"))
            return None


def load(path: Path, *, bytes_max: int, what: str, hint: str = "") -> Document:
    """The document in the file `path`. ConfigError: missing (then with `hint`), unreadable, too
    large to be `what`, or no YAML.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read(bytes_max + 1)
        if len(data) > bytes_max:
            raise ConfigError(f"{path} has more than {bytes_max} bytes: that is no {what}")
        return Document(data.decode(), str(path))
    except FileNotFoundError as exc:
        raise ConfigError(f"{path} is missing", hint=hint) from exc
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is not UTF-8 text (byte {exc.start})") from exc


def _composed(text: str, name: str) -> Node:
    """The root node of the one YAML document in `text`."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _refuse_what_is_no_tree(yaml.parse(text, Loader=loader), name)
        root: Any = yaml.compose(text, Loader=loader)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        what = exc.problem or exc.context or "not understood"
        raise _refusal(name, mark, f"this is not YAML: {what}") from exc
    except yaml.YAMLError as exc:
        text = f"this is not YAML: {' '.join(str(exc).split())}"
        raise ConfigError(f"{name}: {text}", problems=[Problem(name, 1, 1, text)]) from exc
    if root is None:
        raise ConfigError(f"{name} is empty", problems=[Problem(name, 1, 1, "it is empty")])
    composed: Node = root
    return composed


def _refuse_what_is_no_tree(events: Iterable[Any], name: str) -> None:
    """Refuse aliases, own tags, and a depth that would overrun the stack of the C composer."""
    depth = 0
    for event in events:
        kind = type(event).__name__
        depth += (kind in _OPENING) - (kind in _CLOSING)
        if depth > DEPTH_MAX:
            fault = f"more than {DEPTH_MAX} levels inside each other"
        elif kind == "AliasEvent":
            fault = "anchors and aliases are not supported: write it out"
        elif getattr(event, "tag", None) not in _TAGS:
            fault = f"the tag {event.tag!r} is not supported"
        else:
            continue
        raise _refusal(name, event.start_mark, fault)


def _refusal(name: str, mark: Mark | None, fault: str) -> ConfigError:
    line, column = (mark.line, mark.column) if mark else (0, 0)
    return ConfigError.of([Problem(name, line + 1, column + 1, fault)], name)
