"""Names of exports: what they mean, how they are listed, and what is never let through."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backyfs.errors import BackyfsError, NoRepository, NoRevision, UsageError
from backyfs.model import Consistency, Partition, Trust
from backyfs.nbd import exports as exports_module
from backyfs.nbd.exports import Exports
from backyfs.nbd.protocol.constants import ExportFlag
from backyfs.reader.cache import Block, FrameCache
from backyfs.reader.catalog import Catalog
from backyfs.reader.images import OpenImages
from backyfs.reader.overlay import Scratch
from backyfs.store.packs.rooms import Rooms
from backyfs.store.record import Draft, Record, sealed, unsealed
from backyfs.store.repository import Repository
from tests.reader.stores import add_revision, content, make_vm

START = datetime(2026, 11, 1, 12, tzinfo=UTC)
MIB = 1 << 20


def partitioned(repository: Repository, data: bytes, *partitions: Partition) -> Record:
    with (
        repository.writing() as intent,
        repository.begin(intent, None) as staging,
    ):
        staging.disk("disk", len(data)).write(0, data)
        return staging.commit(Draft(Consistency.CRASH, partitions={"disk": partitions}))


class Names:
    """Exports of a directory, with what they hold open closed at the end."""

    def __init__(self, base: Path, scratch: Scratch | None = None) -> None:
        self.images = OpenImages(FrameCache(4 << 20), linger_s=0)
        self.exports = Exports(Catalog(base, refresh_s=0), self.images, scratch)

    def name(self, text: str) -> str:
        return self.exports.find(text).name

    def listed(self) -> list[str]:
        return [name for name, _ in self.exports.listed()]

    def read(self, text: str, offset: int, length: int) -> bytes:
        attached = self.exports.open(self.exports.find(text))
        try:
            return bytes(attached.read(offset, length))
        finally:
            attached.close()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = tmp_path / "srv"
    directory.mkdir()
    return directory


@pytest.fixture
def names(base: Path, tmp_path: Path) -> Iterator[Names]:
    found = Names(base, Scratch(tmp_path))
    yield found
    found.images.sweep()
    assert not len(found.images)
    found.images.close()


def history(base: Path, name: str = "web01") -> list[str]:
    """Three revisions, a day apart; the ids, oldest first."""
    repository = make_vm(base, name)
    tags = (("daily", "weekly"), ("daily",), ("manual:before upgrade",))
    return [
        add_revision(
            repository, content(3, seed=number), time=START + timedelta(days=number), tags=tags_
        ).id
        for number, tags_ in enumerate(tags)
    ]


def test_a_name_means_a_revision_and_is_reported_canonically(base: Path, names: Names) -> None:
    first, second, third = history(base)
    meant = {
        third: third,
        "latest": third,
        "last": third,
        "0": third,
        "1": second,
        "first": first,
        "tag:daily": second,
        "daily": second,
        "tag:weekly": first,
        "last(tag:daily & tag:weekly)": first,
        "manual:before upgrade": third,
        "2026-11-02": second,
        "2026-11-02T12:00": second,
        first[:12]: first,
        "all": third,
    }
    for spec, revision in meant.items():
        assert names.name(f"web01/{spec}") == f"web01/{revision}"
        assert names.name(f"web01/{spec}@rw") == f"web01/{revision}@rw"


def test_in_one_vms_directory_the_revision_is_enough(base: Path) -> None:
    ids = history(base)
    names = Names(base / "web01")
    for spec in ("latest", ids[-1], f"web01/{ids[-1]}", "web01/latest", "latest/disk"):
        assert names.name(spec) == f"web01/{ids[-1]}"
    for listed in names.listed():
        assert names.name(listed) == listed


def test_a_disk_must_be_named_where_there_are_several(base: Path, names: Names) -> None:
    repository = make_vm(base, "db")
    record = add_revision(repository, {"root": content(1), "data": content(2, seed=9)})
    assert names.name("db/latest/data") == f"db/{record.id}/data"
    assert names.listed() == [f"db/{record.id}/root", f"db/{record.id}/data"]
    assert names.read("db/latest/data", 0, 1000) == content(2, seed=9)[:1000]
    with pytest.raises(UsageError, match="root, data"):
        names.name("db/latest")
    with pytest.raises(NoRevision, match="root, data"):
        names.name("db/latest/nope")


def test_a_partition_is_a_slice_of_the_disk(base: Path, names: Names) -> None:
    data = content(40)
    repository = make_vm(base, "web01")
    first = Partition(1, 65536 + 512, 70000, "83", "", "ext4")
    second = Partition(12, 20 * 65536, MIB, "83", "", "")
    beyond = Partition(3, 39 * 65536, MIB, "83", "", "")
    before = Partition(4, -4096, 4096, "83", "", "")
    record = partitioned(repository, data, first, second, beyond, before)
    export = names.exports.find("web01/latest/p1")
    assert export.name == f"web01/{record.id}/p1"
    assert export.info.size == 70000
    assert "ext4" in export.description
    assert names.name("web01/latest/disk/p12") == f"web01/{record.id}/p12"
    assert names.read("web01/latest/p1", 5, 100) == data[66048 + 5 : 66048 + 105]
    assert names.read("web01/latest/p12@rw", 0, MIB) == data[20 * 65536 :][:MIB]
    with pytest.raises(NoRevision, match="p1, p12"):
        names.name("web01/latest/p2")
    with pytest.raises(NoRevision, match="beyond"):
        names.name("web01/latest/p3")
    with pytest.raises(NoRevision, match="beyond"):
        names.name("web01/latest/p4")


def test_a_disk_named_like_a_partition_is_the_disk(base: Path, names: Names) -> None:
    repository = make_vm(base, "odd")
    record = add_revision(repository, {"p1": content(1)})
    assert names.name("odd/latest/p1") == f"odd/{record.id}"


def test_a_list_has_names_that_work_with_time_and_tags(base: Path, names: Names) -> None:
    first, second, third = history(base)
    make_vm(base, "empty")
    found = list(names.exports.listed())
    assert [name for name, _ in found] == [f"web01/{id_}" for id_ in (third, second, first)]
    assert found[2] == (f"web01/{first}", "web01 2026-11-01 12:00:00 UTC; daily, weekly")
    for name, _ in found:
        assert names.name(name) == name


def test_what_cannot_be_read_is_left_out_of_a_list_with_a_warning(
    base: Path, names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    one = history(base, "one")
    make_vm(base, "damaged", content(1)).layout.identity.write_bytes(b"{")
    newer = make_vm(base, "newer", content(1)).layout.identity
    newer.write_bytes(sealed({**unsealed(newer.read_bytes(), ""), "format": 99}))
    assert len(names.listed()) == len(one)
    told = [record.args for record in caplog.records if "left out" in record.getMessage()]
    assert [args["vm"] for args in told if isinstance(args, dict)] == ["damaged", "newer"]


def test_a_distrusted_revision_says_so(base: Path, names: Names) -> None:
    history(base)
    repository = Repository.open(base / "web01")
    record = repository.revisions()[0]
    repository.update_state(record.id, lambda state: replace(state, trust=Trust.DISTRUSTED))
    assert "distrusted" in names.exports.find("web01/first").description


def test_new_revisions_appear_at_once_and_removed_ones_vanish(base: Path, names: Names) -> None:
    history(base)
    repository = Repository.open(base / "web01")
    record = add_revision(repository, content(2, seed=77))
    assert names.listed()[0] == f"web01/{record.id}"
    assert names.name("web01/latest") == f"web01/{record.id}"


def test_each_vm_has_its_share_of_a_long_list(
    base: Path, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports_module, "LISTED_MAX", 4)
    one, two = history(base, "one"), history(base, "two")
    assert names.listed() == [f"one/{one[2]}", f"one/{one[1]}", f"two/{two[2]}", f"two/{two[1]}"]


def test_no_name_means_the_only_export(base: Path, names: Names) -> None:
    with pytest.raises(NoRevision, match="nothing to export"):
        names.name("")
    repository = make_vm(base, "web01", content(1))
    assert names.name("") == names.listed()[0]
    add_revision(repository, content(1, seed=3))
    with pytest.raises(UsageError, match="name an export"):
        names.name("")


def test_flags_say_what_an_export_can_do(base: Path, names: Names) -> None:
    history(base)
    flags = names.exports.find("web01/latest").info.flags
    assert ExportFlag.READ_ONLY in flags
    assert ExportFlag.CAN_MULTI_CONN in flags
    assert ExportFlag.SEND_TRIM not in flags
    flags = names.exports.find("web01/latest@rw").info.flags
    assert ExportFlag.READ_ONLY not in flags
    assert ExportFlag.CAN_MULTI_CONN not in flags
    assert ExportFlag.SEND_FLUSH | ExportFlag.SEND_FUA in flags
    assert ExportFlag.SEND_TRIM | ExportFlag.SEND_WRITE_ZEROES in flags


def test_without_a_scratch_directory_nothing_is_writable(base: Path) -> None:
    history(base)
    names = Names(base)
    with pytest.raises(UsageError, match="overlays"):
        names.read("web01/latest@rw", 0, 1)


BAD_NAMES = [
    "nope",
    "nope/latest",
    "web01",
    "web01/",
    "/web01/latest",
    "web01//latest",
    "web01/latest/",
    "web01/nope",
    "web01/latest/disk/p1/more",
    "web01/latest/p",
    "web01/latest/p01234",
    "web01/latest/p٣",
    "web01/latest@rw@rw",
    "web01/latest@ro",
    "../web01/latest",
    "web01/../web01",
    "./web01/latest",
    ".hidden/latest",
    "web01/latest/../../../etc/passwd",
    "web01\0/latest",
    "web01/latest\0",
    "web01/\n",
    "web01/" + "not(" * 60,
    "web01/" + "0," * 2000,
    "x" * 5000,
    "web01/latest/" + "d" * 300,
    "@rw",
    "/",
    "😀/latest",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name[:30]))
def test_bad_names_are_refused_with_words(base: Path, names: Names, name: str) -> None:
    history(base)
    with pytest.raises((UsageError, NoRepository, NoRevision)) as caught:
        names.exports.find(name)
    assert caught.value.message


@given(st.text(alphabet="ab/.@rwp1-\0 \n()&,:é", max_size=30))
@settings(max_examples=200, deadline=None)
def test_no_name_reaches_the_file_system_unchecked(text: str) -> None:
    """Whatever a client says: only directories with the name of a VM are looked at."""
    looked: list[str] = []

    class Watching(Catalog):
        def _directory(self, name: str) -> Path:
            found = super()._directory(name)
            looked.append(name)
            return found

    exports = Exports(Watching(Path(os.devnull).parent), OpenImages(FrameCache(1)))
    try:
        exports.find(text)
    except BackyfsError:
        pass
    assert all(name.replace("-", "").replace(".", "").isalnum() for name in looked)
    assert not any(name.startswith(".") for name in looked)


def test_data_maps_are_shared_while_an_image_is_open(base: Path, names: Names) -> None:
    history(base)
    export = names.exports.find("web01/latest")
    one, two = names.exports.open(export), names.exports.open(export)
    assert one.map is two.map
    one.close()
    two.close()


def test_a_small_part_that_is_kept_keeps_no_block(tmp_path: Path) -> None:
    make_vm(tmp_path, "web01", random.Random(3).randbytes(1 << 20))
    rooms = Rooms(2, 1 << 20)

    def room(length: int) -> memoryview:
        found = rooms.take(length)
        assert found is not None
        return found

    images = OpenImages(FrameCache(1 << 20, room))
    exports = Exports(Catalog(tmp_path), images)
    attached = exports.open(exports.find("web01/latest"))
    whole = attached.read(0, 1 << 20)
    small, large = attached.read(5, 4096), attached.try_read(5, 512 << 10)
    assert large is not None
    assert (bytes(small), bytes(large)) == (whole[5 : 5 + 4096], whole[5 : 5 + (512 << 10)])
    attached.close()
    del whole
    images.cache.put(Block("other", 0, bytes(1 << 20)))  # nothing else is cached any more
    assert rooms.free == 1
    del large
    assert rooms.free == 2
    assert len(small) == 4096
    images.close()
