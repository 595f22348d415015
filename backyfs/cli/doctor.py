"""backyfs doctor: what this host can do, what is missing and how to get it."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from backyfs import __version__
from backyfs.cli import options, output
from backyfs.cli.session import Session

_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
_OPEN_FILES_MIN = 4096
_FREE_MIN = 0.1


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: `state` is ok, note (something optional is missing) or missing."""

    name: str
    state: str
    text: str
    remedy: str = ""


@click.command()
@options.as_json
@click.pass_obj
def command(session: Session, as_json: bool) -> int:
    """Look at what backups, restores and mounts need on this host.

    Each line says what was found and, where something is missing, what to do. Exits 1 when
    something is missing that backups of the given directory (-b) need; what only some features
    need is a note.
    """
    findings = [finding for look in _LOOKS for finding in look(session.directory)]
    if as_json:
        output.json_line([asdict(finding) for finding in findings])
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            output.line(f"{finding.state:7}  {finding.name:{width}}  {finding.text}")
            if finding.remedy:
                output.line(f"{'':7}  {'':{width}}  → {finding.remedy}")
    return 1 if any(finding.state == "missing" for finding in findings) else 0


def _versions(_: Path) -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("backyfs", "ok", f"{__version__}, Python {python}, Linux {platform.release()}")
    for name in ("trio", "zstandard", "blake3"):
        yield _module(name, "missing", "reinstall backyfs: one of its libraries is missing")


def _module(name: str, state: str, remedy: str) -> Finding:
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as exc:
        return Finding(name, state, str(exc), remedy)
    return Finding(name, "ok", str(getattr(module, "__version__", "here")))


def _directory(directory: Path) -> Iterator[Finding]:
    if not directory.is_dir():
        hint = f"mkdir -p {directory}, or name another one with -b"
        yield Finding("directory", "missing", f"no directory {directory}", hint)
        return
    writable = os.access(directory, os.W_OK | os.X_OK)
    text = f"{directory.resolve()} on {_file_system(directory)}"
    remedy = "" if writable else "run as its owner, or as root"
    yield Finding("directory", "ok" if writable else "missing", text, remedy)
    usage = shutil.disk_usage(directory)
    free = f"{output.size(usage.free)} of {output.size(usage.total)} free"
    if usage.free < usage.total * _FREE_MIN:
        yield Finding("space", "note", free, "add space, or run: backyfs purge")
    else:
        yield Finding("space", "ok", free)
    yield _reflink(directory) if writable else Finding("reflink", "note", "cannot be tried")


def _file_system(directory: Path) -> str:
    """Type of the file system a directory is on, by the longest mountpoint above it."""
    from backyfs.mount.mountpoint import mounts

    path, best, kind = directory.resolve(), Path(), "an unknown file system"
    with contextlib.suppress(OSError):
        for mount in mounts():
            if path.is_relative_to(mount.point) and len(mount.point.parts) >= len(best.parts):
                best, kind = mount.point, mount.fstype
    return kind


def _reflink(directory: Path) -> Finding:
    from backyfs.store.fs import SYSTEM

    try:
        with (
            tempfile.TemporaryFile(dir=directory) as one,
            tempfile.TemporaryFile(dir=directory) as other,
        ):
            one.write(bytes(65536))
            one.flush()
            SYSTEM.clone(one.fileno(), other.fileno(), directory)
    except OSError:
        text = "not here: the store is packs (cow needs btrfs or XFS)"
        return Finding("reflink", "note", text)
    return Finding("reflink", "ok", "works: the store may be cow")


def _fuse(_: Path) -> Iterator[Finding]:
    if not os.path.exists("/dev/fuse"):
        yield Finding("fuse", "note", "no /dev/fuse: no mounts", "modprobe fuse")
    elif not os.access("/dev/fuse", os.R_OK | os.W_OK):
        yield Finding("fuse", "note", "no access to /dev/fuse", "run as root, or fix its mode")
    elif not shutil.which("fusermount3", path=_PATH):
        yield Finding("fuse", "note", "no fusermount3: no mounts", "apt install fuse3")
    else:
        yield Finding("fuse", "ok", "/dev/fuse and fusermount3 are here")
    yield _module("pyfuse3", "note", "mounts need it: reinstall backyfs with pyfuse3")
    yield _allow_other()


def _allow_other() -> Finding:
    if os.geteuid() == 0:
        return Finding("allow_other", "ok", "root may let others see its mounts")
    with contextlib.suppress(OSError):
        lines = Path("/etc/fuse.conf").read_text(errors="replace").splitlines()
        if any(line.partition("#")[0].strip() == "user_allow_other" for line in lines):
            return Finding("allow_other", "ok", "user_allow_other is set")
    text = "user_allow_other is not set: only you see your mounts"
    return Finding("allow_other", "note", text, "write user_allow_other into /etc/fuse.conf")


def _loop(_: Path) -> Iterator[Finding]:
    if not os.access("/dev/loop-control", os.R_OK | os.W_OK):
        text = "no access to /dev/loop-control: no backyfs loop here"
        yield Finding("loop", "note", text, "run it as root; modprobe loop")
    elif not shutil.which("losetup", path=_PATH):
        yield Finding("loop", "note", "no losetup", "apt install mount")
    else:
        yield Finding("loop", "ok", "losetup and /dev/loop-control are here")


def _rbd(_: Path) -> Iterator[Finding]:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    remedy = (
        f"only for ceph-rbd: apt install python3-rbd (built for Python {version}), then: make setup"
        " (an environment of your own: venv --system-site-packages)"
    )
    yield _module("rbd", "note", remedy)


def _limits(_: Path) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} (may be raised to {hard})"
    if hard < _OPEN_FILES_MIN:
        yield Finding("open files", "note", text, "raise LimitNOFILE= or ulimit -Hn")
    else:
        yield Finding("open files", "ok", text)


def _clock(_: Path) -> Iterator[Finding]:
    zone = "/".join(dict.fromkeys(time.tzname))
    # Set by chrony, systemd-timesyncd or ntpd through adjtimex(2); absent in many containers.
    marker = Path("/run/systemd/timesync/synchronized")
    if marker.exists() or any(shutil.which(name, path=_PATH) for name in ("chronyd", "ntpd")):
        yield Finding("clock", "ok", f"time zone {zone}, synchronised")
    else:
        text = f"time zone {zone}; nothing found that synchronises it"
        yield Finding(
            "clock", "note", text, "apt install systemd-timesyncd, unless the host does it"
        )


_LOOKS: tuple[Callable[[Path], Iterator[Finding]], ...] = (
    _versions,
    _directory,
    _fuse,
    _loop,
    _rbd,
    _limits,
    _clock,
)
