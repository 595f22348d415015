"""Names in the directory of one VM (docs/format.md, section 1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from backyfs.model import is_revision_id

RECORD_SUFFIX = ".json"
STATE_SUFFIX = ".state"
TEMPORARY_SUFFIX = ".tmp"


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one repository; knows no file's content."""

    path: Path

    @property
    def identity(self) -> Path:
        """repository.json"""
        return self.path / "repository.json"

    @property
    def lock(self) -> Path:
        """Target of the writer's flock; holds the writer's intent."""
        return self.path / "lock"

    @property
    def meta_lock(self) -> Path:
        """Target of the flock around a change of a state file."""
        return self.path / "lock.meta"

    @property
    def revisions(self) -> Path:
        """Directory of records, states, maps and images."""
        return self.path / "revisions"

    @property
    def packs(self) -> Path:
        """Directory of pack files."""
        return self.path / "packs"

    @property
    def quarantine(self) -> Path:
        """Directory of the records of damaged frames."""
        return self.path / "quarantine"

    @property
    def reports(self) -> Path:
        """Directory of the evidence of revisions that differ from their source."""
        return self.path / "reports"

    def record(self, revision: str) -> Path:
        """The record of a revision."""
        return self.revisions / f"{revision}{RECORD_SUFFIX}"

    def state(self, revision: str) -> Path:
        """The state of a revision."""
        return self.revisions / f"{revision}{STATE_SUFFIX}"


def owner(name: str) -> str:
    """The revision id a file name in revisions/ or packs/ begins with, or ""."""
    head = name[:21]
    rest = name[21:]
    return head if is_revision_id(head) and rest[:1] in (".", "-") else ""
