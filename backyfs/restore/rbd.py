"""Restoring to an RBD image of a Ceph cluster.

A new image has Ceph's defaults (features, object size, data pool). It is written under a
temporary name beside it and renamed when it is complete. An existing one keeps its id, features,
snapshots and parent; it gets the disk's size, and its first bytes last.

Zeros are made by librbd's write_zeroes, which frees whole objects and hides what a clone's parent
has there. A discard promises neither: librbd leaves out what is smaller than 64 KiB.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from backyfs.ceph.cluster import Cluster, connected
from backyfs.ceph.failure import explained, failure, timed_out
from backyfs.ceph.settings import Settings
from backyfs.ceph.spec import ImageSpec, image_spec
from backyfs.errors import BackyfsError, TargetError
from backyfs.extents import Gathered
from backyfs.model import Extent
from backyfs.restore.regular import HEAD_BYTES, PARTIAL_SUFFIX

log = logging.getLogger(__name__)

SCHEME = "rbd:"
DEPTH = 8
"""Writes in flight: more gain nothing, fewer leave daemons idle (4 to 16 were tried)."""
_FAST_DIFF = 16  # feature bit


def rbd_spec(where: str) -> ImageSpec:
    """The image that `rbd:POOL[/NAMESPACE]/IMAGE` names. UsageError."""
    return image_spec(where.removeprefix(SCHEME))


class _Writes:
    """Writes that have begun and not ended: at most DEPTH, which bounds the memory. Many threads.

    Of those that fail the first is told to who comes next.
    """

    def __init__(self) -> None:
        self._free = threading.Semaphore(DEPTH)
        self._ending = threading.Lock()
        self._failed = 0

    def run(self, start: Callable[[Callable[[Any], None]], object]) -> None:
        """Call `start` with what to call at the end, once there are few enough. rbd.Error."""
        self._free.acquire()
        try:
            self._check()
            start(self._ended)
        except BaseException:
            self._free.release()
            raise

    def end(self) -> None:
        """Wait for all. rbd.Error."""
        with self._ending:
            for _ in range(DEPTH):
                self._free.acquire()
            self._free.release(DEPTH)
        self._check()

    def _ended(self, completion: Any) -> None:
        self._failed = self._failed or min(0, completion.get_return_value())
        self._free.release()

    def _check(self) -> None:
        import rbd

        if self._failed:
            raise rbd.OSError("a write failed", -self._failed)


class _RbdImage:
    """An open image. `held` closes it and the connection, last things first."""

    in_order = False
    writers = 2
    batch_bytes = 4 << 20  # an object, by default

    def __init__(self, cluster: Cluster, spec: ImageSpec, held: contextlib.ExitStack) -> None:
        self.name = f"{SCHEME}{spec}"
        self._cluster, self._spec, self._held = cluster, spec, held
        self._image: Any = None
        self._writes = _Writes()
        self._open = True

    def reserve(self, extents: Iterable[Extent]) -> None:
        """Nothing to do: a pool promises nobody room."""

    def write(self, offset: int, data: memoryview) -> None:
        """Begin to write `data` at byte `offset`; raises what went wrong with earlier writes."""
        with self._writing():
            self._writes.run(lambda ended: self._image.aio_write(bytes(data), offset, ended))

    def zero(self, offset: int, length: int) -> None:
        """Make a range of less than 2 GiB read as zeros; frees whole objects."""
        with self._writing():
            self._image.write_zeroes(offset, length)

    def settle(self) -> None:
        """Have everything on the storage daemons."""
        with self._writing():
            self._writes.end()
            self._image.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with explained(f"write to {self.name}", TargetError):
                yield
        except TargetError as exc:
            if timed_out(exc):
                self._cluster.give_up()
            raise

    def _close(self) -> None:
        self._open = False
        with explained(f"close {self.name}", TargetError):
            self._held.close()


class NewImage(_RbdImage):
    """An image that does not exist before the restore is complete."""

    holes_are_zero = True
    head_bytes = 0

    def __init__(
        self, cluster: Cluster, spec: ImageSpec, size: int, held: contextlib.ExitStack
    ) -> None:
        import rbd

        super().__init__(cluster, spec, held)
        self._pool = held.enter_context(cluster.pool(spec))
        self._partial = spec._replace(image=f"{spec.image}.{os.urandom(4).hex()}{PARTIAL_SUFFIX}")
        with explained(f"create {self.name}", TargetError), _in_namespace(spec):
            rbd.RBD().create(self._pool, self._partial.image, size, old_format=False)
        self._closing = held.enter_context(contextlib.ExitStack())
        try:
            self._image = self._closing.enter_context(cluster.image(self._partial))
        except BackyfsError:
            self._remove()
            raise

    def finish(self) -> None:
        """Have all of it on the storage daemons, then give it its name."""
        import rbd

        self.settle()
        self._closing.close()
        with explained(f"name the restored image {self.name}", TargetError):
            rbd.RBD().rename(self._pool, self._partial.image, self._spec.image)
        self._close()

    def abandon(self) -> None:
        """Remove the unfinished image."""
        if self._open:
            with contextlib.suppress(BackyfsError), explained("close", TargetError):
                self._closing.close()
            self._remove()
            with contextlib.suppress(BackyfsError):
                self._close()

    def _remove(self) -> None:
        import rbd

        try:
            rbd.RBD().remove(self._pool, self._partial.image)
        except rbd.Error as exc:
            log.warning(
                "an unfinished image is left: remove it with `rbd rm`",
                {"image": str(self._partial), "reason": str(exc)},
            )


class ExistingImage(_RbdImage):
    """An image that is overwritten; opening the target takes its head away, unless `keep`.

    With `keep` what it holds can be read and stays where it is not written.
    """

    holes_are_zero = False
    head_bytes = HEAD_BYTES

    def __init__(
        self,
        cluster: Cluster,
        spec: ImageSpec,
        size: int,
        held: contextlib.ExitStack,
        *,
        force: bool = False,
        keep: bool = False,
    ) -> None:
        super().__init__(cluster, spec, held)
        self._size = size
        self._image = held.enter_context(cluster.image(spec))
        if not force:
            _refuse_in_use(self._image, spec, cluster)
        _take_lock(self._image, spec)
        with self._writing():
            if self._image.size() != size:
                self._image.resize(size)
        if not keep and size:
            self.zero(0, min(HEAD_BYTES, size))
            self.settle()

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of what the image holds now."""
        with explained(f"read {self.name}", TargetError):
            data: bytes = self._image.read(offset, length)
        if len(data) != length:
            raise TargetError(f"cannot read {self.name}: {len(data)} of {length} bytes at {offset}")
        return data

    def data(self) -> Iterator[Extent]:
        """Sorted extents that may hold something else than zeros, of a parent, too.

        Asks for each object: the quick way, by the object map alone, can miss some (facts of
        librbd 16.2) and reading takes far longer anyway.
        """
        return iter(_data(self._image, self._size, self.name))

    def finish(self) -> None:
        """Have everything on the storage daemons."""
        self.settle()
        self._close()

    def abandon(self) -> None:
        """Give the image back; without its first bytes it shows no partitions."""
        if self._open:
            with contextlib.suppress(BackyfsError):
                self._close()


