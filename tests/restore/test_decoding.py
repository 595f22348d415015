"""A restore that processes decode for: the same bytes and errors, and nothing left behind."""

from __future__ import annotations

import os
import random
import signal
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest

from backyfs.errors import Corrupt
from backyfs.model import FRAME
from backyfs.restore import decoding as module
from backyfs.restore.decoding import decoding
from backyfs.restore.place import opened
from backyfs.restore.reading import anonymous
from backyfs.restore.target import BATCH_BYTES, Target
from backyfs.restore.transfer import Report, restore
from backyfs.store.contract import StoredImage
from backyfs.store.packs.decoders import Decoders
from backyfs.store.packs.library import Library
from backyfs.store.repository import Repository
from tests.reader.stores import add_revision, content, make_vm

FRAMES = 100


def changed(data: bytes, seed: int) -> bytes:
    """With a few bytes of every third frame replaced, which makes patches."""
    rng = random.Random(seed)
    new = bytearray(data)
    for frame in range(seed % 3, FRAMES, 3):
        new[frame * FRAME + 100 : frame * FRAME + 200] = rng.randbytes(100)
    new[40 * FRAME : 45 * FRAME] = bytes(5 * FRAME)
    return bytes(new)


FIRST = content(FRAMES, seed=8, tail=1000)
LAST = changed(changed(FIRST, 1), 2)


@pytest.fixture
def vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A VM whose newest revision is patches, for the most part."""
    monkeypatch.setattr(module, "DATA_MIN", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    found = make_vm(tmp_path, "vm", FIRST, changed(FIRST, 1))
    add_revision(found, LAST)
    return found


def newest(vm: Repository) -> StoredImage:
    return vm.open_disk(vm.revisions()[-1], "disk")


def target_of(path: Path, image: StoredImage) -> AbstractContextManager[Target]:
    return opened(str(path), image.size, store=path.parent / "vm")


def to(path: Path, image: StoredImage, *, killed: bool = False) -> tuple[Report, list[int]]:
    """Restore, with the help of processes or after they were killed; their numbers."""
    with decoding(image, str(path)) as room, target_of(path, image) as target:
        assert isinstance(Library.decoders, Decoders)
        pids = Library.decoders.pids
        if killed:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        return restore(image, target, room=room), pids


@pytest.mark.parametrize("killed", [False, True])
def test_the_same_bytes(vm: Repository, tmp_path: Path, killed: bool) -> None:
    with closing(newest(vm)) as image:
        report, pids = to(tmp_path / "out", image, killed=killed)
    assert (tmp_path / "out").read_bytes() == LAST
    assert report.bad == ()
    assert pids
    assert Library.decoders is None
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_they_decode_into_the_buffers(vm: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(newest(vm)) as image, decoding(image, "-") as room:
        place = room(BATCH_BYTES)
        monkeypatch.setattr(Library, "read", None)  # nothing is decoded in this process
        image.read_into(5 * FRAME, place[5 * FRAME : 30 * FRAME])
        assert place[5 * FRAME : 30 * FRAME] == LAST[5 * FRAME : 30 * FRAME]


def test_damage_is_told_as_ever(vm: Repository, tmp_path: Path) -> None:
    for pack in (tmp_path / "vm/packs").iterdir():
        with open(pack, "r+b") as stream:
            stream.seek(5000)
            stream.write(b"damage")
    with closing(newest(vm)) as image:
        with pytest.raises(Corrupt) as alone, target_of(tmp_path / "a", image) as target:
            restore(image, target)
        with pytest.raises(Corrupt) as helped:
            to(tmp_path / "b", image)
    assert str(helped.value) == str(alone.value)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_where_they_are_of_no_use(vm: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(newest(vm)) as image:
        with decoding(image, "rbd:pool/image") as room:
            assert room is anonymous
        monkeypatch.setattr(module, "DATA_MIN", len(LAST) + 1)
        with decoding(image, "-") as room:
            assert room is anonymous
        monkeypatch.setattr(module, "DATA_MIN", 1)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
        with decoding(image, "-") as room:
            assert room is anonymous
