"""A source whose guest is frozen while snapshots are taken; the policy for when it is not."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path

from backyfs.config.quiesce import Policy, Quiesce
from backyfs.errors import BackyfsError, SourceUnavailable
from backyfs.log import TOLD
from backyfs.model import Consistency, Quiescing
from backyfs.source import contract
from backyfs.source.contract import Backups, Bookmark, DiskSnapshot, Session, Snapshot, Source
from backyfs.source.quiescing.freeze import Freeze
from backyfs.source.quiescing.leftover import thaw_leftover
from backyfs.source.quiescing.plan import Plan

log = logging.getLogger(__name__)


class QuiescedSource:
    """Another source, with the guest of the VM frozen from before the first snapshot until after
    the last one.

    `directory` is the VM's. `strict`: a guest that should be frozen must be, as with the policy
    `require`; also one that the source itself has frozen.
    """

    def __init__(
        self, source: Source, vm: str, directory: Path, quiesce: Quiesce, *, strict: bool = False
    ) -> None:
        self._source = source
        self._plan = Plan(vm, directory.absolute(), quiesce)
        self._undone: str | None = None
        """Why an earlier freeze is not undone; "" = none is left, None = not looked at yet."""
        self._policy, self._strict = quiesce.policy, strict
        if strict and self._policy is Policy.PREFER:
            self._policy = Policy.REQUIRE

    @property
    def type(self) -> str:
        return self._source.type

    def disks(self) -> Sequence[str]:
        return self._source.disks()

    @contextlib.contextmanager
    def session(self, backups: Backups) -> Iterator[QuiescedSource]:
        """As the source's; before anything else a guest is thawed that a crash left frozen."""
        self._undone = self._thaw_leftover()
        with contract.session(self._source, backups) as source:
            opened = copy(self)
            opened._source = source
            yield opened

    def remembers(self, since: Mapping[str, Bookmark]) -> bool:
        return isinstance(self._source, Session) and self._source.remembers(since)

    @contextlib.contextmanager
    def snapshot(self, revision: str, since: Mapping[str, Bookmark]) -> Iterator[Snapshot]:
        """As the source's, frozen and thawed. SourceUnavailable where the policy demands it, and
        when the guest cannot be thawed again: then it may still be frozen.
        """
        failure = self._thaw_leftover() if self._undone is None else self._undone
        self._source.disks()  # nothing is frozen for a source that is not there
        with contextlib.ExitStack() as snapshots:
            if failure or self._policy is Policy.NEVER:
                self._insist(failure)
                taken = snapshots.enter_context(self._source.snapshot(revision, since))
                if self._strict and contract.quiescing(taken).result == "failed":
                    raise self._not_frozen(taken.reason)
                yield _judged(taken, self._plan.quiesce, failure) if failure else taken
                return
            with Freeze(replace(self._plan, revision=revision)) as freeze:
                self._insist(freeze.failure)
                taken = snapshots.enter_context(self._source.snapshot(revision, since))
            self._refuse_stuck(freeze)
            failure = freeze.failure or _pointless(taken)
            self._insist(failure)
            yield _judged(taken, self._plan.quiesce, failure, freeze)

    def _thaw_leftover(self) -> str:
        """Thaw what a crash left frozen; why that failed, or ""."""
        try:
            thaw_leftover(self._plan.directory)
        except BackyfsError as exc:
            log.error("an earlier freeze is not undone", {"reason": exc.message})
            return f"an earlier freeze is not undone: {exc.message}"
        return ""

    def _insist(self, failure: str) -> None:
        """Under the policy `require` a failure is an error."""
        if failure and self._policy is Policy.REQUIRE:
            raise self._not_frozen(failure)

    def _not_frozen(self, reason: str) -> SourceUnavailable:
        return SourceUnavailable(
            f"{self._plan.vm}: the guest was not frozen: {reason}",
            hint="see to it, or accept what a crash would leave: policy: prefer, no --strict",
        )

    def _refuse_stuck(self, freeze: Freeze) -> None:
        if freeze.stuck:
            raise SourceUnavailable(
                f"{self._plan.vm}: the guest may still be frozen: {freeze.stuck}",
                hint=f"run: backyfs -b {self._plan.directory} thaw",
            )


def _pointless(snapshot: Snapshot) -> str:
    return "" if snapshot.frozen else "freezing is of no use where disks are read live"


def _judged(
    snapshot: Snapshot, quiesce: Quiesce, failure: str, freeze: Freeze | None = None
) -> Snapshot:
    """The snapshot with what freezing made of it."""
    seconds = freeze.seconds if freeze else 0.0
    if failure:
        log.warning("guest not quiesced", {"reason": failure}, extra=TOLD)
        reason = f"{snapshot.reason}; guest not quiesced: {failure}"
        return _Snapshot(snapshot, snapshot.consistency, reason, Quiescing("failed", seconds))
    assert freeze is not None
    best = max(snapshot.consistency, quiesce.consistency, key=lambda one: one.rank)
    reason = f"{snapshot.reason}; guest frozen for {seconds:.3g} s ({freeze.what})"
    return _Snapshot(snapshot, best, reason, Quiescing("done", seconds))


class _Snapshot:
    def __init__(
        self, snapshot: Snapshot, consistency: Consistency, reason: str, quiescing: Quiescing
    ) -> None:
        self._snapshot = snapshot
        self.consistency, self.reason, self.quiescing = consistency, reason, quiescing
        self.disks: Mapping[str, DiskSnapshot] = snapshot.disks

    @property
    def frozen(self) -> bool:
        return self._snapshot.frozen

    def published(self) -> None:
        self._snapshot.published()
