from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path
from types import MappingProxyType
from typing import cast
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backyfs.errors import Corrupt, UsageError
from backyfs.model import FRAME, Extent, Partition, Trust
from backyfs.reader.cache import FrameCache
from backyfs.reader.catalog import Catalog, Revision, Vm
from backyfs.reader.images import OpenImages
from backyfs.reader.tree import ROOT, Inodes, Kind, Node, NoEntry, Tree, at
from backyfs.reader.tree import Clock as TreeClock
from backyfs.store.quarantine import Bad
from backyfs.store.record import State
from backyfs.store.repository import Repository
from tests.reader.stores import add_revision, content, make_vm
from tests.reader.test_catalog import Clock
from tests.reader.test_spec import revision as revision_of

DATA = content(5, seed=2, tail=99)
TIME = datetime(2026, 11, 21, 22, 1, 12, 345678, tzinfo=UTC)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def vm(tmp_path: Path) -> Repository:
    repository = make_vm(tmp_path, "web01")
    add_revision(repository, {"root": DATA, "data": b""}, time=TIME, tags=("daily",))
    add_revision(repository, DATA, time=TIME + timedelta(hours=1))
    return repository


@pytest.fixture
def tree(tmp_path: Path, vm: Repository, clock: Clock) -> Tree:
    return Tree(Catalog(tmp_path, clock=clock), OpenImages(FrameCache()))


def walk(tree: Tree, *names: str) -> Node:
    node = tree.node(ROOT)
    for name in names:
        node = tree.child(node.inode, name)
    return node


def names(tree: Tree, *path: str) -> list[str]:
    return [name for name, _ in tree.children(walk(tree, *path).inode)]


def test_the_tree(tree: Tree, vm: Repository) -> None:
    first, second = (r.id for r in vm.revisions())
    assert names(tree) == ["web01"]
    assert names(tree, "web01") == [first, second, "at", "by-tag", "latest"]
    assert names(tree, "web01", first) == ["root.img", "data.img", "revision.json"]
    assert names(tree, "web01", second) == ["disk.img", "revision.json"]
    latest = walk(tree, "web01", "latest")
    assert (latest.kind, latest.target, latest.size) == (Kind.LINK, second, len(second))
    nanoseconds = int(TIME.timestamp()) * 10**9 + 345_678_000
    image = walk(tree, "web01", first, "root.img")
    assert (image.kind, image.size, image.mtime_ns) == (Kind.FILE, len(DATA), nanoseconds)
    assert image.data == vm.revisions()[0].disks["root"].data
    assert walk(tree, "web01", first).mtime_ns == nanoseconds


def test_listing_and_looking_up_agree(tree: Tree) -> None:
    seen, links = set(), set()
    todo = [tree.node(ROOT)]
    while todo:
        directory = todo.pop()
        for name, node in tree.children(directory.inode):
            assert tree.child(directory.inode, name) == node
            assert tree.node(node.inode) == node
            assert 0 < node.inode < 1 << 63
            if node.kind is Kind.LINK:  # one for each level, whatever its name
                assert tree.children(walk(tree, "web01", node.target.lstrip("./")).inode)
                links.add((node.inode, node.target))
                continue
            assert node.inode not in seen
            seen.add(node.inode)
            if node.kind is Kind.DIRECTORY:
                todo.append(node)
    assert len(seen) == 1 + 4 + 1 + 3 + 2
    assert len({inode for inode, _ in links}) == len(links) == 4


def test_numbers_are_the_same_in_every_mount(tmp_path: Path, tree: Tree) -> None:
    other = Tree(Catalog(tmp_path), OpenImages(FrameCache()))
    path = ("web01", walk(tree, "web01", "latest").target, "disk.img")
    assert walk(other, *path).inode == walk(tree, *path).inode


