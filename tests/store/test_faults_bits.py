"""Single wrong bytes, everywhere: right bytes or an error that names exactly what is lost."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backyfs.errors import BackyfsError, Corrupt, NoRepository, Unsupported
from backyfs.model import FRAME, Trust
from backyfs.store.fs import publish
from backyfs.store.packs.extents import ExtentMap
from backyfs.store.packs.packfile import PackFile
from backyfs.store.record import Record, State, sealed, unsealed
from backyfs.store.repository import Repository
from tests.store import anatomy, faults
from tests.store.anatomy import Region
from tests.store.faults import History, revision_id


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    faults.lower_limits(monkeypatch)


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with faults.scratch(tmp_path) as directory:
        yield faults.make_history(directory / "vm")


def flipped(data: bytes, at: int) -> bytes:
    """`data` with one bit wrong, another one at each place."""
    return data[:at] + bytes([data[at] ^ (1 << at * 7 % 8)]) + data[at + 1 :]


# ---- small files: every byte -------------------------------------------------------------------


def test_every_byte_of_a_record(history: History) -> None:
    data = history.open().layout.record(revision_id(3)).read_bytes()
    record = Record.decode(data, "it")
    for at in range(len(data)):
        try:
            assert Record.decode(flipped(data, at), "it") == record
        except (Corrupt, Unsupported) as exc:
            assert str(exc)
    for length in range(len(data) - 1):
        with pytest.raises(Corrupt):
            Record.decode(data[:length], "it")


SLICE = {
    "number": 1,
    "start": 0,
    "length": 512,
    "type": "83",
    "name": "",
    "filesystem": "",
}

LIES: list[tuple[tuple[str | int, ...], object]] = [
    (("time",), "0001-01-01T00:00:00+14:00"),
    (("parent",), 5),
    (("reason",), None),
    (("tags",), "daily"),
    *((("tags",), ["daily", lie]) for lie in (5, "", "..", "a/b", "z" * 256, "\x1b[2J")),
    (("stats",), []),
    (("stats", "read"), "many"),
    (("stats", "seconds"), "long"),
    (("stats", "believed"), 2**63),
    (("quiescing",), {"result": 5, "frozen_s": 0.0}),
    (("disks",), []),
    (("disks", 0, "name"), 5),
    (("disks", 0, "size"), "12"),
    (("disks", 0, "size"), -1),
    (("disks", 0, "size"), 1.5),
    (("disks", 0, "size"), 2**63),
    (("disks", 0, "data"), 2**63),
    (("disks", 0, "digest"), 5),
    (("disks", 0, "files"), [[5, 6]]),
    (("disks", 0, "source"), 5),
    (("disks", 0, "partitions"), [[1, 2]]),
    *(
        (("disks", 0, "partitions"), [SLICE | {key: lie}])
        for key, lie in (("start", "a"), ("length", 2**63), ("name", None))
    ),
]


@pytest.mark.parametrize(("path", "lie"), LIES)
def test_a_record_whose_checksum_holds_but_that_makes_no_sense(
    history: History, path: tuple[str | int, ...], lie: object
) -> None:
    """It is one revision that cannot be read, and no exception where nobody expects one."""
    repository = history.open()
    where = repository.layout.record(revision_id(3))
    value = unsealed(where.read_bytes(), "it")
    spot: Any = value
    for key in path[:-1]:
        spot = spot[key]
    spot[path[-1]] = lie
    where.chmod(0o640)
    where.write_bytes(sealed(value))
    assert list(repository.unreadable()) == [revision_id(3)]
    with pytest.raises(Corrupt, match="lacks or garbles a field"):
        repository.record(revision_id(3))


def test_what_is_said_of_a_record_drives_no_terminal(history: History) -> None:
    value = unsealed(history.open().layout.record(revision_id(3)).read_bytes(), "it")
    value["disks"][0]["partitions"] = [SLICE | {"\x1b[2J": 1}]
    with pytest.raises(Corrupt, match="lacks or garbles a field") as caught:
        Record.decode(sealed(value), "it")
    assert str(caught.value).isprintable()


def test_a_record_with_two_disks_of_one_name(history: History) -> None:
    """Else one of them would be hidden, and its files nobody's."""
    value = unsealed(history.open().layout.record(revision_id(3)).read_bytes(), "it")
    with pytest.raises(Corrupt, match="two of one name"):
        Record.decode(sealed(value | {"disks": value["disks"][:1] * 2}), "it")


