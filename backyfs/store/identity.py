"""repository.json: what kind of repository a directory is, and which features it needs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from backyfs.errors import Corrupt, NoRepository, Unsupported
from backyfs.model import FRAME
from backyfs.store.fs import is_medium_error, read_file
from backyfs.store.layout import RECORD_SUFFIX, Layout
from backyfs.store.record import FORMAT, sealed, timestamp, unsealed

PACKS = "packs"
COW = "cow"

HINT_LOST = (
    "the revisions are still there: put repository.json back from a copy of the directory; "
    "without one: docs/operations.md, When data is damaged"
)


_DIRECTORIES = ("revisions", "packs", "quarantine", "reports", "usage")


class Identity(NamedTuple):
    """The unchanging facts of a repository. `writable` is False with an unknown ro_compat."""

    uuid: UUID
    store: str
    created: str
    writable: bool = True

    @classmethod
    def new(cls, store: str) -> Identity:
        """A fresh identity for a repository of format `store`."""
        return cls(uuid4(), store, timestamp(datetime.now(UTC)))

    def encode(self) -> bytes:
        """The bytes of repository.json."""
        return sealed(
            {
                "format": FORMAT,
                "uuid": str(self.uuid),
                "store": self.store,
                "frame": FRAME,
                "hash": "blake3",
                "compression": "zstd:1" if self.store == PACKS else "none",
                "features": {"incompat": [], "ro_compat": [], "compat": []},
                "created": self.created,
            }
        )


def read_identity(path: Path) -> Identity:
    """The identity in the file `path`; NoRepository, Unsupported or Corrupt."""
    try:
        value = unsealed(_read(path), str(path))
    except Corrupt as exc:
        raise Corrupt(exc.reason, hint=HINT_LOST) from exc
    _refuse_unknown(value, path)
    _refuse_links(path.parent)
    try:
        features = value["features"]
        return Identity(
            UUID(value["uuid"]), value["store"], str(value["created"]), not features["ro_compat"]
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise Corrupt(f"{path} lacks or garbles a field: {exc}", hint=HINT_LOST) from exc


def lost_in(directory: Path) -> bool:
    """Whether there are revisions, so that a repository.json that is not there was lost."""
    return any(Layout(directory).revisions.glob(f"*{RECORD_SUFFIX}"))


def _read(path: Path) -> bytes:
    try:
        return read_file(path)
    except (FileNotFoundError, NotADirectoryError) as exc:
        if lost_in(path.parent):
            raise NoRepository(
                f"{path.parent} has revisions, but no repository.json", hint=HINT_LOST
            ) from exc
        raise NoRepository(
            f"{path.parent}: no repository here",
            hint="name one with -b DIR, or make one with: backyfs -b DIR init file IMAGE",
        ) from exc
    except OSError as exc:
        if not is_medium_error(exc):
            raise
        raise Corrupt(f"{path} cannot be read: {exc.strerror}") from exc


def _refuse_links(directory: Path) -> None:
    """Corrupt where a directory of the repository is a symbolic link.

    It would lead to files of another VM, or of nobody's business here; gc would remove them.
    """
    for path in (directory / name for name in _DIRECTORIES):
        if path.is_symlink():
            raise Corrupt(
                f"{path} is a symbolic link",
                hint="see where it leads: it may belong to another VM. If it is yours, make a"
                " directory in its place: move the data there, or mount --bind it",
            )


def _refuse_unknown(value: Mapping[str, Any], path: Path) -> None:
    features = value.get("features")
    incompat = features.get("incompat") if isinstance(features, dict) else None
    for name, known in (("format", (FORMAT,)), ("store", (PACKS, COW)), ("frame", (FRAME,))):
        if value.get(name) not in known:
            raise Unsupported(
                f"{path}: {name} is {value.get(name)!r}; this program knows"
                f" {', '.join(map(str, known))}",
                hint="use a newer backyfs",
            )
    if value.get("hash") != "blake3" or incompat:
        raise Unsupported(
            f"{path} needs a feature this program does not know: {incompat or value.get('hash')}",
            hint="use a newer backyfs",
        )