@pytest.mark.parametrize(
    "path",
    [
        ("none",),
        ("web01", "none"),
        ("web01", "20200101T000000Z-aaaa"),
        ("web01", "latest", "disk.img"),
        ("web01", "REV", "none"),
        ("web01", "REV", "disk"),
        ("web01", "REV", "disk.img", "x"),
        ("..",),
        ("web01", ".."),
        ("",),
        ("\udcff",),
    ],
)
def test_what_is_not_there(tree: Tree, vm: Repository, path: tuple[str, ...]) -> None:
    newest = vm.revisions()[-1].id
    with pytest.raises(NoEntry):
        walk(tree, *(newest if name == "REV" else name for name in path))


@pytest.mark.parametrize("inode", [0, 2, 12345 << 16, (1 << 64) - 1])
def test_numbers_never_given_out(tree: Tree, inode: int) -> None:
    with pytest.raises(NoEntry):
        tree.node(inode)
    with pytest.raises(NoEntry):
        tree.open(inode)


def test_a_vm_without_revisions(tmp_path: Path, tree: Tree) -> None:
    make_vm(tmp_path, "empty")
    assert names(tree, "empty") == []
    with pytest.raises(NoEntry):
        walk(tree, "empty", "latest")


def test_reading(tree: Tree, vm: Repository) -> None:
    first = vm.revisions()[0].id
    opened = tree.open(walk(tree, "web01", first, "root.img").inode)
    assert opened.image.read(0, opened.image.size) == DATA
    opened.close()
    opened = tree.open(walk(tree, "web01", first, "data.img").inode)
    assert opened.image.size == 0
    opened.close()
    for path in (("web01",), ("web01", "latest"), ("web01", first)):
        with pytest.raises(NoEntry):
            tree.open(walk(tree, *path).inode)


def test_removed_revisions_are_gone_and_forgotten(tree: Tree, vm: Repository, clock: Clock) -> None:
    first, second = (r.id for r in vm.revisions())
    gone = walk(tree, "web01", first, "root.img").inode
    stays = walk(tree, "web01", second, "disk.img").inode
    vm.remove([first])
    clock.now += 1
    assert names(tree, "web01") == [second, "at", "by-tag", "latest"]
    for ask in (tree.node, tree.open):
        with pytest.raises(NoEntry):
            ask(gone)
    assert tree.node(stays).inode == stays


def test_vms_that_are_gone_are_forgotten(tmp_path: Path) -> None:
    """Also if nobody asks for them again: names come and go as long as there is a mount."""
    make_vm(tmp_path, "web01", DATA)
    tree = Tree(Catalog(tmp_path, refresh_s=0), OpenImages(FrameCache()))
    seen = set()
    for number in range(5):
        (vm,) = tmp_path.iterdir()
        vm.rename(tmp_path / f"vm{number}")
        tree.node(ROOT)
        seen.add(walk(tree, f"vm{number}", "latest").inode)
    tree.node(ROOT)
    found = set()
    for inode in seen:
        with contextlib.suppress(NoEntry):
            tree._inodes.find(inode)
            found.add(inode)
    assert len(seen) == 5
    assert len(found) <= 2


def test_latest_moves(tree: Tree, vm: Repository, clock: Clock) -> None:
    before = walk(tree, "web01", "latest")
    added = add_revision(vm, DATA)
    clock.now += 1
    after = walk(tree, "web01", "latest")
    assert after.target == added.id != before.target
    assert after.inode != before.inode  # a link never changes, its name leads to another one
    assert not after.name_lasts


# ---- by-tag, at ----------------------------------------------------------------------------------


def links(tree: Tree, *path: str) -> dict[str, str]:
    return {name: node.target for name, node in tree.children(walk(tree, *path).inode)}


