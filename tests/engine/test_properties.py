"""Random histories through the engine against a dictionary of bytes.

Every kept revision reads back byte for byte, whatever was changed, resized, removed, collected,
damaged and healed in between; a copy of it all has the same bytes and digests.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from backyfs.engine.backup import back_up
from backyfs.engine.copying import copy
from backyfs.engine.trust import distrust
from backyfs.engine.verification import verify
from backyfs.model import FRAME
from backyfs.store.repository import Repository
from tests.engine.checks import content as stored_content
from tests.engine.checks import damage_frame, sound
from tests.engine.memory import MemorySource, disk, frame

FRAMES = 12
letters = st.sampled_from("abcdefgh")
places = st.integers(0, FRAMES * FRAME)
names = st.sampled_from(["root", "data"])


class Histories(RuleBasedStateMachine):
    """One VM with up to two disks."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="backyfs-histories-")
        self.path = Path(self.directory.name)
        self.repository = Repository.create(self.path / "vm", "packs")
        self.source = MemorySource(tracking=True)
        self.kept: dict[str, dict[str, bytes]] = {}
        self.order: list[str] = []

    def teardown(self) -> None:
        trio.run(self.copied)
        self.directory.cleanup()

    async def copied(self) -> None:
        """At the end, a copy of the whole history is the same."""
        target = Repository.create(self.path / "copy", "packs")
        if self.damaged():
            return
        await copy(self.repository, target)
        for mine, other in zip(self.repository.revisions(), target.revisions(), strict=True):
            assert mine.id == other.id
            for name, data in self.kept[mine.id].items():
                assert other.disks[name].digest == mine.disks[name].digest
                assert stored_content(target, other, name) == data

    def damaged(self) -> bool:
        return any(self.repository.damage())

    @initialize()
    def start(self) -> None:
        self.source.contents["root"] = disk("ab.cd.ef", tail=700)

    # The guest

    @rule(name=names, size=places)
    def resize(self, name: str, size: int) -> None:
        content = self.source.contents.setdefault(name, bytearray())
        del content[size:]
        content.extend(bytes(size - len(content)))

    @rule(name=names, start=places, length=st.integers(1, 3 * FRAME), letter=letters)
    def write(self, name: str, start: int, length: int, letter: str) -> None:
        content = self.source.contents.get(name, bytearray())
        data = (frame(letter) * 4)[: max(0, min(length, len(content) - start))]
        content[start : start + len(data)] = data

    @rule(name=names, start=places, length=st.integers(1, 3 * FRAME))
    def discard(self, name: str, start: int, length: int) -> None:
        content = self.source.contents.get(name, bytearray())
        length = max(0, min(length, len(content) - start))
        content[start : start + length] = bytes(length)

    @precondition(lambda self: len(self.source.contents) > 1)
    @rule()
    def detach(self) -> None:
        del self.source.contents["data"]

    # The operator

    @rule(check=st.booleans(), live=st.booleans())
    def back_up(self, check: bool, live: bool) -> None:
        self.source.live = live
        record = trio.run(lambda: back_up(self.repository, self.source, verify=check))
        self.kept[record.id] = {name: bytes(d) for name, d in self.source.contents.items()}
        self.order.append(record.id)

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        revision = data.draw(st.sampled_from(self.order))
        self.repository.remove([revision])
        self.order.remove(revision)
        del self.kept[revision]

    @precondition(lambda self: self.source.kept)
    @rule(data=st.data())
    def lose_a_snapshot(self, data: st.DataObject) -> None:
        """What the source remembered of some backup is gone."""
        del self.source.kept[data.draw(st.sampled_from(sorted(self.source.kept)))]

    @rule()
    def collect(self) -> None:
        self.repository.gc()

    @precondition(lambda self: self.order)
    @rule()
    def distrust(self) -> None:
        distrust(self.repository, self.repository.revisions()[-1:], "a whim")

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def damage_and_heal(self, data: st.DataObject) -> None:
        """A byte of the newest revision rots; verification finds it, the next backup heals it."""
        newest = self.repository.revisions()[-1]
        if self.source.contents.keys() != newest.disks.keys():
            return
        stored = [
            (name, number)
            for name, found in self.kept[newest.id].items()
            for number in range(-(-len(found) // FRAME))
            if any(found[number * FRAME : number * FRAME + FRAME])
        ]
        if not stored:
            return
        name, number = data.draw(st.sampled_from(stored))
        damage_frame(self.repository, newest, number, name)
        trio.run(verify, self.repository, self.repository.revisions())
        assert newest.id in self.repository.damage()
        self.source.contents = {n: bytearray(d) for n, d in self.kept[newest.id].items()}
        self.back_up(True, False)
        trio.run(verify, self.repository, self.repository.revisions())
        assert not self.damaged()

    @invariant()
    def every_revision_reads_back(self) -> None:
        records = self.repository.revisions()
        assert [record.id for record in records] == self.order
        for record in records:
            for name, data in self.kept[record.id].items():
                assert stored_content(self.repository, record, name) == data
        sound(self.repository)


Histories.TestCase.settings = settings(
    max_examples=20,
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
test_histories = Histories.TestCase
