"""Starting and ending mounts: in the background, in the foreground, and from outside.

A background mount is a process of its own: `python -m backyfs.mount.daemon`, which detaches before
it imports trio or pyfuse3 (neither survives a fork) and tells its starter through a pipe, as one
JSON line, that the tree is ready or why there is none.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backyfs import interpreter
from backyfs import log as logs
from backyfs.errors import BackyfsError, TargetError
from backyfs.mount.mountpoint import (
    FSTYPE,
    absolute,
    is_dead,
    mounted_at,
    prepare,
    serving,
    unmount,
)

CACHE_BYTES_MAX = 64 << 20
IDLE_S = 600.0
_START_S = 30.0
_END_S = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Logging:
    """Where the process of a mount logs to, and how much."""

    logfile: Path | None = None
    verbose: bool = False
    quiet: bool = False


def mount(
    base: Path,
    mountpoint: Path,
    *,
    foreground: bool = False,
    allow_other: bool = False,
    cache_bytes: int = CACHE_BYTES_MAX,
    check: bool = False,
    scratch: Path | None = None,
    scratch_bytes: int | None = None,
    scratch_idle_s: float = IDLE_S,
    while_pid: int | None = None,
    logging: Logging = Logging(),
) -> None:
    """Show the repositories below `base` (or the one in it) as a tree at `mountpoint`.

    Returns when the tree is ready; with `foreground`, when it was unmounted or SIGTERM or SIGINT
    came. `cache_bytes` bounds decoded frames in memory; `check` verifies every byte of cow
    revisions, too. With a directory `scratch` each disk also appears as a file that may be written
    to: what is written is kept in there, `scratch_bytes` at most, until the mount ends or nobody
    has used it for `scratch_idle_s`. A mount that is needed only by a process, `while_pid`, ends
    after it, unless it was detached; its mountpoint is removed. NoRepository, TargetError.
    """
    from backyfs.reader.catalog import Catalog

    base = Catalog(base).base
    point = prepare(mountpoint, base)
    settings = {
        "base": str(base),
        "mountpoint": str(point),
        "allow_other": allow_other,
        "cache_bytes": cache_bytes,
        "check": check,
        "scratch": str(scratch.absolute()) if scratch is not None else None,
        "scratch_bytes": scratch_bytes,
        "scratch_idle_s": scratch_idle_s,
        "while_pid": while_pid,
    }
    if foreground:
        logs.configure(verbose=logging.verbose, quiet=logging.quiet, logfile=logging.logfile)
        _serve(settings, lambda: None)
    else:
        _start(settings, logging)


def umount(mountpoint: Path, *, lazy: bool = False, wait_s: float = _END_S) -> None:
    """End the mount at `mountpoint`; returns when its process is gone. TargetError.

    `lazy`: detach it even while it is in use; its process serves what is open and then ends.
    """
    point = absolute(mountpoint)
    found = mounted_at(point)
    if found is None:
        raise TargetError(f"nothing is mounted at {point}", hint="see: findmnt -t " + FSTYPE)
    if found.fstype != FSTYPE:
        raise TargetError(f"{point} is a mount of {found.fstype}, not of backyfs")
    if os.geteuid() not in (0, found.owner) and found.owner >= 0:
        raise TargetError(
            f"{point} was mounted by another user (uid {found.owner})",
            hint="only that user and root can unmount it",
        )
    with serving(found.device) as process:
        unmount(point, lazy=lazy or is_dead(found))
        if process is not None and not lazy and not process.wait(wait_s):
            raise TargetError(
                f"{point} is unmounted, but its process {process.pid} still runs",
                hint="a container or another mount namespace may still show the tree, or the store"
                " does not answer",
            )


# The starter's side


def _start(settings: dict[str, Any], where: Logging) -> None:
    reader, writer = os.pipe()
    try:
        arguments = {
            **settings,
            "logfile": str(where.logfile.absolute()) if where.logfile else None,
            "verbose": where.verbose,
            "quiet": where.quiet,
            "report": writer,
        }
        subprocess.run(
            [*interpreter.running("backyfs.mount.daemon"), json.dumps(arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[writer],
            env=interpreter.environment(),
            check=False,
        )
        os.close(writer)
        writer = -1
        _raise_unless_ready(_line(reader), Path(settings["mountpoint"]))
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


def _line(fd: int) -> bytes:
    """What the process reported; b"" when it ended or took too long without a word."""
    deadline = time.monotonic() + _START_S
    data = b""
    while not data.endswith(b"\n"):
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        more = os.read(fd, 65536) if ready else b""
        if not more:
            break
        data += more
    return data


def _raise_unless_ready(line: bytes, point: Path) -> None:
    if not line.endswith(b"\n"):
        raise TargetError(
            f"the process that should serve {point} ended before the tree was ready",
            hint=f"see why: backyfs mount --foreground {point}",
        )
    report = json.loads(line)
    if "error" in report:
        error = BackyfsError(report["error"], hint=report["hint"])
        error.exit_code = report["exit_code"]
        raise error


# The process of the mount


def _serve(settings: dict[str, Any], ready: Callable[[], None]) -> None:
    from backyfs.mount.serving import Options, serve

    scratch = settings["scratch"]
    options = Options(
        Path(settings["base"]),
        Path(settings["mountpoint"]),
        allow_other=settings["allow_other"],
        cache_bytes=settings["cache_bytes"],
        check=settings["check"],
        scratch=Path(scratch) if scratch is not None else None,
        scratch_bytes=settings["scratch_bytes"],
        scratch_idle_s=settings["scratch_idle_s"],
        while_pid=settings["while_pid"],
    )
    serve(options, ready)


def main(arguments: str) -> None:
    """The detached process: serve what the JSON says, reporting to the descriptor in it."""
    settings = json.loads(arguments)
    report: int = settings["report"]
    os.set_inheritable(report, False)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        logfile = settings["logfile"]
        logs.configure(
            verbose=settings["verbose"],
            quiet=settings["quiet"],
            logfile=Path(logfile) if logfile else None,
        )
        _serve(settings, lambda: _detached(report))
    except BackyfsError as exc:
        _report(report, {"error": exc.message, "hint": exc.hint, "exit_code": exc.exit_code})
        sys.exit(exc.exit_code)
    except Exception as exc:
        log.error("the mount ended: a bug", exc_info=exc)
        _report(report, {"error": f"a bug: {exc!r}", "hint": "please report it", "exit_code": 1})
        sys.exit(1)


def _detached(report: int) -> None:
    _report(report, {"ready": os.getpid()})
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    os.close(nowhere)


def _report(fd: int, value: dict[str, Any]) -> None:
    """Tell the starter, once; it may have gone away."""
    try:
        os.write(fd, json.dumps(value).encode() + b"\n")
        os.close(fd)
    except OSError:
        pass


if __name__ == "__main__":
    main(sys.argv[1])