def test_by_tag(tree: Tree, vm: Repository, clock: Clock) -> None:
    first, second = (r.id for r in vm.revisions())
    assert links(tree, "web01", "by-tag", "daily") == {first: f"../../{first}"}
    tags = ("manual:before upgrade", "daily")
    for revision in (first, second):
        vm.update_state(revision, lambda old: State(tags, old.trust))
    clock.now += 1
    assert names(tree, "web01", "by-tag") == ["daily", "manual:before upgrade"]
    for tag in ("daily", "manual:before upgrade"):
        assert links(tree, "web01", "by-tag", tag) == {r: f"../../{r}" for r in (first, second)}
    gone = walk(tree, "web01", "by-tag", "daily")
    stays = walk(tree, "web01", "by-tag", "daily", second)
    for revision in (first, second):
        vm.update_state(revision, lambda old: State((), old.trust))
    clock.now += 1
    assert names(tree, "web01", "by-tag") == []
    assert tree.node(stays.inode) == stays  # a link is its revision's
    with pytest.raises(NoEntry):
        tree.node(gone.inode)
    with pytest.raises(NoEntry):
        walk(tree, "web01", "by-tag", "daily")


@pytest.fixture
def history(tmp_path: Path) -> Repository:
    """Backups at 22:30 UTC of 18 to 20 November, and one of the 21st, a Saturday, at noon."""
    repository = make_vm(tmp_path, "db")
    for day in (18, 19, 20):
        add_revision(repository, DATA, time=datetime(2026, 11, day, 22, 30, tzinfo=UTC))
    add_revision(repository, DATA, time=datetime(2026, 11, 21, 12, 0, tzinfo=UTC))
    return repository


def tree_at(path: Path, now: datetime, zone: tzinfo = UTC) -> Tree:
    return Tree(Catalog(path), OpenImages(FrameCache()), clock=TreeClock(lambda: now, zone))


NOON = datetime(2026, 11, 21, 13, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("2026-11-18", 0),
        ("2026-11-19T22", 1),
        ("2026-11-19T22:29", 0),
        ("2026-11-19T22:30", 1),
        ("2026-11-19T22:29:59", 0),
        ("2026-11-19T23:30+01:00", 1),
        ("2026-11-19T22:30Z", 1),
        ("now", 3),
        ("today", 3),
        ("yesterday", 2),
        ("2-days-ago", 1),
        ("2-hours-ago", 2),
        ("59-minutes-ago", 3),
        ("before-yesterday", 1),
        ("2099-01-01", 3),
        ("2026-11", 3),
        ("last-saturday", None),
        ("last-week", None),
        ("2026-11-17", None),
        ("2026-02-30", None),
        ("nonsense", None),
        ("", None),
        ("..", None),
    ],
)
def test_a_time_leads_to_the_newest_revision_not_after_it(
    tmp_path: Path, history: Repository, name: str, expected: int | None
) -> None:
    tree = tree_at(tmp_path, NOON)
    if expected is None:
        with pytest.raises(NoEntry):
            walk(tree, "db", "at", name)
    else:
        link = walk(tree, "db", "at", name)
        assert link.target == f"../{history.revisions()[expected].id}"
        assert not link.name_lasts


def test_what_at_lists(tmp_path: Path, history: Repository) -> None:
    ids = [f"../{record.id}" for record in history.revisions()]
    assert links(tree_at(tmp_path, NOON), "db", "at") == {
        "now": ids[3],
        "today": ids[3],
        "yesterday": ids[2],
        "2026-11-18": ids[0],
        "2026-11-19": ids[1],
        "2026-11-20": ids[2],
        "2026-11-21": ids[3],
        "2026-11-18T22": ids[0],
        "2026-11-19T22": ids[1],
        "2026-11-20T22": ids[2],
        "2026-11-21T12": ids[3],
    }
    east = tree_at(tmp_path, NOON, timezone(timedelta(hours=2)))
    assert "2026-11-19T00" in names(east, "db", "at")
    assert "2026-11-18" not in names(east, "db", "at")
    assert names(east, "db", "at") == names(east, "db", "at")


