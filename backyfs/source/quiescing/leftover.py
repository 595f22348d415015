"""Thaws a guest that nobody sees to any more: everything that froze it was killed."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from backyfs.config.job import read_job
from backyfs.errors import Busy, ConfigError, SourceUnavailable
from backyfs.source.quiescing.contract import NotFrozen
from backyfs.source.quiescing.note import Note, place
from backyfs.source.quiescing.plan import THAW_S, Plan
from backyfs.source.quiescing.steps import Steps

log = logging.getLogger(__name__)

GUARD_S = THAW_S + 30.0
"""How long the guard of a dead backup may still be at it, in seconds."""


def thaw_leftover(directory: Path, *, wait_s: float = GUARD_S) -> bool:
    """Thaw the guest of a VM's directory if a crash left a note there; whether there was one.

    A guard that lives is waited for. Raises Busy when it is at it for longer than `wait_s`;
    SourceUnavailable when the guest cannot be thawed, ConfigError when the note is not ours: it
    stays then.
    """
    note = _left(directory, wait_s)
    if note is None:
        return False
    try:
        plan = note.plan()
        if plan.quiesce.thaw_command:
            refuse_foreign(place(directory), note.owner)
        thaw_noted(note, plan)
    except ValueError as exc:
        if note.whole:
            raise SourceUnavailable(
                f"{directory.name}: the guest may be frozen, but {place(directory)} "
                f"cannot be understood: {exc}",
                hint=f"thaw it by hand, then: backyfs -b {directory} thaw --forget",
            ) from exc
        # It is written before freezing begins: this one was cut off.
        log.warning("a note without content: nothing had been frozen", {"note": place(directory)})
        note.remove()
    except NotFrozen as exc:
        raise SourceUnavailable(
            f"{directory.name}: the guest may be frozen since a backup was killed: {exc}",
            hint=f"see to its agent, then: backyfs -b {directory} thaw (or thaw --forget)",
        ) from exc
    finally:
        note.close()
    return True


def thaw_guest(directory: Path) -> None:
    """Thaw the guest as the job of the VM says. SourceUnavailable, ConfigError."""
    quiesce = read_job(directory / "config").quiesce
    if quiesce is None or not (quiesce.agent or quiesce.thaw_command):
        raise ConfigError(f"{directory.name}: the job does not say how to thaw its guest")
    if quiesce.thaw_command:
        refuse_foreign(directory / "config", os.stat(directory / "config"))
    steps = Steps(Plan(directory.name, directory, quiesce).quiescers())
    try:
        steps.thaw_all(0.0)
    except NotFrozen as exc:
        raise SourceUnavailable(f"{directory.name}: cannot thaw the guest: {exc}") from exc
    finally:
        steps.close()


def forget(directory: Path) -> bool:
    """Remove the note, if there is one, without thawing. Busy: a guard is at it."""
    note = _left(directory, 0.0)
    if note is not None:
        log.warning("forgotten that the guest may be frozen")
        note.remove()
    return note is not None


def _left(directory: Path, wait_s: float) -> Note | None:
    try:
        return Note.left(directory, wait_s)
    except BlockingIOError as exc:
        raise Busy(
            f"{directory.name}: the guest is just being frozen or thawed",
            hint="its guard thaws it in time; try again",
        ) from exc
    except OSError as exc:
        raise SourceUnavailable(f"cannot read {place(directory)}: {exc.strerror}") from exc


def thaw_noted(note: Note, plan: Plan) -> None:
    """Thaw as `plan` says, and remove the note. NotFrozen, OSError."""
    steps = Steps(plan.quiescers())
    try:
        steps.thaw_all(min(THAW_S, plan.thaw_s))
        log.warning("thawed a guest that was left frozen", {"revision": plan.revision or "-"})
        note.remove()
    finally:
        steps.close()
        note.close()


def refuse_foreign(path: Path, owner: os.stat_result) -> None:
    """ConfigError unless only we and root could have written commands into the file, which belongs
    to `owner`, or put another one in its place.
    """
    for which, status in ((path, owner), (path.parent, os.stat(path.parent))):
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o002:
            raise ConfigError(
                f"{path} has commands to run, but others than you and root may have written them",
                hint=f"look at it, then: chown $(id -u) {which}; chmod o-w {which}",
            )
