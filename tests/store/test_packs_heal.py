"""Healing and verification of packs: what a good frame from the source can put right."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from backyfs.engine.verification import verify
from backyfs.model import FRAME
from backyfs.store.packs import heal
from backyfs.store.packs.image import PackImage
from backyfs.store.quarantine import WHOLE, Bad
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


def region_of(history: History, what: str, frame_no: int, *, deepest: bool = False) -> Path:
    """Damage a part of how the newest revision's frame is stored; returns the pack."""
    repository = history.open()
    with closing(repository.open_disk(repository.revisions()[-1], "root")) as image:
        assert isinstance(image, PackImage)
        place = faults.chain(image, frame_no)[-1 if deepest else 0]
        path = image._library.segment(place.unit).pack.path
    (region,) = (
        region for region in anatomy.regions(path) if region.what == what and region.place == place
    )
    anatomy.flip(path, region.start + 5)
    return path


def healed(history: History) -> None:
    """The next backup, of an unchanged disk, makes everything whole."""
    record = faults.store(history.open(), 7, history.newest, history.newest)
    history.contents[record.id] = dict(history.newest)
    faults.check(history.path, history.contents)
    assert history.open().quarantine.bad() == set()
    history.open().gc()
    faults.check(history.path, history.contents)
    assert faults.strays(history.path) == []


@pytest.mark.parametrize("what", ["frame", "hash"])
def test_what_was_damaged_is_put_right(history: History, what: str) -> None:
    path = region_of(history, what, 2)
    bad = anatomy.survey(history.path, history.contents)
    assert len(anatomy.revisions_of(bad)) > 2
    assert history.open().quarantine.bad()
    inode = path.stat().st_ino
    healed(history)
    assert not path.exists() or path.stat().st_ino != inode


def test_damage_in_an_entry(history: History) -> None:
    """Its size is wrong: the frame cannot be decoded, its hash proves the good one."""
    region_of(history, "entry", 2)
    anatomy.survey(history.path, history.contents)
    healed(history)


def test_the_newest_is_whole_and_the_base_stays_damaged(history: History) -> None:
    """The source has the newest content, not that of the base it is a patch against."""
    region_of(history, "frame", 1, deepest=True)
    before = anatomy.survey(history.path, history.contents)
    assert anatomy.revisions_of(before) == set(history.contents)
    record = faults.store(history.open(), 7, history.newest, history.newest)
    history.contents[record.id] = dict(history.newest)
    after = anatomy.survey(history.path, history.contents)
    assert after < before
    assert not anatomy.revisions_of(after) & {revision_id(6), revision_id(7)}
    assert anatomy.known_damage(history.path) == after


def test_a_source_that_has_changed_heals_nothing(history: History) -> None:
    region_of(history, "frame", 2)
    before = anatomy.survey(history.path, history.contents)
    disks = dict(history.newest)
    disks["root"] = faults.patched(disks["root"], 2, 99)
    record = faults.store(history.open(), 7, disks, history.newest)
    history.contents[record.id] = disks
    assert anatomy.survey(history.path, history.contents) == before
    with closing(history.open().open_disk(record, "root")) as image:
        assert isinstance(image, PackImage)
        assert len(faults.chain(image, 2)) == 1  # never a patch against a damaged frame
    assert anatomy.known_damage(history.path) == before


def test_more_than_fits_is_stored_anew(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heal, "REPAIR_BYTES_MAX", 5000)
    region_of(history, "frame", 2)
    region_of(history, "frame", 0)
    before = anatomy.survey(history.path, history.contents)
    record = faults.store(history.open(), 7, history.newest, history.newest)
    history.contents[record.id] = dict(history.newest)
    after = anatomy.survey(history.path, history.contents)
    assert after < before
    assert record.id not in anatomy.revisions_of(after)
    monkeypatch.setattr(heal, "REPAIR_BYTES_MAX", 1 << 20)


def test_healing_in_a_merged_pack(history: History) -> None:
    history.open().remove([revision_id(2)])
    del history.contents[revision_id(2)]
    assert history.open().gc().merged_files
    region_of(history, "frame", 2)
    anatomy.survey(history.path, history.contents)
    healed(history)


def test_a_false_alarm_is_forgotten(history: History) -> None:
    """A frame in quarantine that is sound: verification lets it go, or the next backup does."""
    repository = history.open()
    with closing(repository.open_disk(repository.revisions()[-1], "root")) as image:
        assert isinstance(image, PackImage)
        place = faults.chain(image, 2)[0]
        repository.quarantine.add(place, "bad memory")
        repository.quarantine.add(Bad(place.unit, WHOLE), "a cable")
        assert len(repository.damage()) > 2
        assert image.check(0, image.map.frames) == []
    assert repository.damage() == {}
    repository.quarantine.add(place, "bad memory")
    healed(history)


def test_required_covers_what_is_known_to_be_bad(history: History) -> None:
    region_of(history, "frame", 2)
    region_of(history, "frame", 0)
    anatomy.survey(history.path, history.contents)
    repository = history.open()
    with (
        repository.writing() as intent,
        repository.begin(intent, repository.revisions()[-1]) as staging,
    ):
        writer = staging.disk("root", len(history.newest["root"]))
        numbers = {
            number
            for extent in writer.required()
            for number in range(extent.offset // FRAME, -(-extent.end // FRAME))
        }
        assert {0, 2} <= numbers < set(range(9))


def reaching(uses: anatomy.Uses, region: Region) -> set[str]:
    if region.place is None:
        return set()
    return anatomy.revisions_of(uses.through.get(region.place, set()))


async def test_verification_names_every_damaged_revision(history: History) -> None:
    rng = random.Random(11)
    pristine = history.copy(history.path.with_name("pristine"))
    uses = anatomy.uses(history.path)
    for path in sorted((pristine.path / "packs").iterdir()):
        for region in list(anatomy.regions(path)):
            if rng.random() > 0.2:
                continue
            copy = pristine.copy(pristine.path.with_name("copy"))
            where = rng.randrange(region.start, region.end)
            anatomy.flip(copy.path / "packs" / path.name, where, 1 << rng.randrange(8))
            repository = Repository.open(copy.path)
            verdicts = await verify(repository, repository.revisions())
            named = {verdict.record.id for verdict in verdicts if not verdict.sound}
            assert named == set(repository.damage())
            really = anatomy.revisions_of(anatomy.survey(copy.path, copy.contents))
            # A patch may happen not to need what is wrong in its base: it counts as damaged.
            assert really <= named <= reaching(uses, region)
            shutil.rmtree(copy.path)
