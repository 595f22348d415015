"""Verifying many revisions opens each pack file once, not once for each revision."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from backyfs.engine.verification import verify
from backyfs.model import FRAME
from backyfs.store.packs.packfile import PackFile
from tests.reader.stores import add_revision, content, make_vm


def test_a_quick_look_at_all_opens_each_pack_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(content(8, seed=1))
    vm = make_vm(tmp_path, "vm", bytes(data))
    for frame in range(8):
        data[frame * FRAME : frame * FRAME + 8] = b"changed!"
        add_revision(vm, bytes(data))
    opened: list[Path] = []
    open_pack = PackFile.__init__

    def counted(pack: PackFile, path: Path) -> None:
        opened.append(path)
        open_pack(pack, path)

    monkeypatch.setattr(PackFile, "__init__", counted)

    async def look() -> None:
        verdicts = await verify(vm, vm.revisions(), quick=True)
        assert [verdict.damage for verdict in verdicts] == [[]] * 9

    trio.run(look)
    assert sorted(opened) == sorted((tmp_path / "vm" / "packs").iterdir())
