"""The scratch views a process offers: one overlay for each disk, shared by all who open it.

A view is made when a disk is first opened for writing (or its writable file for reading). What was
written stays as long as anybody has it open and for `idle_s` after that; then the overlay is
dropped, and who opens the disk again sees the revision's bytes. A view that was never written to is
dropped `LINGER_S` after its last use.

As long as there is a view its revision is in use: it is not removed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from backyfs.reader.images import LINGER_S, DiskImage, OpenImages
from backyfs.reader.overlay import Scratch
from backyfs.reader.shared import Lease, SharedImages
from backyfs.store.record import Record
from backyfs.store.repository import Repository

log = logging.getLogger(__name__)

IDLE_S = 600.0
VIEWS_MAX = 128


@dataclass(frozen=True, slots=True)
class DiskName:
    """A disk of the store: directory of the repository, id of the revision, name."""

    repository: str
    revision: str
    disk: str


class View:
    """The overlay of a disk, which says when it is dropped."""

    def __init__(self, name: DiskName, lease: Lease[DiskImage], scratch: Scratch) -> None:
        self._name, self._lease = name, lease
        try:
            self.overlay = scratch.overlay(lease.image)
        except BaseException:
            lease.close()
            raise

    def close(self) -> None:
        """Drop what was written."""
        used = self.overlay.used_bytes
        if self.overlay.changed_ns:
            values = {"revision": self._name.revision, "disk": self._name.disk, "bytes": used}
            log.info("what was written is dropped", values)
        self.overlay.close()
        self._lease.close()


class ScratchViews:
    """The views of one process. At most `views_max`; those with changes are never dropped early."""

    def __init__(
        self,
        scratch: Scratch,
        *,
        idle_s: float = IDLE_S,
        views_max: int = VIEWS_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scratch, self._idle_s = scratch, idle_s
        self._views = SharedImages[DiskName, View](
            images_max=views_max, linger_s=self._linger_s, expendable=False, clock=clock
        )

    def _linger_s(self, view: View) -> float:
        return self._idle_s if view.overlay.changed_ns else min(LINGER_S, self._idle_s)

    def open(
        self,
        images: OpenImages,
        repository: Repository,
        record: Record,
        disk: str,
        *,
        check: bool = False,
    ) -> Lease[View]:
        """A lease of a disk's view. NoRevision, Corrupt; OSError, ENFILE when there are too many.

        `check`: see OpenImages; counts when the view is made.
        """
        name = DiskName(str(repository.path), record.id, disk)

        def make() -> View:
            lease = images.open(repository, record, disk, check=check)
            return View(name, lease, self._scratch)

        return self._views.open(name, make)

    def changed_ns(self, repository: Repository, record: Record, disk: str) -> int:
        """When a disk's view was last written to (Unix time), 0 if it was not; never blocks."""
        view = self._views.get(DiskName(str(repository.path), record.id, disk))
        return view.overlay.changed_ns if view is not None else 0

    def sweep(self) -> None:
        """Drop what nobody has used for long enough; to be called about once per second."""
        self._views.sweep()

    def close(self) -> None:
        """Drop all; for the end of the process."""
        self._views.close()
        self._scratch.close()
