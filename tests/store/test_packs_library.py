"""The pack files of a repository: what is said in those that cannot be read, or tell nonsense."""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from backyfs.errors import Corrupt
from backyfs.model import FRAME
from backyfs.store.packs import codec
from backyfs.store.packs.library import Library
from backyfs.store.packs.packfile import PackFile
from backyfs.store.packs.table import ENTRY, Entry
from backyfs.store.repository import Repository
from tests.reader.stores import make_vm
from tests.store import faults


def test_a_pack_without_a_table_costs_no_memory_each_time(tmp_path: Path) -> None:
    (tmp_path / "one.pack").write_bytes(bytes(5000))
    library = Library(tmp_path)

    def look(times: int) -> None:
        for _ in range(times):
            with pytest.raises(Corrupt, match="segment one cannot be read"):
                library.segment("one")

    look(10)
    tracemalloc.start()
    try:
        look(10)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        look(500)  # a guest that tries again, a `dd` through the whole disk
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 100_000


def patched_once(tmp_path: Path) -> tuple[Repository, bytes]:
    """Two revisions; frame 1 of the second, the only one it stores, is a patch."""
    repository = Repository.create(tmp_path / "vm", "packs")
    old = {"disk": faults.frames(1, 2, 3)}
    new = {"disk": faults.patched(old["disk"], 1, 5)}
    faults.store(repository, 0, old)
    faults.store(repository, 1, new, old)
    return Repository.open(repository.path), new["disk"]


def lie(repository: Repository, revision: int, number: int, what: Callable[[Entry], Entry]) -> None:
    """Have a pack's table say something else of a frame."""
    name = f"{faults.revision_id(revision)}-0"
    path = repository.layout.packs / f"{name}.pack"
    with closing(PackFile(path)) as pack:
        at = pack.descriptors[name].entries_at + number * ENTRY.size
    with open(path, "r+b") as stream:
        stream.seek(at)
        entry = ENTRY.unpack(stream.read(ENTRY.size))
        stream.seek(at)
        stream.write(ENTRY.pack(*what(entry)))


def test_what_is_not_in_memory_is_not_waited_for(tmp_path: Path) -> None:
    """Whoever must not wait, for the file system may never answer, is told so."""
    data = faults.frames(1, 2, 3)
    record = faults.store(Repository.create(tmp_path / "vm", "packs"), 0, {"disk": data})
    with closing(Repository.open(tmp_path / "vm").open_disk(record, "disk")) as image:
        assert image.read_sound(0, FRAME) is None, "no pack is open"
        assert image.read(0, len(data)) == data
        assert image.read_sound(FRAME, FRAME) in (None, data[FRAME : 2 * FRAME])
        fd = os.open(max((tmp_path / "vm" / "packs").iterdir()), os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        assert image.read_sound(0, FRAME) in (None, data[:FRAME])
        assert image.read(0, len(data)) == data


def test_a_patch_on_itself_is_a_damaged_frame(tmp_path: Path) -> None:
    repository, content = patched_once(tmp_path)
    lie(repository, 1, 0, lambda entry: (*entry[:5], 0, 0, 0))
    with closing(repository.open_disk(repository.revisions()[1], "disk")) as image:
        assert image.check(0, 3) == [1]
        with pytest.raises(Corrupt, match="depth"):
            image.read(FRAME, 1)
        assert image.read(0, FRAME) == content[:FRAME]


@pytest.mark.parametrize("revision", [0, 1], ids=["base", "patch"])
def test_a_size_beyond_belief_is_no_request_for_memory(
    tmp_path: Path, revision: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, _ = patched_once(tmp_path)
    lie(repository, revision, 1 - revision, lambda entry: (entry[0], 0xFFFFFFFF, *entry[2:]))
    pread = os.pread

    def bounded(fd: int, length: int, offset: int) -> bytes:
        assert length <= 64 * codec.STORED_BYTES_MAX
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", bounded)
    with closing(repository.open_disk(repository.revisions()[1], "disk")) as image:
        assert image.check(0, 3) == [1]
        with pytest.raises(Corrupt):
            image.read(FRAME, 1)
    repository.gc()


def test_an_image_that_cannot_be_opened_keeps_no_descriptor(tmp_path: Path) -> None:
    """Its map is open, and locked, before the packs are looked at."""
    vm = make_vm(tmp_path, "vm", b"x")
    (record,) = vm.revisions()
    os.rename(vm.layout.packs, tmp_path / "packs")
    vm.layout.packs.touch()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(NotADirectoryError):
        vm.open_disk(record, "disk")
    assert os.listdir("/proc/self/fd") == before
