"""A sample found that a new revision differs from its source: what is kept, and who is doubted.

The revision is published, because it is the newest there is and most of it is right, but as
distrusted: nobody relies on it, and the next backup reads everything. Contents, hashes and places
are kept as a report.

An older revision is doubted, too, if it has one of the wrong frames and took it over unread: nobody
knows since when the source has had it otherwise. That ends, frame by frame, at the revision that
stored it, and for all at one that read its whole source: those saw what they hold. Others stay as
they are: that a source left out one change is no evidence against what was never found wrong.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime

from backyfs.engine.sampling import Sampled, Wrong
from backyfs.engine.trust import distrust
from backyfs.errors import BackyfsError, Corrupt
from backyfs.log import TOLD
from backyfs.model import FRAME
from backyfs.store.contract import StoredImage
from backyfs.store.record import Record, timestamp
from backyfs.store.reports import Content, Mismatch, Report
from backyfs.store.repository import Repository
from backyfs.store.staging import Staging

log = logging.getLogger(__name__)


def denounce(repository: Repository, staging: Staging, base: Record, sampled: Sampled) -> None:
    """Keep the evidence against a sealed revision and distrust older ones it speaks against.

    Never fails for want of space: what cannot be kept is logged.
    """
    older = doubted(repository, sampled.wrong)
    report = Report(
        revision=staging.revision,
        base=base.id,
        found=timestamp(datetime.now(UTC)),
        sampled_frames=sampled.frames,
        wrong_frames=sampled.wrong_frames,
        frames=tuple(Mismatch(w.disk, *w.extent, w.stored, w.source) for w in sampled.wrong),
        doubted=tuple(record.id for record in older),
    )
    values = {"revision": staging.revision, "reason": str(sampled), "doubted": len(older)}
    log.error("revision differs from its source", values, extra=TOLD)
    with _if_it_can_be("the evidence cannot be kept"):
        repository.reports.keep(report, list(_contents(staging, sampled.wrong)))
    why = f"it may be wrong where {staging.revision} differs from its source"
    for record in older:
        with _if_it_can_be("an older revision cannot be distrusted"):
            distrust(repository, [record], why, lasting=True)


@contextlib.contextmanager
def _if_it_can_be(otherwise: str) -> Iterator[None]:
    try:
        yield
    except (OSError, BackyfsError) as exc:
        log.error(otherwise, {"reason": str(exc)})


def _contents(staging: Staging, wrong: Sequence[Wrong]) -> Iterator[Content]:
    for disk, extent, _, _, content in wrong:
        if content:
            stored: bytes | None = None
            try:
                stored = staging.image(disk).read(*extent)
            except Corrupt as exc:
                log.warning("a wrong frame cannot be read", {"reason": exc.message})
            yield Content(disk, extent.offset, stored, content)


def doubted(repository: Repository, wrong: Collection[Wrong]) -> list[Record]:
    """The revisions, newest first, that took over one of these frames unread."""
    row = repository.revisions()[::-1]
    found = []
    here = _held(repository, row[0], wrong) if row else set()
    for record, older in zip(row, [*row[1:], None], strict=True):
        if not here or record.stats.believed == 0:
            break
        here = here if older is None else _held(repository, older, here)
        if here:
            found.append(record)
    return found


def _held(repository: Repository, record: Record, wrong: Collection[Wrong]) -> set[Wrong]:
    """Those of the wrong frames that this revision has, too; also those nobody can tell of."""
    found: set[Wrong] = set()
    for name in record.disks:
        mine = {item for item in wrong if item.disk == name}
        try:
            with closing(repository.open_disk(record, name)) as image:
                found |= {w for w in mine if w.extent.end <= image.size and _has(image, w)}
        except BackyfsError:
            found |= mine
    return found


def _has(image: StoredImage, wrong: Wrong) -> bool:
    return image.hashes(wrong.extent.offset // FRAME, 1).hex() == wrong.stored
