"""What the system refuses for a while (descriptors, permissions) is never taken for damage."""

from __future__ import annotations

import errno
import os
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backyfs.errors import Corrupt
from backyfs.model import FRAME
from backyfs.store.fs import Fs
from backyfs.store.packs.image import PackImage
from backyfs.store.repository import Repository
from tests.store import faults
from tests.store.faults import Child, History, revision_id


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with faults.scratch(tmp_path) as directory:
        yield faults.make_history(directory / "vm")


def with_few_descriptors(spare: int, work: Callable[[], object]) -> None:
    """Do `work` where only `spare` more files can be open; a refusal may end it."""
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    for fd in range(3, highest + 1):  # the numbers below the limit must all be taken
        try:
            os.fstat(fd)
        except OSError:
            os.dup2(0, fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + spare, 4096))
    try:
        work()
    except OSError as exc:
        assert exc.errno == errno.EMFILE, exc


def read_everything(path: Path) -> None:
    repository = Repository.open(path)
    for record in repository.revisions():
        faults.content(repository, record)


def work_on(history: History) -> dict[str, Callable[[], object]]:
    disks = faults.next_disks(history)
    return {
        "read": lambda: read_everything(history.path),
        "damage": lambda: history.open().damage(),
        "backup": lambda: faults.store(history.open(), 7, disks, history.newest),
        "tag": lambda: history.open().update_state(
            revision_id(2), lambda state: replace(state, why="new")
        ),
    }


@pytest.mark.parametrize("what", ["read", "damage", "backup", "tag"])
def test_too_many_open_files(history: History, what: str) -> None:
    history.open().update_state(revision_id(2), lambda state: replace(state, tags=("manual:x",)))
    disks = {revision_id(7): faults.next_disks(history)}
    for spare in range(14):
        copy = history.copy(history.path.with_name(f"copy{spare}"))
        work = work_on(copy)[what]

        def limited(_: Fs, spare: int = spare, work: Callable[[], object] = work) -> None:
            try:
                with_few_descriptors(spare, work)
            except Corrupt as exc:
                assert "Too many open files" in str(exc)

        assert not Child(limited).run()
        faults.check(copy.path, copy.contents, disks)
        assert copy.open().quarantine.bad() == set()
        assert copy.open().state(copy.open().record(revision_id(2))).tags == ("manual:x",)


def without_descriptors(victim: Path) -> Callable[..., int]:
    """An open(2) for which there is no descriptor left when it is about `victim`."""
    really_open = os.open

    def failing(path: Path | str, *arguments: Any, **more: Any) -> int:
        if Path(path) == victim:
            raise OSError(errno.EMFILE, "Too many open files")
        return really_open(path, *arguments, **more)

    return failing


def test_a_record_that_could_not_be_read_for_a_moment(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = history.open()
    victim = repository.layout.record(revision_id(3))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", without_descriptors(victim))
        assert [*repository.unreadable()] == [revision_id(3)]
        with pytest.raises(Corrupt, match="Too many open files"):
            repository.record(revision_id(3))
    assert repository.unreadable() == {}
    assert repository.record(revision_id(3)).id == revision_id(3)


def test_tags_that_could_not_be_read_are_not_replaced(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = history.open()
    repository.update_state(revision_id(3), lambda state: replace(state, tags=("manual:keep",)))
    victim = repository.layout.state(revision_id(3))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", without_descriptors(victim))
        with pytest.raises(OSError, match="Too many"):
            repository.update_state(revision_id(3), lambda state: replace(state, why="x"))
    assert repository.state(repository.record(revision_id(3))).tags == ("manual:keep",)


@pytest.mark.parametrize("code", [errno.EIO, errno.EBADMSG])
def test_errors_of_the_medium_are_damage_of_a_range(
    history: History, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EIO while reading a frame: its range only, recorded, and pardoned when it reads again."""
    repository = history.open()
    record = repository.record(revision_id(4))
    pread = os.pread
    image = repository.open_disk(record, "root")
    assert isinstance(image, PackImage)
    place = faults.chain(image, 2)[0]
    home = image._library.segment(place.unit)
    at = home.entry(place.number)[0]

    def failing(fd: int, length: int, offset: int) -> bytes:
        if fd == home.pack.fd and offset <= at < offset + length:
            raise OSError(code, os.strerror(code))
        return pread(fd, length, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", failing)
        assert image.check(0, image.map.frames) == [2]
        with pytest.raises(Corrupt) as caught:
            image.read(0, image.size)
        assert (caught.value.revision, caught.value.offset) == (record.id, 2 * FRAME)
        assert image.read(0, 2 * FRAME)
        assert set(repository.damage()) >= {record.id}
    assert image.check(0, image.map.frames) == []
    assert repository.damage() == {}
    image.close()


def test_errors_of_the_medium_in_tables_and_maps(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread = os.pread
    bad: set[Path] = set()

    def failing(fd: int, length: int, offset: int) -> bytes:
        if Path(os.readlink(f"/proc/self/fd/{fd}")) in bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", failing)
    for path in [*(history.path / "packs").iterdir(), *history.path.glob("revisions/*.map")]:
        bad = {path}
        repository = history.open()
        named = set(repository.damage())
        assert named
        for record in repository.revisions():
            try:
                assert faults.content(repository, record) == history.contents[record.id]
            except Corrupt as exc:
                assert exc.revision == record.id
                assert record.id in named
        with pytest.raises((Corrupt, OSError)):
            repository.gc()
        bad = set()
        for file in history.path.glob("quarantine/*"):
            file.unlink()
    faults.check(history.path, history.contents)


@pytest.mark.parametrize("end", ["first", "last"])
def test_either_end_of_a_pack(tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header costs nothing; of the table there is another footer, and what else is lost are
    the frames that the block tells of.
    """
    repository = Repository.create(tmp_path / "vm", "packs")
    data = random.Random(1).randbytes(400 * FRAME)
    record = faults.store(repository, 0, {"disk": data})
    (pack,) = repository.layout.packs.iterdir()
    size = pack.stat().st_size
    place = (pack, 0, 96) if end == "first" else (pack, (size - 1) // 4096 * 4096, size)
    disk = record.disks["disk"]
    with (
        faults.unreadable(monkeypatch, place),
        closing(repository.format.open(record, disk, check=True)) as image,
    ):
        bad = image.check(0, 400)
        assert bad == ([] if end == "first" else list(range(400 - len(bad), 400)))
        assert len(bad) <= 4096 // 32
        sound = (400 - len(bad)) * FRAME
        assert image.read(0, sound) == data[:sound]
    with closing(repository.format.open(record, disk, check=True)) as image:
        assert image.check(0, 400) == []
    assert repository.damage() == {}


def test_json_that_is_nested_deeply(history: History) -> None:
    """At any depth it is a damaged record: decoder and encoder have limits of their own."""
    path = history.open().layout.record(revision_id(2))
    for depth in (10, 500, *range(900, 1000), 100_000):
        path.write_text('{"a":' + "[" * depth + "]" * depth + ',"blake3":""}')
        assert history.open().unreadable().keys() == {revision_id(2)}