def open_image(
    spec: ImageSpec, size: int, settings: Settings, *, force: bool = False, keep: bool = False
) -> NewImage | ExistingImage:
    """The image as a target for a disk of `size` bytes. TargetError, NoSpace, ConfigError.

    One that is in use, or locked, is refused unless `force`d; one of another size is resized.
    """
    with contextlib.ExitStack() as held:
        cluster = held.enter_context(connected(settings, TargetError))
        # A cache would take writes that fail later, and tell at the next flush only.
        cluster.rados.conf_set("rbd_cache", "false")
        target: NewImage | ExistingImage
        if _exists(cluster, spec):
            target = ExistingImage(cluster, spec, size, held, force=force, keep=keep)
        else:
            target = NewImage(cluster, spec, size, held)
        target._held = held.pop_all()
    return target


def loses(spec: ImageSpec, size: int, settings: Settings) -> bool:
    """Whether a restore of `size` bytes takes something away: data of an image, or its size.

    An image whose objects cannot be looked up at once (no valid fast-diff) counts as one that
    holds data.
    """
    with connected(settings, TargetError) as cluster:
        if not _exists(cluster, spec):
            return False
        with cluster.image(spec, read_only=True) as image:
            with explained(f"look at {spec}", TargetError):
                quick = image.features() & _FAST_DIFF and not image.flags()
                differs = image.size() != size
            return differs or not quick or bool(_data(image, size, str(spec), roughly=True))


@contextlib.contextmanager
def _in_namespace(spec: ImageSpec) -> Iterator[None]:
    """Where something is missing to make an image, that is its namespace."""
    import rbd

    try:
        yield
    except rbd.ImageNotFound as exc:
        raise TargetError(
            f"there is no namespace {spec.namespace!r} in the pool {spec.pool!r}",
            hint=f"rbd namespace create {spec.pool}/{spec.namespace}",
        ) from exc


def _exists(cluster: Cluster, spec: ImageSpec) -> bool:
    import rbd

    try:
        with cluster.image(spec, read_only=True):
            return True
    except TargetError as exc:
        if isinstance(exc.__cause__, rbd.ImageNotFound):
            return False
        raise


def _data(image: Any, size: int, name: str, *, roughly: bool = False) -> list[Extent]:
    """What may hold data; `roughly` by the object map alone, where there is one."""
    if not size:  # asked about nothing at all, librbd 16.2.15 aborts the process
        return []
    found = Gathered()

    def note(offset: int, length: int, exists: bool) -> None:
        # What it says does not exist need not be zero where a parent shows through.
        found.add(offset, length)

    with explained(f"see what {name} holds", TargetError):
        image.diff_iterate(0, size, None, note, whole_object=roughly)
    return found.extents()


def _refuse_in_use(image: Any, spec: ImageSpec, cluster: Cluster) -> None:
    """TargetError while another client has the image open for writing, such as a running VM."""
    with explained(f"see who uses {spec}", TargetError):
        ours = cluster.rados.get_instance_id()
        others = [w["addr"] for w in image.watchers_list() if w["id"] != ours]
    if others:
        raise TargetError(
            f"{SCHEME}{spec} is in use by a client at {', '.join(sorted(others))}",
            hint=f"stop it (a running VM? see: rbd status {spec}; one that died goes in 30 s),"
            " or give --force",
        )


def _take_lock(image: Any, spec: ImageSpec) -> None:
    """Keep other clients from writing meanwhile, where the image has the feature for it.

    Those that gave the lock away when asked, as a running VM does, get errors when they write.
    """
    import rbd

    try:
        image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
    except rbd.InvalidArgument:
        pass  # an image without exclusive-lock
    except (rbd.ReadOnlyImage, rbd.ImageBusy) as exc:
        raise TargetError(
            f"{SCHEME}{spec} is locked by another client",
            hint=f"stop it: see rbd status {spec}, rbd lock ls {spec}",
        ) from exc
    except rbd.Error as exc:
        raise failure(f"lock {SCHEME}{spec}", TargetError, exc) from exc
