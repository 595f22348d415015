"""Reports: evidence of frames that a revision holds and its source had otherwise.

One sealed JSON file per revision, and of some of the frames both contents as plain files. Written
once, before the revision is published; nothing but an operator removes them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from backyfs.errors import Corrupt
from backyfs.model import is_revision_id
from backyfs.store.fs import SYSTEM, Fs, prepare, read_file
from backyfs.store.record import FORMAT, sealed, unsealed

WITH_CONTENT_MAX = 32
"""Reports with contents (2 MiB each at most); where there are more, later ones have none."""


class Mismatch(NamedTuple):
    """A frame: its place in the image, and the hashes (hex) of what is stored and of the source's.

    A frame of zeros has a hash of zeros.
    """

    disk: str
    offset: int
    length: int
    stored: str
    source: str


class Content(NamedTuple):
    """What there is of a frame: as stored (None: it cannot be read) and as the source had it."""

    disk: str
    offset: int
    stored: bytes | None
    source: bytes


@dataclass(frozen=True, slots=True)
class Report:
    """What a sample found of a revision. `base`: the one whose frames it took over.

    `frames` are the first of `wrong_frames`. `doubted`: older revisions that may be wrong in them.
    `found`: when, as a timestamp.
    """

    revision: str
    base: str
    found: str
    sampled_frames: int
    wrong_frames: int
    frames: tuple[Mismatch, ...]
    doubted: tuple[str, ...] = ()

    def encode(self) -> bytes:
        """The report as the bytes of its file."""
        value: dict[str, Any] = asdict(self) | {"format": FORMAT}
        value["frames"] = [frame._asdict() for frame in self.frames]
        return sealed(value)

    @classmethod
    def decode(cls, data: bytes, what: str) -> Report:
        """The report in the bytes of a file; Corrupt when it is none."""
        value = unsealed(data, what)
        try:
            return cls(
                value["revision"],
                value["base"],
                value["found"],
                int(value["sampled_frames"]),
                int(value["wrong_frames"]),
                tuple(Mismatch(**frame) for frame in value["frames"]),
                tuple(value["doubted"]),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise Corrupt(f"{what} lacks or garbles a field: {exc}") from exc


class Reports:
    """The directory of a repository's reports. Stateless; safe from many threads."""

    def __init__(self, directory: Path, fs: Fs = SYSTEM) -> None:
        self._directory, self._fs = directory, fs

    def path(self, revision: str) -> Path:
        """The report about a revision; its contents' names begin the same."""
        return self._directory / f"{revision}.json"

    def revisions(self) -> list[str]:
        """Ids of the revisions there are reports about, oldest first; from the names alone."""
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        found = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return sorted(revision for revision in found if is_revision_id(revision))

    def read(self, revision: str) -> Report:
        """The report about a revision; Corrupt when it cannot be read."""
        path = self.path(revision)
        try:
            return Report.decode(read_file(path), str(path))
        except OSError as exc:
            raise Corrupt(f"{path} cannot be read: {exc.strerror}") from exc

    def keep(self, report: Report, contents: Sequence[Content]) -> Path:
        """Keep a report, durably; returns its path. NoSpace, OSError."""
        self._fs.mkdir(self._directory)
        if len(self.revisions()) < WITH_CONTENT_MAX:
            self._keep(report.revision, contents)
        path = self.path(report.revision)
        prepare(path, report.encode(), self._fs)
        self._fs.sync_dir(self._directory)
        self._fs.sync_dir(self._directory.parent)
        return path

    def _keep(self, revision: str, contents: Iterable[Content]) -> None:
        for content in contents:
            stem = f"{revision}.{content.disk}.{content.offset}"
            for side, data in (("stored", content.stored), ("source", content.source)):
                if data is not None:
                    prepare(self._directory / f"{stem}.{side}", data, self._fs)
