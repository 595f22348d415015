"""What Ceph loses when object maps are believed without our rule is found by the usual sample."""

from __future__ import annotations

import os

import pytest
import trio

from backyfs.engine.backup import back_up
from backyfs.model import Trust
from backyfs.source.ceph import diff
from tests.engine.checks import content
from tests.source.ceph.test_backups import MIB, Vm
from tests.source.ceph.test_backups import vm as vm  # noqa: PLC0414  the fixture


@pytest.fixture
def shrunk_and_grown(vm: Vm) -> Vm:
    """Backed up, then cut, seen so by another's snapshot, and grown again: the end is zero now."""
    vm.write(10 * MIB, os.urandom(4 * MIB))
    trio.run(back_up, vm.repository, vm.source)
    with vm.ceph.image("vm") as image:
        image.resize(9 * MIB)
        image.create_snap("of-somebody-else")
        image.resize(16 * MIB)
    return vm


def test_by_our_rule_nothing_is_lost(shrunk_and_grown: Vm) -> None:
    record = trio.run(shrunk_and_grown.back_up)
    assert (record.trust, record.stats.wrong_frames) == (Trust.TRUSTED, 0)
    assert record.stats.sampled > 0


def test_without_it_the_sample_finds_what_is_lost(
    shrunk_and_grown: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = shrunk_and_grown
    monkeypatch.setattr(diff, "doubts", lambda *_: "")
    wrong = trio.run(back_up, vm.repository, vm.source)
    exported = vm.ceph.export("vm", vm.name(wrong))
    assert content(vm.repository, wrong) != exported
    assert wrong.trust is Trust.DISTRUSTED
    assert wrong.stats.wrong_frames > 0
    assert vm.repository.reports.revisions() == [wrong.id]
    record = trio.run(vm.back_up)  # reads everything, and compares with the export
    assert (record.trust, record.stats.believed) == (Trust.TRUSTED, 0)
