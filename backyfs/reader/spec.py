"""SPEC: how people name revisions of one VM on a command line.

    union  = inter {"," inter}            in this order, nobody twice
    inter  = range {"&" range}            in the order of the left side
    range  = item | [item] ".." [item]    from A to B, both included, whichever is older
    item   = word | "(" union ")" | function "(" union ")"

    latest, last       the newest revision          0, 1, 2 …      0 is the newest, 1 the one before
    first              the oldest                   all, clean     every one, oldest first
    tag:NAME           all with this tag            trust:STATE    trusted, verified or distrusted
    20261121T220112Z-7f3a, or a beginning of it that no other one has (six characters or more)
    2026-11-14, 2026-11-14T12:00, yesterday, last-saturday, 3-days-ago … (see times.py):
                       alone the newest one not after that day, minute or moment;
                       in a range the border, the named day or minute included
    daily              standing alone: the newest with the tag `daily`, as in Backy
    not(X) reverse(X) first(X) last(X)

Blanks around words do not matter, those inside belong to the word; quotes make `,&()` and `..`
part of it. `seq` orders revisions; a revision from the future counts as made now.

Pure: no clock, no input or output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import NoReturn, Protocol

from backyfs.errors import NoRevision, UsageError
from backyfs.model import Trust
from backyfs.reader import times
from backyfs.reader.times import Period
from backyfs.store.record import Record, State

_NUMBER = re.compile(r"\d{1,5}")
_PREFIX = re.compile(r"\d[0-9TZ-][0-9a-zTZ-]{4,}")
_SHOWN_IDS = 4
_DEPTH_MAX = 50  # parentheses within parentheses


def select(
    spec: str,
    revisions: Iterable[tuple[Record, State]],
    *,
    now: datetime,
    zone: tzinfo | None = None,
) -> list[Record]:
    """The revisions `spec` names, in its order; at least one.

    `now` has a zone of its own; `zone` is that of times without one (None: the system's).
    Raises UsageError, with the place, when `spec` makes no sense, NoRevision when nothing matches.
    """
    node = _Parser(spec, now, zone).parse()
    history = _History(tuple(sorted(revisions, key=lambda pair: pair[0].seq)), now)
    found = node.alone(history) if isinstance(node, _Word | _Time) else node.select(history)
    if not found:
        raise NoRevision(f"no revision matches {spec!r}", hint="see them with: backyfs status")
    return found


def select_one(
    spec: str,
    revisions: Iterable[tuple[Record, State]],
    *,
    now: datetime,
    zone: tzinfo | None = None,
) -> Record:
    """As `select`, where one is needed: UsageError when `spec` names several."""
    found = select(spec, revisions, now=now, zone=zone)
    if len(found) > 1:
        raise UsageError(
            f"{spec!r} matches {len(found)} revisions, where one is needed",
            hint=f"the newest of them is: last({spec})",
        )
    return found[0]


@dataclass(frozen=True)
class _History:
    """What a SPEC is about: revisions by seq, and when it is asked."""

    pairs: tuple[tuple[Record, State], ...]
    now: datetime

    @property
    def records(self) -> list[Record]:
        return [record for record, _ in self.pairs]

    def where(self, wanted: Callable[[Record, State], bool]) -> list[Record]:
        return [record for record, state in self.pairs if wanted(record, state)]

    def tagged(self, tag: str) -> list[Record]:
        return self.where(lambda _, state: tag in state.tags)

    def time(self, record: Record) -> datetime:
        return min(record.time, self.now)


Refusal = Callable[[str, str], UsageError]
"""Makes the error for a place in the SPEC from what is wrong there and what to do."""


class _Node(Protocol):
    def select(self, history: _History) -> list[Record]:
        """The revisions this part of a SPEC names, in its order."""


@dataclass(frozen=True)
class _Named:
    """A keyword, `tag:` or `trust:`: anything that cannot fail."""

    choose: Callable[[_History], list[Record]]

    def select(self, history: _History) -> list[Record]:
        return self.choose(history)


@dataclass(frozen=True)
class _Number:
    number: int

    def select(self, history: _History) -> list[Record]:
        if self.number >= len(history.pairs):
            raise NoRevision(
                f"no revision number {self.number}: there are {len(history.pairs)}",
                hint="0 is the newest",
            )
        return [history.records[-1 - self.number]]


@dataclass(frozen=True)
class _Time:
    """A period, and the word for it."""

    word: str
    period: Period
    refuse: Refusal

    def select(self, history: _History) -> list[Record]:
        return history.where(lambda record, _: history.time(record) < self.period.end)[-1:]

    def alone(self, history: _History) -> list[Record]:
        """As the whole SPEC, where a tag could stand, too."""
        if history.tagged(self.word):
            raise self.refuse(
                f"{self.word!r} is both a time and a tag",
                f"write ({self.word}) for the time, last(tag:{self.word}) for the tag",
            )
        return self.select(history)


@dataclass(frozen=True)
class _Word:
    """An id, the beginning of one or, standing alone, a tag."""

    word: str
    refuse: Refusal

    def select(self, history: _History) -> list[Record]:
        found = self._by_id(history)
        if not found and history.tagged(self.word):
            raise self.refuse(
                f"{self.word!r} is a tag",
                f"write tag:{self.word} for all with it, last(tag:{self.word}) for the newest",
            )
        return found or self._unknown()

    def alone(self, history: _History) -> list[Record]:
        """As the whole SPEC: a tag means the newest revision with it."""
        found, tagged = self._by_id(history), history.tagged(self.word)
        if found and tagged and found[0].id != self.word:
            raise self.refuse(
                f"{self.word!r} is both a tag and the beginning of a revision",
                f"write last(tag:{self.word}) or {found[0].id}",
            )
        return found or tagged[-1:] or self._unknown()

    def _by_id(self, history: _History) -> list[Record]:
        if not _PREFIX.fullmatch(self.word):
            return []
        found = [record for record in history.records if record.id.startswith(self.word)]
        if len(found) > 1:
            shown = ", ".join(record.id for record in found[-_SHOWN_IDS:])
            more = " …" if len(found) > _SHOWN_IDS else ""
            raise self.refuse(f"{self.word!r} fits {len(found)} revisions", f"{shown}{more}")
        return found

    def _unknown(self) -> NoReturn:
        raise NoRevision(
            f"no revision {self.word!r}, and no tag of that name",
            hint="see them with: backyfs status",
        )


@dataclass(frozen=True)
class _Range:
    start: _Node | None
    end: _Node | None

    def select(self, history: _History) -> list[Record]:
        start, end = self.start, self.end
        if (
            isinstance(start, _Time)
            and isinstance(end, _Time)
            and start.period.start > end.period.start
        ):
            start, end = end, start
        lower = _borders(start, history)
        upper = _borders(end, history)
        if lower == [] or upper == []:
            return []
        if lower and upper and lower[0] > upper[-1]:
            lower, upper = upper, lower
        return history.where(
            lambda record, _: (
                (lower is None or record.seq >= lower[0])
                and (upper is None or record.seq <= upper[-1])
                and (not isinstance(start, _Time) or history.time(record) >= start.period.start)
                and (not isinstance(end, _Time) or history.time(record) < end.period.end)
            )
        )


def _borders(node: _Node | None, history: _History) -> list[int] | None:
    """The seqs a side of a range names, sorted; None = no border by seq."""
    if node is None or isinstance(node, _Time):
        return None
    return sorted(record.seq for record in node.select(history))


@dataclass(frozen=True)
class _Union:
    parts: Sequence[_Node]

    def select(self, history: _History) -> list[Record]:
        found = {record.id: record for part in self.parts for record in part.select(history)}
        return list(found.values())


@dataclass(frozen=True)
class _Intersection:
    parts: Sequence[_Node]

    def select(self, history: _History) -> list[Record]:
        first, *others = (part.select(history) for part in self.parts)
        ids = [{record.id for record in other} for other in others]
        return [record for record in first if all(record.id in other for other in ids)]


@dataclass(frozen=True)
class _Call:
    function: Callable[[_History, list[Record]], list[Record]]
    argument: _Node

    def select(self, history: _History) -> list[Record]:
        return self.function(history, self.argument.select(history))


def _complement(history: _History, found: list[Record]) -> list[Record]:
    ids = {record.id for record in found}
    return history.where(lambda record, _: record.id not in ids)


_FUNCTIONS: dict[str, Callable[[_History, list[Record]], list[Record]]] = {
    "not": _complement,
    "reverse": lambda _, found: found[::-1],
    "first": lambda _, found: found[:1],
    "last": lambda _, found: found[-1:],
}
_KEYWORDS: dict[str, _Named] = {
    "latest": _Named(lambda history: history.records[-1:]),
    "last": _Named(lambda history: history.records[-1:]),
    "first": _Named(lambda history: history.records[:1]),
    "all": _Named(lambda history: history.records),
    # Backy's word for complete ones; what is not complete has no record here.
    "clean": _Named(lambda history: history.records),
}


class _Parser:
    """Recursive descent over the text; every error names the place, counted from 1."""

    def __init__(self, text: str, now: datetime, zone: tzinfo | None) -> None:
        self.text = text
        self.now, self.zone = now, zone
        self.at = 0
        self.depth = 0

    def parse(self) -> _Node:
        node = self._union()
        if self.at < len(self.text):
            raise self._error("a ) without its (", self.at)
        return node

    def _union(self) -> _Node:
        parts = [self._intersection()]
        while self._take(","):
            parts.append(self._intersection())
        return parts[0] if len(parts) == 1 else _Union(parts)

    def _intersection(self) -> _Node:
        parts = [self._range()]
        while self._take("&"):
            parts.append(self._range())
        return parts[0] if len(parts) == 1 else _Intersection(parts)

    def _range(self) -> _Node:
        start = None if self._next_is("..") else self._item()
        if not self._take(".."):
            assert start is not None  # else the range sign would have been there
            return start
        end = None if self._at_end_of_range() else self._item()
        if self._next_is(".."):
            raise self._error("a second ..", self.at)
        return _Range(start, end)

    def _item(self) -> _Node:
        self._skip_blanks()
        begin = self.at
        word, quoted = self._word()
        if self._take("("):
            return self._group(word, begin)
        if not word:
            raise self._error("expected a revision", begin)
        return self._named(word, begin, quoted)

    def _group(self, name: str, begin: int) -> _Node:
        function = _FUNCTIONS.get(name)
        if name and function is None:
            known = ", ".join(_FUNCTIONS)
            raise self._error(f"no function {name!r} (there are {known})", begin)
        self.depth += 1
        if self.depth > _DEPTH_MAX:
            raise self._error(f"more than {_DEPTH_MAX} parentheses within each other", begin)
        inner = self._union()
        self.depth -= 1
        if not self._take(")"):
            raise self._error("a ( without its )", begin)
        # A group is no bare word any more, so that (daily) is not taken for a newest revision.
        return _Call(function, inner) if function else _Union([inner])

    def _word(self) -> tuple[str, bool]:
        """The next word without the blanks around it, and whether a part of it was quoted."""
        parts: list[str] = []
        quoted = False
        while not self._at_end_of_word():
            char = self.text[self.at]
            if char in "\"'":
                close = self.text.find(char, self.at + 1)
                if close < 0:
                    raise self._error(f"a {char} without its partner", self.at)
                parts.append(self.text[self.at + 1 : close])
                self.at, quoted = close + 1, True
            else:
                parts.append(char)
                self.at += 1
        return "".join(parts).strip(), quoted

    def _named(self, word: str, begin: int, quoted: bool) -> _Node:
        kind, colon, name = word.partition(":")
        if colon and kind == "tag":
            return self._tag(name.strip(), begin)
        if colon and kind == "trust":
            return self._trust(name.strip(), begin)
        if quoted:
            return self._bare(word, begin)
        if word in _KEYWORDS:
            return _KEYWORDS[word]
        if _NUMBER.fullmatch(word):
            return _Number(int(word))
        return self._time(word, begin) or self._bare(word, begin)

    def _bare(self, word: str, begin: int) -> _Node:
        return _Word(word, self._refusal(begin))

    def _time(self, word: str, begin: int) -> _Node | None:
        try:
            found = times.period(word, now=self.now, zone=self.zone)
        except ValueError as exc:
            raise self._error(f"no such date: {exc}", begin) from exc
        return _Time(word, found, self._refusal(begin)) if found else None

    def _refusal(self, begin: int) -> Refusal:
        return lambda message, hint: self._error(message, begin, hint)

    def _tag(self, name: str, begin: int) -> _Node:
        if not name:
            raise self._error("tag: without a name", begin)
        return _Named(lambda history: history.tagged(name))

    def _trust(self, name: str, begin: int) -> _Node:
        if name not in list(Trust):
            raise self._error(f"no trust {name!r} (there are {', '.join(Trust)})", begin)
        return _Named(lambda history: history.where(lambda _, state: state.trust == name))

    def _at_end_of_word(self) -> bool:
        return (
            self.at >= len(self.text)
            or self.text[self.at] in ",&()"
            or self.text.startswith("..", self.at)
        )

    def _at_end_of_range(self) -> bool:
        self._skip_blanks()
        return self.at >= len(self.text) or self.text[self.at] in ",&)"

    def _next_is(self, sign: str) -> bool:
        self._skip_blanks()
        return self.text.startswith(sign, self.at)

    def _take(self, sign: str) -> bool:
        if not self._next_is(sign):
            return False
        self.at += len(sign)
        return True

    def _skip_blanks(self) -> None:
        while self.at < len(self.text) and self.text[self.at] == " ":
            self.at += 1

    def _error(self, what: str, at: int, hint: str = "") -> UsageError:
        return UsageError(
            f"revision SPEC {self.text!r}, character {at + 1}: {what}",
            hint=hint or "see: backyfs help spec",
        )
