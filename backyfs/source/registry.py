"""Finds the source a job names: the built-in ones, then plug-ins.

A plug-in is an entry point of the group `backyfs.sources`: its name is the type, its value a
callable that takes the settings (a mapping, without `type`), raises ConfigError when they are
wrong, and returns a Source. Plug-ins are looked for, and imported, only when a job names one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from backyfs.errors import BackyfsError, ConfigError
from backyfs.source.contract import Source

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

GROUP = "backyfs.sources"

Factory = Callable[[Mapping[str, Any]], Source]


def _file(settings: Mapping[str, Any]) -> Source:
    from backyfs.source.file import FileSource

    return FileSource.from_settings(settings)


def _ceph_rbd(settings: Mapping[str, Any]) -> Source:
    from backyfs.source.ceph.source import CephSource

    return CephSource.from_settings(settings)


def _flyingcircus(settings: Mapping[str, Any]) -> Source:
    from backyfs.source.flyingcircus.source import from_settings

    return from_settings(settings)


_BUILT_IN: Mapping[str, Factory] = {
    "file": _file,
    "ceph-rbd": _ceph_rbd,
    "flyingcircus": _flyingcircus,
}


def types() -> list[str]:
    """All known types, built-in and plugged in, sorted."""
    return sorted({*_BUILT_IN, *_plug_ins().names})


def make(kind: str, settings: Mapping[str, Any]) -> Source:
    """The source of type `kind`; ConfigError when there is none or its settings are wrong.

    Nothing is opened yet: whether the source is there, `disks()` tells.
    """
    return (_BUILT_IN.get(kind) or _plugged_in(kind))(settings)


def _plug_ins() -> EntryPoints:
    from importlib.metadata import entry_points

    return entry_points(group=GROUP)


def _plugged_in(kind: str) -> Factory:
    for entry in _plug_ins().select(name=kind):
        try:
            factory: Factory = entry.load()
        except BackyfsError:
            raise
        except Exception as exc:  # foreign code: whatever it raises, the job names an unusable type
            raise ConfigError(
                f"source type {kind!r}: its plug-in {entry.value} cannot be loaded: {exc}",
                hint="install the plug-in's dependencies, or repair it",
            ) from exc
        return factory
    raise _unknown(kind)


def _unknown(kind: str) -> ConfigError:
    from difflib import get_close_matches

    known = types()
    close = get_close_matches(kind, known, n=1)
    suggestion = f"did you mean {close[0]!r}? " if close else ""
    return ConfigError(
        f"unknown source type {kind!r}", hint=f"{suggestion}known are: {', '.join(known)}"
    )
