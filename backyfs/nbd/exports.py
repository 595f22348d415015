"""Exports: the names that NBD clients use, and what is behind them.

    VM/REVISION[/DISK][/pN][@rw]        REVISION[/DISK][/pN][@rw] where there is one VM only

REVISION is a SPEC (backyfs help spec) without a slash; of several revisions it means the newest. It
is resolved when a client connects, and reported as the revision's id. DISK is needed where there
are several; pN is a partition of the table that the backup found. `@rw` makes a writable overlay of
this connection alone. The empty name is the only export, if there is just one.

No part of a client's name reaches the file system before it passed the grammar of model.py.

Synchronous and safe from many threads; everything but a closed `Attached` may do input and output.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from backyfs.errors import BackyfsError, Corrupt, NoRepository, NoRevision, UsageError
from backyfs.model import Partition, Trust, disk_name, vm_name
from backyfs.nbd.attached import Attached
from backyfs.nbd.datamap import DataMap
from backyfs.nbd.protocol.constants import STRING_BYTES_MAX, ExportFlag
from backyfs.nbd.protocol.handshake import ExportInfo
from backyfs.reader.catalog import Catalog, Revision, Vm
from backyfs.reader.images import DiskImage, OpenImages
from backyfs.reader.overlay import Scratch
from backyfs.reader.shared import Lease
from backyfs.reader.spec import select
from backyfs.store.record import DiskRecord, Record

log = logging.getLogger(__name__)

LISTED_MAX = 16384
"""Most names that LIST shows; each VM gets its share, for its newest revisions."""
WRITABLE = "@rw"
_SPEC_CHARACTERS_MAX = 256

_READ_FLAGS = ExportFlag.HAS_FLAGS | ExportFlag.SEND_DF | ExportFlag.SEND_CACHE
_READ_ONLY_FLAGS = _READ_FLAGS | ExportFlag.READ_ONLY | ExportFlag.CAN_MULTI_CONN
_WRITABLE_FLAGS = (
    _READ_FLAGS
    | ExportFlag.SEND_FLUSH
    | ExportFlag.SEND_FUA
    | ExportFlag.SEND_TRIM
    | ExportFlag.SEND_WRITE_ZEROES
)


@dataclass(frozen=True, slots=True)
class Export:
    """What a name means at this moment: a disk of a revision, or a partition of it."""

    vm: Vm
    revision: Revision
    disk: DiskRecord
    partition: Partition | None
    writable: bool

    @property
    def info(self) -> ExportInfo:
        """What clients learn of it."""
        size = self.partition.length if self.partition else self.disk.size
        flags = _WRITABLE_FLAGS if self.writable else _READ_ONLY_FLAGS
        return ExportInfo(self.name, self.description, size, flags)

    @property
    def name(self) -> str:
        """The canonical name: works verbatim, and always means the same."""
        record = self.revision.record
        partition = f"p{self.partition.number}" if self.partition else ""
        several = len(record.disks) > 1 or partition in record.disks
        parts = [self.vm.name, record.id, self.disk.name if several else "", partition]
        return "/".join(filter(None, parts)) + (WRITABLE if self.writable else "")

    @property
    def description(self) -> str:
        """For people: when it was, and why it is kept."""
        state, record = self.revision.state, self.revision.record
        words = [f"{record.time.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"]
        if state.tags:
            words.append(", ".join(state.tags))
        if state.trust is Trust.DISTRUSTED:
            words.append("distrusted")
        if self.partition:
            words.append(f"partition {self.partition.number} {self.partition.filesystem}".rstrip())
        if self.writable:
            words.append("writes are dropped at disconnect")
        return "; ".join([f"{self.vm.name} {words[0]}", *words[1:]])


class Exports:
    """All exports of a catalog. `scratch` keeps overlays (None: there is no `@rw`)."""

    def __init__(
        self, catalog: Catalog, images: OpenImages, scratch: Scratch | None = None
    ) -> None:
        self._catalog, self._images, self._scratch = catalog, images, scratch
        self._maps: weakref.WeakKeyDictionary[DiskImage, DataMap] = weakref.WeakKeyDictionary()
        self._maps_lock = threading.Lock()

    @property
    def cache_bytes(self) -> int:
        """How much of what was decoded is kept, for all that are attached."""
        return self._images.cache.bytes_max

    # Names

    def listed(self) -> Iterator[tuple[str, str]]:
        """Names and descriptions, by VM, newest first; no more than LISTED_MAX."""
        for export in itertools.islice(self._all(), LISTED_MAX):
            yield export.name, export.description

    def _all(self) -> Iterator[Export]:
        vms = self._catalog.names()
        share = max(1, LISTED_MAX // max(1, len(vms)))
        for name in vms:
            try:
                vm = self._catalog.vm(name)
            except (BackyfsError, OSError) as exc:
                if type(exc) is not NoRepository:  # else it was just removed
                    log.warning("a VM is left out of the list", {"vm": name, "why": exc})
            else:
                yield from itertools.islice(_exports(vm), share)

    def find(self, name: str) -> Export:
        """What a name means. UsageError, NoRepository, NoRevision: with words for the client."""
        if not name:
            return self._only()
        if len(name) > STRING_BYTES_MAX:
            raise UsageError("the export name is too long")
        body = name.removesuffix(WRITABLE)
        vm, spec, rest = self._split(body)
        revision = self._revision(vm, spec)
        disk, partition = _place(revision.record, rest)
        return Export(vm, revision, disk, partition, writable=body != name)

    def _only(self) -> Export:
        found = list(itertools.islice(self._all(), 2))
        if len(found) == 1:
            return found[0]
        if not found:
            raise NoRevision("there is nothing to export yet")
        raise UsageError("name an export, as VM/REVISION: there are several (list them)")

    def _split(self, body: str) -> tuple[Vm, str, list[str]]:
        parts = body.split("/")
        only = self._catalog.only
        if only and (parts[0] != only or len(parts) == 1):
            parts.insert(0, only)
        if len(parts) < 2 or not all(parts):
            raise UsageError(f"{body!r} is no export name: write VM/REVISION[/DISK][/pN]")
        name, spec, *rest = parts
        return self._catalog.vm(vm_name(name)), spec, rest

    def _revision(self, vm: Vm, spec: str) -> Revision:
        if spec in vm.revisions:
            return vm.revisions[spec]
        if len(spec) > _SPEC_CHARACTERS_MAX:
            raise UsageError(f"a SPEC of {len(spec)} characters")
        pairs = [(revision.record, revision.state) for revision in vm.revisions.values()]
        found = select(spec, pairs, now=datetime.now(UTC))
        return vm.revisions[max(found, key=lambda record: record.seq).id]

    # What is behind them

    def open(self, export: Export) -> Attached:
        """Attach to an export. NoRevision, Corrupt, UsageError; OSError."""
        if export.writable and self._scratch is None:
            raise UsageError("this server keeps no overlays: only read-only exports")
        vm, record = export.vm, export.revision.record
        suspect = bool(vm.damage(record))
        lease = self._lease(vm, record, export.disk.name, suspect)
        try:
            overlay = None
            if export.writable and self._scratch is not None:
                overlay = self._scratch.overlay(lease.image)
            start = export.partition.start if export.partition else 0
            return Attached(export.info, lease, self.data_map, start=start, overlay=overlay)
        except BaseException:
            lease.close()
            raise

    def _lease(self, vm: Vm, record: Record, disk: str, suspect: bool) -> Lease[DiskImage]:
        try:
            return self._images.open(vm.repository, record, disk, check=suspect)
        except (Corrupt, NoRevision) as exc:
            if vm.repository.layout.record(record.id).exists():
                raise
            raise NoRevision(f"{vm.name}: revision {record.id} was just removed") from exc

    def data_map(self, image: DiskImage) -> DataMap:
        """Where an image holds data; made when first asked for, shared while the image is open."""
        with self._maps_lock:
            found = self._maps.get(image)
        if found is None:
            found = DataMap(image.extents())  # two who ask at once both make it: the same
            with self._maps_lock:
                self._maps[image] = found
        return found


def _exports(vm: Vm) -> Iterator[Export]:
    for revision in reversed(vm.revisions):
        for disk in vm.revisions[revision].record.disks.values():
            yield Export(vm, vm.revisions[revision], disk, None, writable=False)


def _place(record: Record, rest: list[str]) -> tuple[DiskRecord, Partition | None]:
    """The disk and the partition that the words behind REVISION name."""
    words = list(rest)
    if words and words[0] in record.disks:
        disk = record.disks[disk_name(words.pop(0))]
    elif len(words) > 1 or (words and not _is_partition(words[0])):
        raise NoRevision(f"{record.id} has no disk {words[0]!r}; it has: {', '.join(record.disks)}")
    elif len(record.disks) > 1:
        raise UsageError(f"{record.id} has several disks; name one: {', '.join(record.disks)}")
    else:
        (disk,) = record.disks.values()
    if not words:
        return disk, None
    if len(words) > 1 or not _is_partition(words[0]):
        raise UsageError(f"{'/'.join(rest)!r} is no disk or partition: write [DISK/]pN")
    return disk, _partition(record, disk, int(words[0][1:]))


def _is_partition(word: str) -> bool:
    return word[:1] == "p" and word[1:].isascii() and word[1:].isdigit() and len(word) <= 4


def _partition(record: Record, disk: DiskRecord, number: int) -> Partition:
    for partition in disk.partitions:
        if partition.number == number:
            if 0 <= partition.start < partition.start + partition.length <= disk.size:
                return partition
            raise NoRevision(f"{record.id}: partition {number} reaches beyond the disk")
    known = ", ".join(f"p{partition.number}" for partition in disk.partitions) or "none"
    raise NoRevision(f"{record.id}/{disk.name} has no partition {number}; it has: {known}")
