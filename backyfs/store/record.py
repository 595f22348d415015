"""Records and states: what a repository knows of a revision, as self-checking JSON files.

A record is immutable and its appearance is the commit point of the revision with all its disks.
A state holds what people and verification decide later (tags, trust); it is replaced whole.
Both carry `blake3` over their canonical form (sorted keys, no blanks, without that key).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache, lru_cache
from typing import Any, TypeVar, get_type_hints

from blake3 import blake3

from backyfs.errors import Corrupt, Unsupported
from backyfs.log import one_line
from backyfs.model import Consistency, Partition, Quiescing, Trust

FORMAT = 1

T = TypeVar("T")

NOT_TRIED = Quiescing()


def canonical(value: Mapping[str, Any]) -> bytes:
    """The one byte form of a JSON object that checksums are made over."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sealed(value: Mapping[str, Any]) -> bytes:
    """`value` as a JSON file that carries its own BLAKE3; ends with a newline."""
    body = {key: item for key, item in value.items() if key != "blake3"}
    body["blake3"] = blake3(canonical(body)).hexdigest()
    return json.dumps(body, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"


def unsealed(data: bytes, what: str) -> dict[str, Any]:
    """The object in a sealed JSON file; Corrupt when it is not one or its checksum is wrong."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise Corrupt(f"{what} is not JSON") from exc
    if not isinstance(value, dict):
        raise Corrupt(f"{what} is not a JSON object")
    checksum = value.pop("blake3", None)
    try:
        actual = blake3(canonical(value)).hexdigest()
    except (ValueError, RecursionError) as exc:
        raise Corrupt(f"{what} is not canonical JSON") from exc
    if checksum != actual:
        raise Corrupt(f"{what} does not match its checksum")
    value["blake3"] = checksum
    return value


def timestamp(time: datetime) -> str:
    """A time as it stands in files: UTC, ISO 8601, microseconds."""
    return time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def parse_time(text: str) -> datetime:
    """The inverse of `timestamp`. ValueError."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except OverflowError as exc:
        raise ValueError(f"{text} in UTC is no time") from exc


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """One disk of a revision.

    `files` maps the names of files in revisions/ to their BLAKE3 (hex; docs/format.md says of
    which bytes); an unchanged disk names its parent's files. `source` is {"type", "bookmark"}.
    `data` is the number of bytes that are no holes: what `du` shows without opening the disk.
    """

    name: str
    size: int
    digest: str
    files: Mapping[str, str]
    source: Mapping[str, Any] = field(default_factory=dict)
    partitions: tuple[Partition, ...] = ()
    data: int = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """What making a revision took, all disks together; bytes and seconds.

    `read`: from the source · `changed`: bytes of frames that differ from the parent (a full
    backup: of all frames that are not zero) · `stored`: bytes added to the store · `verified`:
    bytes read back and compared (0 = not verified) · `torn_frames`: frames of the source that
    changed while being read.

    `believed`: bytes of the image that were not read, because the source said that they had not
    changed (None: not known, of a record older than this field). Of these, `sampled` bytes in
    `sampled_frames` frames were read again and compared; `sample_cut`: the time limit ended that;
    `wrong_frames`: frames that the source has otherwise.
    """

    read: int = 0
    changed: int = 0
    stored: int = 0
    verified: int = 0
    torn_frames: int = 0
    seconds: float = 0.0
    believed: int | None = None
    sampled: int = 0
    sampled_frames: int = 0
    sample_cut: bool = False
    wrong_frames: int = 0

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Stats:
        """From a record's JSON; what only a later version knows is passed over."""
        return cls(**{name: value[name] for name in cls.__slots__ if name in value})


@dataclass(frozen=True, slots=True)
class Draft:
    """What a backup says of its revision; the store adds id, order and the files."""

    consistency: Consistency
    reason: str = ""
    tags: tuple[str, ...] = ()
    trust: Trust = Trust.TRUSTED
    stats: Stats = Stats()
    tool: str = ""
    verification: str = "none"
    quiescing: Quiescing = NOT_TRIED
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    partitions: Mapping[str, tuple[Partition, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """A published revision. `seq` orders revisions; `time` (UTC, start) is for people.

    `verification` says how the backup was verified when it was made: full, sample (some of it was
    taken over unread from the revision before, see Stats.believed) or none.
    """

    seq: int
    id: str
    time: datetime
    parent: str
    tool: str
    consistency: Consistency
    reason: str
    tags: tuple[str, ...]
    trust: Trust
    verification: str
    stats: Stats
    disks: Mapping[str, DiskRecord]
    quiescing: Quiescing = NOT_TRIED

    @property
    def size(self) -> int:
        """Bytes of all disks together."""
        return sum(disk.size for disk in self.disks.values())

    def encode(self) -> bytes:
        """The record as the bytes of its file."""
        value = asdict(self)
        value["format"] = FORMAT
        value["time"] = timestamp(self.time)
        value["disks"] = [_disk_value(disk) for disk in self.disks.values()]
        return sealed(value)

    @classmethod
    def decode(cls, data: bytes, what: str) -> Record:
        """The record in the bytes of a file; Corrupt or Unsupported when it is none we know."""
        value = _of_our_format(unsealed(data, what), what)
        try:
            return _record(value)
        except _GARBLED as exc:
            raise Corrupt(f"{what} lacks or garbles a field: {one_line(str(exc))}") from exc


def _of_our_format(value: dict[str, Any], what: str) -> dict[str, Any]:
    if value.get("format") != FORMAT:
        raise Unsupported(
            f"{what} has format {value.get('format')!r:.80}; this program knows {FORMAT}",
            hint="use a newer backyfs",
        )
    return value


def _disk_value(disk: DiskRecord) -> dict[str, Any]:
    value = asdict(disk)
    value["partitions"] = [partition._asdict() for partition in disk.partitions]
    return value


# What a file says is believed when its types are right: a checksum is no proof against a program
# that wrote nonsense, and one such record must not be in the way of all others.

_GARBLED = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError)
_NAME_BYTES_MAX = 255
_NUMBER_END = 2**63
"""Numbers are below it: the system has no larger ones for sizes and offsets."""


def _whole(item: object) -> bool:
    return type(item) is int and abs(item) < _NUMBER_END


_FITS: Mapping[object, Callable[[Any], bool]] = {
    str: lambda item: isinstance(item, str),
    bool: lambda item: isinstance(item, bool),
    int: _whole,
    int | None: lambda item: item is None or _whole(item),
    float: lambda item: type(item) in (int, float) and abs(item) < _NUMBER_END,
}


@cache
def _plain(kind: type) -> tuple[tuple[str, Callable[[Any], bool]], ...]:
    """The fields of a class that are numbers and strings, each with what fits it."""
    return tuple((n, _FITS[t]) for n, t in get_type_hints(kind).items() if t in _FITS)


def _typed(value: T) -> T:
    """`value`, made of JSON, if its numbers and strings are such; else ValueError."""
    kind: type = type(value)
    for name, fits in _plain(kind):
        if not fits(item := getattr(value, name)):
            raise ValueError(f"{name} is {item!r:.80}")
    return value


def _of_type(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"{value!r:.80} is no {kind.__name__}")
    return value


def _disk(value: Mapping[str, Any]) -> DiskRecord:
    # Where partitions lie is judged by who shows them: an impossible one costs nobody the disk.
    partitions = (_typed(Partition(**partition)) for partition in value["partitions"])
    disk = _typed(
        DiskRecord(
            name=value["name"],
            size=value["size"],
            digest=value["digest"],
            files=_of_type(value["files"], dict),
            source=_of_type(value["source"], dict),
            partitions=_shared(tuple(partitions)),
            data=value["data"],
        )
    )
    if min(disk.size, disk.data) < 0:
        raise ValueError("a disk has less than no bytes")
    return disk


def _record(value: Mapping[str, Any]) -> Record:
    disks = {disk.name: disk for disk in map(_disk, value["disks"])}
    if len(disks) != len(value["disks"]) or not disks:
        raise ValueError("no disks, or two of one name")
    return Record(
        seq=int(value["seq"]),
        id=value["id"],
        time=parse_time(value["time"]),
        parent=_of_type(value["parent"], str),
        tool=sys.intern(value["tool"]),
        consistency=Consistency(value["consistency"]),
        reason=_of_type(value["reason"], str),
        tags=_tags(value),
        trust=Trust(value["trust"]),
        verification=sys.intern(value["verification"]),
        stats=_typed(Stats.of(_of_type(value["stats"], dict))),
        disks=disks,
        quiescing=_quiescing(value),
    )


def _can_be_shown(tag: object) -> bool:
    """Whether a tag can be the name of a directory in the mount, and be printed on a terminal."""
    fits = isinstance(tag, str) and tag.isprintable() and "/" not in tag
    return fits and tag not in ("", ".", "..") and len(str(tag).encode()) <= _NAME_BYTES_MAX


def _tags(value: Mapping[str, Any]) -> tuple[str, ...]:
    tags = _of_type(value["tags"], list)
    if not all(map(_can_be_shown, tags)):
        raise ValueError(f"tags are {tags!r:.80}")
    return tuple(map(sys.intern, tags))


def _quiescing(value: Mapping[str, Any]) -> Quiescing:
    """Records made before there was quiescing do not speak of it; most others have the default."""
    found = _typed(Quiescing(**value.get("quiescing", {})))
    return NOT_TRIED if found == NOT_TRIED else found


@lru_cache(maxsize=1024)
def _shared(partitions: tuple[Partition, ...]) -> tuple[Partition, ...]:
    """The same table as one object: a process with many records has most of them many times."""
    return partitions


@dataclass(frozen=True, slots=True)
class State:
    """What was decided of a revision after it was made; replaces the record's own values.

    `lasting`: of a distrust that reading stored bytes cannot lift, since it was the source that
    had others.
    """

    tags: tuple[str, ...]
    trust: Trust
    verified_at: datetime | None = None
    why: str = ""
    lasting: bool = False

    @classmethod
    def of(cls, record: Record) -> State:
        """The state of a revision that has no state file."""
        verified = record.time if record.trust is Trust.VERIFIED else None
        if record.trust is Trust.DISTRUSTED:
            return cls(record.tags, record.trust, why=record.reason, lasting=True)
        return cls(record.tags, record.trust, verified)

    def encode(self) -> bytes:
        """The state as the bytes of its file."""
        return sealed(
            {
                "format": FORMAT,
                "tags": list(self.tags),
                "trust": str(self.trust),
                "verified_at": timestamp(self.verified_at) if self.verified_at else None,
                "why": self.why,
                "lasting": self.lasting,
            }
        )

    @classmethod
    def decode(cls, data: bytes, what: str) -> State:
        """The state in the bytes of a file; Corrupt or Unsupported when it is none we know."""
        value = _of_our_format(unsealed(data, what), what)
        try:
            at = value["verified_at"]
            return _typed(
                cls(
                    _tags(value),
                    Trust(value["trust"]),
                    at and parse_time(at),
                    value["why"],
                    value.get("lasting", False),  # absent from states older than this
                )
            )
        except _GARBLED as exc:
            raise Corrupt(f"{what} lacks or garbles a field: {one_line(str(exc))}") from exc
