from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backyfs.errors import Corrupt, UsageError
from backyfs.model import Trust
from backyfs.reader.cache import FrameCache
from backyfs.reader.catalog import Catalog
from backyfs.reader.images import OpenImages
from backyfs.reader.tree import ROOT, Inodes, Kind, Node, NoEntry, Tree
from backyfs.store.quarantine import Bad
from backyfs.store.record import State
from backyfs.store.repository import Repository
from tests.reader.stores import add_revision, content, make_vm
from tests.reader.test_catalog import Clock

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
    assert names(tree, "web01") == ["latest", first, second]
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
    seen = set()
    todo = [tree.node(ROOT)]
    while todo:
        directory = todo.pop()
        for name, node in tree.children(directory.inode):
            assert tree.child(directory.inode, name) == node
            assert tree.node(node.inode) == node
            assert node.inode not in seen
            assert 0 < node.inode < 1 << 63
            seen.add(node.inode)
            if node.kind is Kind.DIRECTORY:
                todo.append(node)
    assert len(seen) == 1 + 3 + 3 + 2


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
    assert names(tree, "web01") == ["latest", second]
    for ask in (tree.node, tree.open):
        with pytest.raises(NoEntry):
            ask(gone)
    assert tree.node(stays).inode == stays


def test_latest_moves(tree: Tree, vm: Repository, clock: Clock) -> None:
    before = walk(tree, "web01", "latest")
    added = add_revision(vm, DATA)
    clock.now += 1
    after = walk(tree, "web01", "latest")
    assert after.target == added.id != before.target
    assert not after.lasts
    assert not after.name_lasts


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