def test_at_where_clocks_jumped(tmp_path: Path) -> None:
    """One revision is published with a time before its parent's, one with a future time."""
    repository = make_vm(tmp_path, "db")
    for day in (18, 16, 30):
        add_revision(repository, DATA, time=datetime(2026, 11, day, 6, 0, tzinfo=UTC))
    ids = [f"../{record.id}" for record in repository.revisions()]
    tree = tree_at(tmp_path, NOON)
    assert links(tree, "db", "at") == {
        "now": ids[2],
        "today": ids[2],
        "yesterday": ids[1],  # by order, not by time, it is the newest of those before
        "2026-11-16": ids[1],
        "2026-11-18": ids[1],
        "2026-11-21": ids[2],  # made now
        "2026-11-16T06": ids[1],
        "2026-11-18T06": ids[1],
        "2026-11-21T13": ids[2],
    }


MOMENTS = st.integers(0, 40 * 24).map(lambda hours: NOON - timedelta(days=35, hours=-hours))


@given(
    times=st.lists(MOMENTS, min_size=1, max_size=6),
    zone=st.sampled_from([UTC, ZoneInfo("Europe/Berlin"), ZoneInfo("Asia/Kathmandu")]),
)
def test_what_at_lists_is_what_it_finds(times: list[datetime], zone: tzinfo) -> None:
    """Over the end of summer time, with clocks that jump and revisions from the future."""
    pairs = [revision_of(seq, time) for seq, time in enumerate(times, 1)]
    revisions = {
        record.id: Revision(record, state, int(record.time.timestamp()) * 10**9, 0, 0)
        for record, state in pairs
    }
    vm = Vm(1, "vm", cast("Repository", None), MappingProxyType(revisions), 0, 0)
    listed = at.listing(vm, NOON, zone)
    assert len({name for name, _ in listed}) == len(listed) > 2
    for name, found in listed:
        assert at.find(vm, name, NOON, zone) is found
    shown = {name for name, _ in listed}
    for record, _ in pairs:
        local = min(record.time, NOON).astimezone(zone).isoformat()
        assert {local[:10], local[:13]} <= shown


# ---- partitions ----------------------------------------------------------------------------------

TABLE = (
    Partition(1, FRAME, FRAME, "ef", "EFI", "vfat"),
    Partition(5, 2 * FRAME + 512, 2 * FRAME, "83", "", "ext4"),
)


def read_all(tree: Tree, *path: str) -> bytes:
    opened = tree.open(walk(tree, *path).inode)
    data = bytes(opened.image.read(0, opened.image.size))
    opened.close()
    return data


def test_partitions_of_one_disk(tree: Tree, vm: Repository) -> None:
    record = add_revision(vm, DATA, time=TIME, partitions={"disk": TABLE})
    path = ("web01", record.id)
    assert names(tree, *path) == ["disk.img", "partitions", "revision.json"]
    assert names(tree, *path, "partitions") == ["1.img", "5.img"]
    for partition in TABLE:
        expected = DATA[partition.start : partition.start + partition.length]
        for name in (f"{partition.number}.img", f"disk-{partition.number}.img"):
            node = walk(tree, *path, "partitions", name)
            assert (node.size, node.lasts, node.name_lasts) == (partition.length, True, True)
            assert node.data == min(partition.length, record.disks["disk"].data)
            assert node.mtime_ns == walk(tree, *path).mtime_ns
            assert read_all(tree, *path, "partitions", name) == expected
    for name in ("2.img", "disk-2.img", "root-1.img", "1", "disk.img"):
        with pytest.raises(NoEntry):
            walk(tree, *path, "partitions", name)


def test_partitions_of_several_disks(tree: Tree, vm: Repository) -> None:
    disks = {"root": DATA, "root-1": DATA[::-1], "data": b""}
    record = add_revision(vm, disks, partitions={"root": TABLE, "root-1": TABLE[:1]})
    path = ("web01", record.id, "partitions")
    assert names(tree, *path) == ["root-1.img", "root-5.img", "root-1-1.img"]
    assert read_all(tree, *path, "root-1.img") == DATA[FRAME : 2 * FRAME]
    assert read_all(tree, *path, "root-1-1.img") == DATA[::-1][FRAME : 2 * FRAME]
    with pytest.raises(NoEntry):
        walk(tree, *path, "1.img")


