"""A source with its guest frozen meanwhile: when it counts, when not, and what the policy makes of
it; and whatever goes wrong in whatever order, the guest is thawed in the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backyfs.config.quiesce import Policy, Quiesce
from backyfs.errors import SourceUnavailable
from backyfs.model import Consistency, Quiescing
from backyfs.source import contract
from backyfs.source.contract import Backups, Bookmark, Source, quiescing
from backyfs.source.quiescing import freeze as freezing
from backyfs.source.quiescing import leftover, note
from backyfs.source.quiescing.freeze import Freeze
from backyfs.source.quiescing.plan import Plan
from backyfs.source.quiescing.quiesced import QuiescedSource
from backyfs.source.throttle import Rate, ThrottledSource
from backyfs.testing.source import BACKUPS, SourceContract, Subject
from tests.source.quiescing.fake import FAULTS, FakeAgent
from tests.source.quiescing.still import StillSnapshot, StillSource
from tests.source.quiescing.test_freeze import FREEZE, THAW, the_guard, until
from tests.source.test_file import MIB, FileSubject, filled

REVISION = "20261121T220112Z-7f3a"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeAgent]:
    with FakeAgent(tmp_path / "agent") as agent:
        yield agent


def quiesced(fake: FakeAgent, source: StillSource, **keys: object) -> QuiescedSource:
    directory = fake.path.parent / "web01"
    directory.mkdir(exist_ok=True)
    strict = bool(keys.pop("strict", False))
    quiesce = replace(Quiesce(agent=fake.path, freeze_timeout_s=5, frozen_limit_s=30), **keys)  # type: ignore[arg-type]
    return QuiescedSource(source, "web01", directory, quiesce, strict=strict)


def test_frozen_when_the_snapshot_is_taken_and_not_after(fake: FakeAgent) -> None:
    seen: list[int] = []
    source = StillSource(during=lambda: seen.append(fake.frozen))
    with quiesced(fake, source).snapshot(REVISION, {}) as snapshot:
        assert seen == [2]
        assert fake.frozen == 0
        assert snapshot.consistency is Consistency.FILESYSTEM
        assert snapshot.reason.startswith("a snapshot; guest frozen for ")
        assert snapshot.reason.endswith(" s (2 file systems)")
        found = quiescing(snapshot)
        assert found.result == "done"
        assert 0 < found.frozen_s < 30
        snapshot.published()
    assert source.snapshots.told == 1
    assert source.open == 0


@pytest.mark.parametrize(
    ("own", "set_to", "becomes"),
    [
        (Consistency.CRASH, Consistency.APPLICATION, Consistency.APPLICATION),
        (Consistency.APPLICATION, Consistency.FILESYSTEM, Consistency.APPLICATION),
        (Consistency.OFFLINE, Consistency.APPLICATION, Consistency.OFFLINE),
    ],
)
def test_the_better_consistency_counts(
    fake: FakeAgent, own: Consistency, set_to: Consistency, becomes: Consistency
) -> None:
    source = StillSource(StillSnapshot(consistency=own))
    with quiesced(fake, source, consistency=set_to).snapshot(REVISION, {}) as snapshot:
        assert snapshot.consistency is becomes


def _thawed_by_somebody(fake: FakeAgent) -> None:
    fake.frozen = 0


def _thawed_in_part(fake: FakeAgent) -> None:
    fake.frozen = 1


def _killed(fake: FakeAgent) -> None:
    os.kill(the_guard(), signal.SIGKILL)


def _slow(fake: FakeAgent) -> None:
    until(lambda: fake.frozen == 0)


def _lost(fake: FakeAgent) -> None:
    fake.faults[THAW] = ["close"]


def _refused(fake: FakeAgent) -> None:
    fake.faults[FREEZE] = ["refuse"]


def _nothing(fake: FakeAgent) -> None:
    pass


NOT_QUIESCED: dict[str, tuple[Callable[[FakeAgent], None], Callable[[FakeAgent], None], bool]] = {
    "refused": (_refused, _nothing, True),
    "thawed meanwhile": (_nothing, _thawed_by_somebody, True),
    "only 1 were still": (_nothing, _thawed_in_part, True),
    "guard of the frozen guest died": (_nothing, _killed, True),
    "longer than 1 s": (_nothing, _slow, True),
    "connection": (_nothing, _lost, True),
    "read live": (_nothing, _nothing, False),
}
"""Part of the reason: what is done before, what while the snapshot is taken, and if it is one."""


@pytest.mark.parametrize("reason", NOT_QUIESCED)
@pytest.mark.parametrize(
    ("policy", "strict", "fails"),
    [
        (Policy.PREFER, False, False),
        (Policy.PREFER, True, True),
        (Policy.REQUIRE, False, True),
    ],
)
def test_what_a_guest_that_was_not_frozen_means(
    fake: FakeAgent, reason: str, policy: Policy, strict: bool, fails: bool
) -> None:
    before, during, frozen = NOT_QUIESCED[reason]
    source = StillSource(StillSnapshot(frozen=frozen), during=lambda: during(fake))
    before(fake)
    limit = 1 if during is _slow else 30
    wrapped = quiesced(fake, source, policy=policy, strict=strict, frozen_limit_s=limit)
    if fails:
        with pytest.raises(SourceUnavailable, match=reason) as caught:
            wrapped.snapshot(REVISION, {}).__enter__()
        assert caught.value.message.startswith("web01: the guest was not frozen: ")
        assert caught.value.exit_code == 13
    else:
        with wrapped.snapshot(REVISION, {}) as snapshot:
            assert snapshot.consistency is Consistency.CRASH
            assert "; guest not quiesced: " in snapshot.reason
            assert reason in snapshot.reason
            assert quiescing(snapshot).result == "failed"
    assert source.open == 0
    assert fake.frozen == 0
    assert not note.place(fake.path.parent / "web01").exists()


def test_never_asks_nobody(fake: FakeAgent) -> None:
    for strict in (False, True):
        wrapped = quiesced(fake, StillSource(), policy=Policy.NEVER, strict=strict)
        with wrapped.snapshot(REVISION, {}) as snapshot:
            assert quiescing(snapshot) == Quiescing()
            assert snapshot.reason == "a snapshot"
    assert fake.calls == []


def test_nothing_is_frozen_for_a_source_that_is_not_there(fake: FakeAgent) -> None:
    with pytest.raises(SourceUnavailable, match="not there"):
        quiesced(fake, StillSource(there=False)).snapshot(REVISION, {}).__enter__()
    assert fake.calls == []


def test_a_snapshot_that_fails_is_thawed_after(fake: FakeAgent) -> None:
    def fail() -> None:
        assert fake.frozen
        raise SourceUnavailable("the cluster is full")

    with pytest.raises(SourceUnavailable, match="cluster is full"):
        quiesced(fake, StillSource(during=fail)).snapshot(REVISION, {}).__enter__()
    assert fake.frozen == 0


def test_what_the_source_itself_froze_goes_through_the_throttle() -> None:
    inner = StillSnapshot()
    inner.quiescing = Quiescing("done", 0.5)  # type: ignore[attr-defined]
    with ThrottledSource(StillSource(inner), Rate(1 << 20)).snapshot(REVISION, {}) as snapshot:
        assert quiescing(snapshot) == Quiescing("done", 0.5)


@pytest.mark.parametrize("policy", Policy)
def test_an_earlier_freeze_is_undone_first(fake: FakeAgent, policy: Policy) -> None:
    wrapped = quiesced(fake, StillSource(), policy=policy)
    place = note.place(fake.path.parent / "web01")
    place.write_bytes(wrapped._plan.encode())
    fake.frozen = 2
    with wrapped.snapshot(REVISION, {}) as snapshot:
        assert quiescing(snapshot).result == ("none" if policy is Policy.NEVER else "done")
    assert fake.frozen == 0
    assert not place.exists()


def test_an_earlier_freeze_that_cannot_be_undone(fake: FakeAgent) -> None:
    wrapped = quiesced(fake, StillSource())
    place = note.place(fake.path.parent / "web01")
    gone = replace(wrapped._plan.quiesce, agent=fake.path.parent / "gone")
    place.write_bytes(replace(wrapped._plan, quiesce=gone, thaw_s=0.1).encode())
    with wrapped.snapshot(REVISION, {}) as snapshot:
        assert "an earlier freeze is not undone" in snapshot.reason
        assert quiescing(snapshot).result == "failed"
    assert place.exists()
    required = quiesced(fake, StillSource(), policy=Policy.REQUIRE)
    with pytest.raises(SourceUnavailable, match="an earlier freeze is not undone"):
        required.snapshot(REVISION, {}).__enter__()
    assert FREEZE not in fake.calls


def test_a_guest_that_stays_frozen_is_an_error(
    fake: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = StillSource(during=fake.stop)
    wrapped = quiesced(fake, source)
    wrapped._plan = replace(wrapped._plan, thaw_s=0.1, answer_s=0.2)
    with pytest.raises(SourceUnavailable, match="may still be frozen") as caught:
        wrapped.snapshot(REVISION, {}).__enter__()
    assert caught.value.hint.endswith("web01 thaw")
    assert source.open == 0


class _Sessions(StillSource):
    @contextlib.contextmanager
    def session(self, backups: Backups) -> Iterator[_Remembering]:
        yield _Remembering(during=self.during)


class _Remembering(StillSource):
    def remembers(self, since: Mapping[str, Bookmark]) -> bool:
        return bool(since)


def test_a_session_is_opened_before_freezing(fake: FakeAgent) -> None:
    seen: list[int] = []
    source = _Sessions(during=lambda: seen.append(fake.frozen))
    with contract.session(quiesced(fake, source), BACKUPS) as opened:
        assert fake.calls == []
        assert isinstance(opened, contract.Session)
        assert opened.remembers({"disk": {}})
        assert not opened.remembers({})
        with opened.snapshot(REVISION, {}) as snapshot:
            assert quiescing(snapshot).result == "done"
    assert seen == [2]
    with contract.session(quiesced(fake, StillSource()), BACKUPS) as opened:
        assert isinstance(opened, contract.Session)
        assert not opened.remembers({"disk": {}})


def test_an_earlier_freeze_is_undone_before_the_session(fake: FakeAgent) -> None:
    wrapped = quiesced(fake, StillSource())
    note.place(fake.path.parent / "web01").write_bytes(wrapped._plan.encode())
    fake.frozen = 2
    with contract.session(wrapped, BACKUPS):
        assert fake.frozen == 0


# ---- whatever happens

ACCIDENTS = ["nothing", "kill guard", "term guard", "stop guard", "abandon", "kill both", "fail"]
COMMANDS = [FREEZE, THAW, "guest-fsfreeze-status", "guest-sync-delimited", "guest-info"]
BAD_LUCK = st.dictionaries(
    st.sampled_from(COMMANDS), st.lists(st.sampled_from(["", *FAULTS]), max_size=3), max_size=3
)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(before=BAD_LUCK, after=BAD_LUCK, accident=st.sampled_from(ACCIDENTS))
def test_the_guest_is_thawed_in_the_end(
    tmp_path_factory: pytest.TempPathFactory,
    before: dict[str, list[str]],
    after: dict[str, list[str]],
    accident: str,
) -> None:
    directory = tmp_path_factory.mktemp("vm")
    with FakeAgent(directory / "agent") as fake, pytest.MonkeyPatch.context() as patched:
        patched.setattr(freezing, "PROMPT_S", 1.0)
        fake.late_s = 0.25
        fake.faults.update({command: list(faults) for command, faults in before.items()})
        quiesce = Quiesce(agent=fake.path, freeze_timeout_s=1, frozen_limit_s=30)
        plan = Plan("web01", directory, quiesce, REVISION, thaw_s=10.0, answer_s=0.15)
        freeze = Freeze(plan)
        with contextlib.suppress(ZeroDivisionError), freeze:
            claimed = not freeze.failure
            assert not claimed or fake.frozen
            fake.faults.update({command: list(faults) for command, faults in after.items()})
            _happen(accident, freeze)
        until(lambda: not fake.frozen or note.place(directory).exists())
        fake.faults.clear()
        leftover.thaw_leftover(directory)
        assert not fake.frozen
        assert not note.place(directory).exists()


def _happen(accident: str, freeze: Freeze) -> None:
    """What befalls the guard or the backup while the guest is frozen (or is not)."""
    guard = freeze._guard
    if guard is None:
        return
    process = guard._process
    if accident == "fail":
        raise ZeroDivisionError
    if accident == "stop guard":
        os.kill(process.pid, signal.SIGSTOP)
    if accident == "term guard":
        os.kill(process.pid, signal.SIGTERM)
    if accident in ("kill guard", "kill both"):
        os.kill(process.pid, signal.SIGKILL)
    if accident in ("abandon", "kill both"):  # as if we had been killed: nobody asks to thaw
        freeze._guard = None
        guard.close()


# ---- the contract of sources


class QuiescedSubject:
    """An image file whose guest is frozen for each snapshot."""

    def __init__(self, agent: FakeAgent, path: Path) -> None:
        self._files, self._agent = FileSubject(path), agent.path
        self.content, self.write = self._files.content, self._files.write
        self.take_away = self._files.take_away

    @property
    def source(self) -> Source:
        quiesce = Quiesce(agent=self._agent)
        return QuiescedSource(self._files.source, "web01", self._agent.parent, quiesce)


class TestQuiesced(SourceContract):
    @pytest.fixture
    def subject(self, xfs_dir: Path, fake: FakeAgent) -> Subject:
        return QuiescedSubject(fake, filled(xfs_dir / "disk", 2 * MIB + 700))
