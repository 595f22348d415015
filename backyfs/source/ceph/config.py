"""The keys of a source of type `ceph-rbd`; `pool`, `image` and `full-always` are Backy's.

{type: ceph-rbd, pool: rbd, image: web01}
{type: ceph-rbd, pool: rbd, images: {root: web01-root, data: ssd/tenant/web01-data}}
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from backyfs.ceph.settings import Settings
from backyfs.ceph.spec import ImageSpec, image_spec
from backyfs.config.interval import parse_interval
from backyfs.errors import ConfigError, UsageError
from backyfs.model import DEFAULT_DISK, is_name

KEYS = (
    "pool",
    "namespace",
    "image",
    "images",
    "full-always",
    "conf",
    "client",
    "cluster",
    "connect-timeout",
    "monitor-timeout",
    "osd-timeout",
)
_CLOSE_TO_CLIENT = ("id", "user", "name")


class Config(NamedTuple):
    """The images of a VM by disk name, and the cluster they are in.

    `full_always`: every backup reads everything, and no snapshot stays at the images.
    """

    images: Mapping[str, ImageSpec]
    cluster: Settings = Settings()
    full_always: bool = False


def read_config(settings: Mapping[str, Any]) -> Config:
    """What a job's `source` section (without `type`) says; ConfigError."""
    _check_keys(settings)
    full = settings.get("full-always", False)
    if not isinstance(full, bool):
        raise ConfigError(f"source ceph-rbd: `full-always` must be true or false, not {full!r}")
    return Config(_images(settings), _cluster(settings), full)


def _check_keys(settings: Mapping[str, Any]) -> None:
    for key in sorted(settings.keys() - set(KEYS)):
        close = ["client"] if key in _CLOSE_TO_CLIENT else get_close_matches(key, KEYS, n=1)
        suggestion = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"source ceph-rbd: unknown key {key!r}",
            hint=f"{suggestion}known are: {', '.join(KEYS)}",
        )


def _images(settings: Mapping[str, Any]) -> dict[str, ImageSpec]:
    """Disk names and images out of `image` or `images`."""
    if ("image" in settings) == ("images" in settings):
        raise ConfigError("source ceph-rbd: give either `image` or `images`")
    if "image" in settings:
        if "pool" not in settings:
            raise ConfigError("source ceph-rbd: the key 'pool' is missing")
        return {DEFAULT_DISK: _image(settings, "image", _text(settings, "image"))}
    given = settings["images"]
    if not isinstance(given, Mapping) or not given:
        raise ConfigError("source ceph-rbd: `images` must map names of disks to images")
    for name in given:
        if not isinstance(name, str) or not is_name(name):
            raise ConfigError(f"source ceph-rbd: {name!r} is no disk name")
    images = {name: _image(settings, f"images.{name}", value) for name, value in given.items()}
    if len(set(images.values())) < len(images):
        raise ConfigError("source ceph-rbd: two disks have the same image")
    return images


def _image(settings: Mapping[str, Any], key: str, value: object) -> ImageSpec:
    """An image: POOL/IMAGE, POOL/NAMESPACE/IMAGE, or IMAGE in the section's pool and namespace."""
    if not isinstance(value, str):
        raise ConfigError(f"source ceph-rbd: `{key}` must be the name of an image, not {value!r}")
    pool, namespace = _text(settings, "pool"), _text(settings, "namespace")
    written = value if "/" in value else "/".join(filter(None, (pool, namespace, value)))
    if "/" in value and key == "image":
        raise ConfigError(f"source ceph-rbd: `image` must be a name without /, not {value!r}")
    try:
        return image_spec(written)
    except UsageError as exc:
        raise ConfigError(f"source ceph-rbd: `{key}`: {exc.message}", hint=exc.hint) from exc


def _cluster(settings: Mapping[str, Any]) -> Settings:
    default = Settings()
    return Settings(
        conf=_text(settings, "conf"),
        client=_text(settings, "client").removeprefix("client."),
        cluster=_text(settings, "cluster"),
        connect_s=_seconds(settings, "connect-timeout", default.connect_s),
        monitor_s=_seconds(settings, "monitor-timeout", default.monitor_s),
        osd_s=_seconds(settings, "osd-timeout", default.osd_s),
    )


def _text(settings: Mapping[str, Any], key: str) -> str:
    value = settings.get(key, "")
    if not isinstance(value, str) or (key in settings and not value) or "\0" in value:
        raise ConfigError(f"source ceph-rbd: `{key}` must be a text, not {value!r}")
    return value


def _seconds(settings: Mapping[str, Any], key: str, default: int) -> int:
    value = settings.get(key, default)
    if not isinstance(value, str | int):
        raise ConfigError(f"source ceph-rbd: `{key}` must be an interval, not {value!r}")
    try:
        return parse_interval(value)
    except UsageError as exc:
        raise ConfigError(f"source ceph-rbd: `{key}`: {exc.message}", hint=exc.hint) from exc