@pytest.mark.parametrize(
    ("start", "length"), [(0, 0), (-512, 1024), (len(DATA), 1), (FRAME, len(DATA)), (512, -512)]
)
def test_a_record_with_impossible_partitions_shows_none(
    tree: Tree, vm: Repository, start: int, length: int
) -> None:
    bad = Partition(1, start, length, "83", "", "")
    record = add_revision(vm, DATA, partitions={"disk": (bad,)})
    assert names(tree, "web01", record.id) == ["disk.img", "revision.json"]


def test_reads_of_a_slice_stay_inside(tree: Tree, vm: Repository) -> None:
    record = add_revision(vm, DATA, partitions={"disk": TABLE})
    opened = tree.open(walk(tree, "web01", record.id, "partitions", "5.img").inode)
    start, size = TABLE[1].start, TABLE[1].length
    assert opened.image.size == size
    assert opened.image.raw_fd() is None
    for ask in (opened.image.read, opened.image.try_read, opened.image.read_unless_reserved):
        for offset, length in ((-1, 1), (0, size + 1), (size, 1), (0, -1)):
            with pytest.raises(ValueError, match="outside the slice"):
                ask(offset, length)
    opened.image.prefetch(Extent(FRAME, 10 * FRAME))
    data = opened.image.try_read(FRAME, FRAME)
    assert data is not None
    assert bytes(data) == DATA[start + FRAME : start + 2 * FRAME]
    opened.image.prefetch(Extent(size, FRAME))
    opened.close()


def test_slices_share_the_image_of_their_disk(tree: Tree, vm: Repository) -> None:
    record = add_revision(vm, DATA, partitions={"disk": TABLE})
    paths = [("disk.img",), ("partitions", "1.img"), ("partitions", "5.img")]
    opened = [tree.open(walk(tree, "web01", record.id, *path).inode) for path in paths]
    assert len(tree.images) == 1
    for one in opened:
        one.close()


# ---- extended attributes -------------------------------------------------------------------------


def test_attributes(tree: Tree, vm: Repository, clock: Clock) -> None:
    new = content(5, seed=9)
    record = add_revision(vm, new, time=TIME, tags=("daily", "a b"), partitions={"disk": TABLE})
    path = ("web01", record.id)
    common = {
        "vm": "web01",
        "revision": record.id,
        "time": "2026-11-21T22:01:12.345678Z",
        "tags": "daily,a b",
        "trust": "trusted",
        "consistency": "crash",
        "parent": record.parent,
        "health": "ok",
    }
    assert attributes(tree, *path) == attributes(tree, *path, "partitions") == common
    assert attributes(tree, *path, "revision.json") == common
    digest = record.disks["disk"].digest
    assert attributes(tree, *path, "disk.img") == {**common, "disk": "disk", "digest": digest}
    assert attributes(tree, *path, "partitions", "1.img") == {
        **common,
        "disk": "disk",
        "partition": "1",
        "offset": str(FRAME),
        "type": "ef",
        "name": "EFI",
        "filesystem": "vfat",
    }
    for other in ((), ("web01",), ("web01", "at"), ("web01", "by-tag", "daily")):
        assert attributes(tree, *other) == {}
    for link in (("latest",), ("at", "now"), ("by-tag", "daily", record.id)):
        assert attributes(tree, "web01", *link) == {}
    vm.update_state(record.id, lambda _: State((), Trust.VERIFIED, TIME, ""))
    vm.quarantine.add(Bad(f"{record.id}-0", 0), "a test")
    clock.now += 1
    now = {**common, "trust": "verified", "checked": common["time"], "health": "damaged"}
    del now["tags"]
    assert attributes(tree, *path) == now


def attributes(tree: Tree, *path: str) -> dict[str, str]:
    return tree.attributes(walk(tree, *path).inode)


# ---- revision.json -------------------------------------------------------------------------------


