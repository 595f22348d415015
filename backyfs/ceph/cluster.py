"""A connection to a Ceph cluster, and RBD images opened through it.

Calls block and may be made from many threads; the binding gives up the interpreter's lock. Each is
bounded by the times in the settings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from backyfs.ceph.failure import explained, failure, timed_out
from backyfs.ceph.settings import Settings, completed
from backyfs.ceph.spec import ImageSpec
from backyfs.errors import BackyfsError, ConfigError, SourceUnavailable


def check_binding(kind: type[BackyfsError] = SourceUnavailable) -> None:
    """An error of `kind` that names the package, unless librbd's binding can be loaded."""
    try:
        import rados  # noqa: F401
        import rbd  # noqa: F401
    except ImportError as exc:
        raise kind(
            f"the Python binding of Ceph RBD cannot be loaded: {exc}",
            hint="apt install python3-rbd, then: make setup (see: backyfs doctor)",
        ) from exc


class Cluster:
    """A connected cluster. What fails is raised as `kind`, the error of whoever uses it."""

    def __init__(self, rados: Any, settings: Settings, kind: type[BackyfsError]) -> None:
        self.rados, self.settings, self.kind = rados, settings, kind

    @contextlib.contextmanager
    def pool(self, spec: ImageSpec) -> Iterator[Any]:
        """The I/O context of an image's pool and namespace; an error names what is not there.

        What finds the pool full fails at once, instead of waiting for room.
        """
        import rados

        what = f"use the pool {spec.pool!r}"
        try:
            with explained(what, self.kind):
                ioctx = self.rados.open_ioctx(spec.pool)
        except BackyfsError as exc:
            if isinstance(exc.__cause__, rados.ObjectNotFound):
                raise self.kind(
                    f"there is no pool {spec.pool!r} in the cluster", hint="see: ceph osd lspools"
                ) from exc
            raise
        with contextlib.closing(ioctx):
            ioctx.set_namespace(spec.namespace)
            ioctx.set_osdmap_full_try()
            yield ioctx

    def give_up(self) -> None:
        """Wait a second at most for each request from now on: the cluster answers no more.

        Closing an image takes several requests, each with the wait that the settings allow.
        """
        import rados

        with contextlib.suppress(rados.Error):
            for option in ("rados_osd_op_timeout", "rados_mon_op_timeout"):
                self.rados.conf_set(option, "1")

    @contextlib.contextmanager
    def image(
        self, spec: ImageSpec, *, snapshot: str | None = None, read_only: bool = False
    ) -> Iterator[Any]:
        """An `rbd.Image`, open while entered, at its head or at one of its snapshots.

        One handle serves many threads. An image (or snapshot) that is not there is an error of
        `kind`, caused by rbd.ImageNotFound.
        """
        import rbd

        name = f"{spec}@{snapshot}" if snapshot else str(spec)
        with self.pool(spec) as ioctx:
            try:
                image = rbd.Image(ioctx, spec.image, snapshot=snapshot, read_only=read_only)
            except rbd.ImageNotFound as exc:
                raise self.kind(
                    f"there is no RBD image {name}", hint=_whereabouts(ioctx, spec)
                ) from exc
            except rbd.Error as exc:
                raise failure(f"open {name}", self.kind, exc) from exc
            try:
                yield image
            except BackyfsError as exc:
                if timed_out(exc):
                    self.give_up()
                raise
            finally:
                with contextlib.suppress(rbd.Error):  # hung: all that mattered has been flushed
                    image.close()


@contextlib.contextmanager
def connected(
    settings: Settings, kind: type[BackyfsError] = SourceUnavailable
) -> Iterator[Cluster]:
    """A connection while entered.

    ConfigError when Ceph's own configuration cannot be read; an error of `kind` without the
    binding, when no monitor answers, and when the client is refused.
    """
    check_binding(kind)
    settings = completed(settings)
    with explained("connect to the Ceph cluster", kind):
        rados = _configured(settings)
        try:
            _connect(rados, kind)
        except BaseException:
            rados.shutdown()
            raise
    try:
        yield Cluster(rados, settings, kind)
    finally:
        rados.shutdown()


def _connect(cluster: Any, kind: type[BackyfsError]) -> None:
    import rados

    try:
        cluster.connect()
    except rados.ObjectNotFound as exc:
        client = f"client.{cluster.rados_id}"
        raise kind(
            f"cannot connect to the Ceph cluster: no keyring has a key for {client}",
            hint=f"see /etc/ceph/ceph.{client}.keyring, or name it: CEPH_ARGS='--keyring FILE'",
        ) from exc


def _configured(settings: Settings) -> Any:
    import rados

    try:
        cluster = rados.Rados(
            rados_id=settings.client, clustername=settings.cluster, conffile=settings.conf
        )
    except rados.ObjectNotFound as exc:
        where = settings.conf or f"/etc/ceph/{settings.cluster}.conf"
        raise ConfigError(
            f"there is no configuration of a Ceph cluster at {where}",
            hint="set `conf` in the job's source, or CEPH_CONF",
        ) from exc
    cluster.conf_parse_env("CEPH_ARGS")
    for option, value in settings.timeouts().items():
        cluster.conf_set(option, value)
    return cluster


def _whereabouts(ioctx: Any, spec: ImageSpec) -> str:
    """What to do about an image that is not there: it may only be in the trash."""
    import rbd

    with contextlib.suppress(rbd.Error):
        if any(entry["name"] == spec.image for entry in rbd.RBD().trash_list(ioctx)):
            return "one of that name is in the trash: see `rbd trash ls`"
    return f"see: rbd ls {'/'.join(part for part in spec[:2] if part)}"
