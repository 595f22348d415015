"""Values every layer shares: names and their grammar, extents, trust, consistency, quiescing,
partitions.

Frozen, without I/O. A name that passed its function here is safe as a part of a path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from random import SystemRandom
from typing import NamedTuple

from backyfs.errors import UsageError

FRAME = 65536
"""Bytes of one frame: the unit of hashing, compression and reading."""

DEFAULT_DISK = "disk"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+: -]{0,63}")
_REVISION = re.compile(r"\d{8}T\d{6}Z-[0-9a-z]{4}")
_SUFFIX_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"


def _checked(pattern: re.Pattern[str], kind: str, allowed: str, text: str) -> str:
    if pattern.fullmatch(text) and not text.endswith(" "):
        return text
    raise UsageError(
        f"{text!r} is no {kind} name",
        hint=f"use a letter or digit, then up to 63 of: letters, digits, {allowed}",
    )


def vm_name(text: str) -> str:
    """Return `text` if it is a valid VM name; raise UsageError otherwise."""
    return _checked(_NAME, "VM", ". _ + -", text)


def disk_name(text: str) -> str:
    """Return `text` if it is a valid disk name; raise UsageError otherwise."""
    return _checked(_NAME, "disk", ". _ + -", text)


def tag_name(text: str) -> str:
    """Return `text` if it is a valid tag (as a name, also ':' and blanks inside)."""
    return _checked(_TAG, "tag", ". _ + - : and blank", text)


def is_name(text: str) -> bool:
    """Whether `text` is a valid VM or disk name."""
    return _NAME.fullmatch(text) is not None


def is_revision_id(text: str) -> bool:
    """Whether `text` has the form of a revision id, such as 20261121T220112Z-7f3a."""
    return _REVISION.fullmatch(text) is not None


def new_revision_id(time: datetime) -> str:
    """A fresh revision id: `time` in UTC to the second and four random characters."""
    suffix = "".join(SystemRandom().choices(_SUFFIX_ALPHABET, k=4))
    return f"{time.astimezone(UTC):%Y%m%dT%H%M%SZ}-{suffix}"


class Trust(StrEnum):
    """What we think of a revision: a judgement, never computed from damage."""

    TRUSTED = "trusted"
    VERIFIED = "verified"
    DISTRUSTED = "distrusted"


class Consistency(StrEnum):
    """How the disks of a revision relate to a point in time; ordered by `rank`."""

    TORN = "torn"
    CRASH = "crash"
    FILESYSTEM = "filesystem"
    APPLICATION = "application"
    OFFLINE = "offline"

    @property
    def rank(self) -> int:
        """0 (torn) to 3 (application and offline, which are equally good)."""
        return _RANK[self]


_RANK = {
    Consistency.TORN: 0,
    Consistency.CRASH: 1,
    Consistency.FILESYSTEM: 2,
    Consistency.APPLICATION: 3,
    Consistency.OFFLINE: 3,
}


@dataclass(frozen=True, slots=True)
class Quiescing:
    """What came of making the guest hold still: `result` is none (nobody tried), done or failed.

    `frozen_s`: seconds from the beginning of freezing until the guest was thawed.
    """

    result: str = "none"
    frozen_s: float = 0.0


class Extent(NamedTuple):
    """A byte range of an image: `offset` >= 0, `length` > 0."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first byte behind the extent."""
        return self.offset + self.length


class Partition(NamedTuple):
    """A slice of an image, as its partition table says.

    `number` counts from 1 as Linux does, `start` and `length` are bytes, `type` is the GPT type
    uuid or the MBR type as two hex digits, `filesystem` what its first sectors look like ("" =
    not recognised).
    """

    number: int
    start: int
    length: int
    type: str
    name: str
    filesystem: str