def read_json(tree: Tree, *path: str) -> dict[str, object]:
    node = walk(tree, *path)
    opened = tree.open(node.inode)
    data = bytes(opened.image.read(0, node.size))
    assert opened.image.size == opened.node.size == node.size == len(data)
    opened.close()
    value = json.loads(data)
    assert isinstance(value, dict)
    return value


def test_revision_json_is_the_record_and_its_state(
    tree: Tree, vm: Repository, clock: Clock
) -> None:
    first = vm.revisions()[0]
    path = ("web01", first.id, "revision.json")
    value = read_json(tree, *path)
    state = value.pop("state")
    assert value == json.loads(vm.layout.record(first.id).read_bytes())
    assert state == {
        "damaged": [],
        "tags": ["daily"],
        "trust": "trusted",
        "verified_at": None,
        "why": "",
    }
    before = walk(tree, *path)
    vm.update_state(first.id, lambda old: State(("manual:ö",), Trust.VERIFIED, TIME, "why"))
    clock.now += 1
    state = read_json(tree, *path)["state"]
    assert state == {
        "damaged": [],
        "tags": ["manual:ö"],
        "trust": "verified",
        "verified_at": "2026-11-21T22:01:12.345678Z",
        "why": "why",
    }
    assert walk(tree, *path).mtime_ns > before.mtime_ns


def test_revision_json_names_the_damage(tree: Tree, vm: Repository, clock: Clock) -> None:
    second = vm.revisions()[1]
    vm.quarantine.add(Bad(f"{second.id}-0", 0), "a test")
    clock.now += 1
    expected = [
        {
            "disk": damage.disk,
            "offset": damage.extent.offset if damage.extent else 0,
            "length": damage.extent.length if damage.extent else None,
            "reason": damage.reason,
        }
        for damage in vm.damage_of(second)
    ]
    assert expected
    state = read_json(tree, "web01", second.id, "revision.json")["state"]
    assert isinstance(state, dict)
    assert state["damaged"] == expected


def test_a_record_damaged_meanwhile(tree: Tree, vm: Repository) -> None:
    path = ("web01", vm.revisions()[0].id, "revision.json")
    inode = walk(tree, *path).inode
    record = vm.layout.record(path[1])
    record.write_bytes(record.read_bytes().replace(b"daily", b"weekl"))
    with pytest.raises(Corrupt):
        tree.open(inode)
    record.unlink()
    with pytest.raises(NoEntry):
        tree.open(inode)


# ---- numbers -------------------------------------------------------------------------------------


def test_colliding_numbers_move_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    class Same:
        def digest(self) -> bytes:
            return bytes(8)

    monkeypatch.setattr(hashlib, "blake2b", lambda *args, **kwargs: Same())
    inodes = Inodes()
    numbers = [inodes.base("vm", str(index)) for index in range(5)]
    assert len(set(numbers)) == 5
    assert 0 not in numbers
    assert [inodes.find(n + 3) for n in numbers] == [(("vm", str(i)), 3) for i in range(5)]
    inodes.keep("vm", lambda part: part == "2")
    assert inodes.find(numbers[2]) == (("vm", "2"), 0)
    with pytest.raises(NoEntry):
        inodes.find(numbers[1])


def test_waiting_is_never_needed_twice(tree: Tree) -> None:
    with pytest.raises(BlockingIOError):
        tree.node(ROOT, wait=False)
    with pytest.raises(BlockingIOError):
        tree.child(ROOT, "web01", wait=False)
    vm = walk(tree, "web01")
    with pytest.raises(BlockingIOError):
        tree.children(vm.inode, wait=False)
    for name, node in tree.children(vm.inode):
        assert tree.child(vm.inode, name, wait=False) == node
        assert tree.node(node.inode, wait=False) == node


def test_a_directory_whose_name_is_no_vm_name(tmp_path: Path) -> None:
    make_vm(tmp_path, "-odd")
    with pytest.raises(UsageError):
        Catalog(tmp_path / "-odd")