@pytest.mark.parametrize(
    ("key", "lie"),
    [
        ("tags", "daily"),
        ("tags", ["a/b"]),
        ("why", 5),
        ("lasting", "no"),
        ("verified_at", "0001-01-01T00:00+14:00"),
    ],
)
def test_a_state_whose_checksum_holds_but_that_makes_no_sense(key: str, lie: object) -> None:
    value = unsealed(State(("daily",), Trust.TRUSTED).encode(), "it")
    with pytest.raises(Corrupt, match="lacks or garbles a field"):
        State.decode(sealed(value | {key: lie}), "it")


def test_every_byte_of_a_state() -> None:
    data = State(("daily", "manual:why"), Trust.DISTRUSTED, None, "it looked odd").encode()
    state = State.decode(data, "it")
    for at in range(len(data)):
        try:
            assert State.decode(flipped(data, at), "it") == state
        except Corrupt:
            continue
    for length in range(len(data) - 1):
        with pytest.raises(Corrupt):
            State.decode(data[:length], "it")


def test_every_byte_of_the_identity(history: History) -> None:
    path = history.path / "repository.json"
    data = path.read_bytes()
    identity = Repository.open(history.path).identity
    for at in range(len(data)):
        path.write_bytes(flipped(data, at))
        try:
            assert Repository.open(history.path).identity == identity
        except (Corrupt, NoRepository) as exc:
            assert str(path) in str(exc)
    for length in range(len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(Corrupt, match=r"repository\.json"):
            Repository.open(history.path)


def test_every_byte_of_a_map(history: History) -> None:
    repository = history.open()
    record = repository.record(revision_id(6))
    (path,) = repository.format.files(record.disks["root"])
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(flipped(data, at))
        with pytest.raises(Corrupt) as caught:
            repository.open_disk(record, "root")
        assert (caught.value.vm, caught.value.revision, caught.value.disk) == (
            repository.name,
            record.id,
            "root",
        )
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        with pytest.raises(Corrupt, match=record.id):
            repository.open_disk(record, "root")


def test_a_map_with_a_matching_hash_is_still_looked_at(history: History) -> None:
    """Damage before the hash was made (bad memory) is an error, never a crash."""
    repository = history.open()
    (path,) = repository.format.files(repository.revisions()[-1].disks["root"])
    data = path.read_bytes()
    for at in range(len(data)):
        try:
            found = ExtentMap.decode(flipped(data, at), "map")
            for _ in found.runs:
                pass
        except (Corrupt, Unsupported):
            continue


def test_every_byte_of_a_quarantine_record(history: History) -> None:
    faults.damage(history, 2)
    repository = history.open()
    (path,) = repository.layout.quarantine.iterdir()
    data = path.read_bytes()
    damaged = set(repository.damage())
    assert len(damaged) > 2
    for content in [*(flipped(data, at) for at in range(len(data))), b"", data[:40]]:
        path.write_bytes(content)
        (finding,) = history.open().quarantine.findings()
        assert finding.reason
    assert set(history.open().damage()) == damaged  # it counts by its name


def test_a_record_that_says_another_size_than_its_map(history: History) -> None:
    """Nobody may read, or wait for, what the map does not have."""
    repository = history.open()
    where = repository.layout.record(revision_id(3))
    value = unsealed(where.read_bytes(), "it")
    disk = value["disks"][0]
    disk["size"] += 1 << 40
    where.chmod(0o640)
    where.write_bytes(sealed(value))
    record = repository.record(revision_id(3))
    with pytest.raises(Corrupt, match="the disk of"):
        repository.open_disk(record, disk["name"])


# ---- damaged records, states and maps, with all that follows -------------------------------------


def damage_record(history: History, number: int, how: str) -> Path:
    repository = history.open()
    path = repository.layout.record(revision_id(number))
    ruin(path, how)
    return path


def ruin(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "flipped":
        anatomy.flip(path, len(data) // 2)
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "newer":
        value = json.loads(data)
        value["format"] = 99
        path.write_bytes(sealed(value))
    elif how == "missing":
        path.unlink()


def refuses_to_delete(path: Path) -> None:
    """gc deletes nothing; forgetting one revision frees no file another might need."""
    before = faults.listing(path)
    with pytest.raises(BackyfsError, match="nothing is deleted"):
        Repository.open(path).gc()
    assert faults.listing(path) == before


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "newer"])
@pytest.mark.parametrize("number", [0, 3, 6])
def test_a_damaged_record(history: History, number: int, how: str) -> None:
    whole = dict(history.contents)
    path = damage_record(history, number, how)
    saved = path.with_name("saved")
    del history.contents[revision_id(number)]
    repository = history.open()
    assert [*repository.unreadable()] == [revision_id(number)]
    with pytest.raises((Corrupt, Unsupported), match=revision_id(number)):
        repository.record(revision_id(number))
    assert set(repository.damage()) == {revision_id(number)}
    assert anatomy.survey(history.path, history.contents) == set()
    refuses_to_delete(history.path)

    # Backups go on, removal keeps what the damaged record may need, and gc still refuses.
    disks = faults.next_disks(history)
    record = faults.store(history.open(), 7, disks)
    history.contents[record.id] = whole[record.id] = disks
    gone = revision_id(4)
    before = {*history.path.rglob("*.map"), *history.path.rglob("*.pack")}
    history.open().remove([gone])
    del history.contents[gone]
    del whole[gone]
    assert {*history.path.rglob("*.map"), *history.path.rglob("*.pack")} == before
    assert anatomy.survey(history.path, history.contents) == set()
    refuses_to_delete(history.path)

    # With the record back, all is as if nothing had happened.
    if how == "flipped":
        anatomy.flip(path, path.stat().st_size // 2)
        assert not saved.exists()
        faults.check(history.path, whole)
        history.open().gc()
        faults.check(history.path, whole)
        assert faults.strays(history.path) == []


def test_a_damaged_record_can_be_given_up(history: History) -> None:
    damage_record(history, 3, "cut")
    del history.contents[revision_id(3)]
    history.open().remove([revision_id(3)])
    history.open().gc()
    faults.check(history.path, history.contents)
    assert faults.strays(history.path) == []


def test_seq_stays_unique_beside_a_damaged_record(history: History) -> None:
    path = damage_record(history, 6, "flipped")
    del history.contents[revision_id(6)]
    for number in (7, 8):
        faults.store(history.open(), number, faults.next_disks(history, number * 10))
    anatomy.flip(path, path.stat().st_size // 2)
    records = history.open().revisions()
    assert len({record.seq for record in records}) == len(records) == 9
    assert history.open().fsck() == []


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "missing"])
def test_a_damaged_map(history: History, how: str) -> None:
    repository = history.open()
    record = repository.record(revision_id(4))  # revision 5 names the same maps
    (path,) = repository.format.files(record.disks["root"])
    ruin(path, how)
    bad = anatomy.survey(history.path, history.contents)
    assert anatomy.revisions_of(bad) == {revision_id(4), revision_id(5)}
    assert {disk for _, disk, _ in bad} == {"root"}
    assert anatomy.known_damage(history.path) == bad
    assert any(path.name in problem for problem in history.open().fsck())
    refuses_to_delete(history.path)
    history.open().remove([revision_id(4), revision_id(5)])
    del history.contents[revision_id(4)], history.contents[revision_id(5)]
    history.open().gc()
    faults.check(history.path, history.contents)
    assert faults.strays(history.path) == []


@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_a_damaged_map_of_the_parent(history: History, how: str) -> None:
    repository = history.open()
    (path,) = repository.format.files(repository.revisions()[-1].disks["root"])
    ruin(path, how)
    disks = faults.next_disks(history)
    record = faults.store(history.open(), 7, disks, history.newest)
    history.contents[record.id] = disks
    bad = anatomy.survey(history.path, history.contents)
    assert anatomy.revisions_of(bad) == {revision_id(6)}
    refuses_to_delete(history.path)
    history.open().remove([revision_id(6)])
    del history.contents[revision_id(6)]
    history.open().gc()
    faults.check(history.path, history.contents)
    assert faults.strays(history.path) == []


def test_a_damaged_state_is_no_loss(history: History) -> None:
    repository = history.open()
    state = State(("daily",), Trust.VERIFIED)
    repository.update_state(revision_id(2), lambda _: state)
    path = repository.layout.state(revision_id(2))
    ruin(path, "cut")
    record = repository.record(revision_id(2))
    assert repository.state(record).tags == record.tags
    assert repository.state(record).trust is Trust.DISTRUSTED
    with pytest.raises(Corrupt):
        repository.update_state(revision_id(2), lambda _: state)
    assert repository.update_state(revision_id(2), lambda _: state, anew=True) == state
    assert history.open().state(record) == state


# ---- packs -------------------------------------------------------------------------------------


@pytest.fixture
def merged(history: History) -> History:
    """The history after a merge: packs of several segments, dead entries."""
    history.open().remove([revision_id(2)])
    del history.contents[revision_id(2)]
    assert history.open().gc().merged_files > 2
    return history


def probes(region: Region, rng: random.Random) -> list[int]:
    """Places to damage: most of what is small, the head and some of the compressed bytes."""
    places = range(region.start, region.end)
    if region.what == "frame":
        return [*places[:7], *rng.choices(places, k=2), places[-1]]
    return sorted(rng.sample(places, min(len(places), 10)))


@pytest.mark.parametrize("which", ["written", "merged"])
def test_bytes_of_packs(which: str, history: History, request: pytest.FixtureRequest) -> None:
    if which == "merged":
        request.getfixturevalue("merged")
    rng = random.Random(which)
    uses = anatomy.uses(history.path)
    noticed = 0
    for path in sorted((history.path / "packs").iterdir()):
        for region in list(anatomy.regions(path)):
            for at in probes(region, rng):
                mask = 1 << rng.randrange(8)
                anatomy.flip(path, at, mask)
                bad = anatomy.survey(history.path, history.contents)
                anatomy.flip(path, at, mask)
                allowed, certain = suffering(region, uses)
                assert certain <= bad <= allowed, (path.name, region, at, mask)
                noticed += bool(bad)
                shutil.rmtree(history.path / "quarantine", ignore_errors=True)
    assert noticed > 100
    faults.check(history.path, history.contents)


def suffering(region: Region, uses: anatomy.Uses) -> tuple[set[anatomy.Frame], set[anatomy.Frame]]:
    """The frames that may be lost with a byte of a region, and those that must be."""
    if region.place is None:
        return set(), set()
    if region.what == "hash":
        own = uses.directly.get(region.place, set())
        return own, own
    return uses.through.get(region.place, set()), set()


@pytest.mark.parametrize("which", ["written", "merged"])
def test_wrong_bytes_in_packs_and_all_that_follows(
    which: str, history: History, request: pytest.FixtureRequest
) -> None:
    """What was met is known; nothing more is lost by gc or backups; the next backup heals."""
    if which == "merged":
        request.getfixturevalue("merged")
    rng = random.Random(which)
    uses = anatomy.uses(history.path)
    disks = faults.next_disks(history)
    disks["root"] = faults.patched(history.newest["root"], 1, 77)
    for path in sorted((history.path / "packs").iterdir()):
        for region in list(anatomy.regions(path)):
            if region.place is None or rng.random() > 0.35:
                continue
            copy = history.copy(history.path.with_name("copy"))
            where = rng.randrange(region.start, region.end)
            mask = 1 << rng.randrange(8)
            anatomy.flip(copy.path / "packs" / path.name, where, mask)
            follow(copy, disks, uses, region, (path.name, where, mask))
            shutil.rmtree(copy.path)


def follow(
    history: History, disks: faults.Disks, uses: anatomy.Uses, region: Region, where: object = 0
) -> None:
    assert region.place is not None
    bad = anatomy.survey(history.path, history.contents)
    known = anatomy.known_damage(history.path)
    assert bad <= known <= uses.through.get(region.place, set()), region
    # Frames that are damaged hinder nothing, and nobody's bytes go with them.
    copy = history.copy(history.path.with_name("collected"))
    copy.open().gc()
    assert anatomy.survey(copy.path, copy.contents) <= bad, (region, where)
    shutil.rmtree(copy.path)
    # The next backup is whole, and heals what the source still has.
    newest = [*history.contents][-1]
    record = faults.store(history.open(), 7, disks, history.newest)
    history.contents[record.id] = dict(disks)
    left = anatomy.survey(history.path, history.contents)
    assert left <= bad
    assert record.id not in anatomy.revisions_of(left)
    there = {
        (revision, disk, number)
        for places in uses.directly.values()
        for revision, disk, number in places
        if any(
            same == (newest, disk, number) and on_source(history, disks, same) for same in places
        )
    }
    assert not left & there, region
    assert left <= anatomy.known_damage(history.path)
    history.open().gc()
    assert anatomy.survey(history.path, history.contents) <= left


def on_source(history: History, disks: faults.Disks, frame: anatomy.Frame) -> bool:
    revision, disk, number = frame
    at = slice(number * FRAME, (number + 1) * FRAME)
    return disks[disk][at] == history.contents[revision][disk][at]


def test_a_cut_pack(history: History) -> None:
    """A pack that ends early, anywhere: nothing wrong is read, what is lost is known and said."""
    rng = random.Random(5)
    uses = anatomy.uses(history.path)
    for path in sorted((history.path / "packs").iterdir()):
        data = path.read_bytes()
        own = set().union(*(uses.segments.get(s, set()) for s in segments_in(path)))
        edges = {edge for region in anatomy.regions(path) for edge in (region.start, region.end)}
        lengths = sorted({*rng.sample(sorted(edges), 6), *rng.sample(range(len(data)), 4), 0})
        for length in lengths:
            copy = history.copy(history.path.with_name("copy"))
            (copy.path / "packs" / path.name).write_bytes(data[:length])
            bad = anatomy.survey(copy.path, copy.contents)
            assert bad <= own
            assert anatomy.revisions_of(anatomy.known_damage(copy.path)) == (
                anatomy.revisions_of(bad)
            )
            after_loss(copy, bad)
            shutil.rmtree(copy.path)


def test_a_lost_pack(history: History) -> None:
    """A missing pack: exactly the revisions that need it are named, whatever they need it for."""
    uses = anatomy.uses(history.path)
    for path in sorted((history.path / "packs").iterdir()):
        own = set().union(*(uses.segments.get(s, set()) for s in segments_in(path)))
        copy = history.copy(history.path.with_name("copy"))
        (copy.path / "packs" / path.name).unlink()
        known = anatomy.revisions_of(anatomy.known_damage(copy.path))
        assert known == anatomy.revisions_of(own), path.name
        assert_said_once(copy)
        assert anatomy.survey(copy.path, copy.contents) == own
        after_loss(copy, own)
        shutil.rmtree(copy.path)


def assert_said_once(history: History) -> None:
    """Each lost segment is one line for each disk that needs it."""
    for items in history.open().damage().values():
        segments = [(item.disk, item.reason.split()[1]) for item in items]
        assert len(segments) == len(set(segments)), items


def segments_in(path: Path) -> list[str]:
    pack = PackFile(path)
    pack.close()
    return [descriptor.name for descriptor in pack.footer.segments]


def after_loss(history: History, bad: set[anatomy.Frame]) -> None:
    """Nothing is deleted; a backup works; what was lost can be given up."""
    if bad:
        refuses_to_delete(history.path)
    disks = faults.next_disks(history)
    record = faults.store(history.open(), 7, disks, history.newest)
    history.contents[record.id] = dict(disks)
    left = anatomy.survey(history.path, history.contents)
    assert left <= bad
    assert record.id not in anatomy.revisions_of(left)
    for revision in anatomy.revisions_of(left):
        history.open().remove([revision])
        del history.contents[revision]
    history.open().gc()
    faults.check(history.path, history.contents)
    assert faults.strays(history.path) == []


def test_a_pack_of_another_repository(history: History, tmp_path: Path) -> None:
    """Files of the same names with other bytes never pass for ours."""
    other = faults.scratch(tmp_path)
    with other as directory:
        Repository.create(directory / "vm", "packs")
        stranger = History(directory / "vm")
        for number, disks in enumerate(history.contents.values()):
            stranger.add(
                {name: faults.frames(number + 50) + image for name, image in disks.items()}
            )
        for path in sorted((history.path / "packs").iterdir()):
            twin = stranger.path / "packs" / path.name
            if not twin.exists():
                continue
            copy = history.copy(history.path.with_name("copy"))
            publish(copy.path / "packs" / path.name, twin.read_bytes())
            bad = anatomy.survey(copy.path, copy.contents)
            assert bad
            assert anatomy.revisions_of(bad) <= set(copy.open().damage())
            refuses_to_delete(copy.path)
            shutil.rmtree(copy.path)
