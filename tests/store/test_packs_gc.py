"""Garbage collection: its bounds hold after any history, and nothing but garbage goes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from backyfs.model import FRAME
from backyfs.store.packs import gc
from backyfs.store.packs.packfile import PackFile
from backyfs.store.quarantine import WHOLE, Bad
from tests.store import faults
from tests.store.faults import History, revision_id


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    faults.lower_limits(monkeypatch)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    with faults.scratch(tmp_path) as found:
        yield found


@pytest.fixture
def history(directory: Path) -> History:
    return faults.make_history(directory / "vm")


def remove(history: History, *numbers: int) -> None:
    for number in numbers:
        history.open().remove([revision_id(number)])
        del history.contents[revision_id(number)]


def packs(history: History) -> set[str]:
    return {path.name for path in (history.path / "packs").iterdir()}


def test_without_garbage_nothing_happens(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "FILES_BASE", 64)
    before = faults.listing(history.path)
    report = history.open().gc()
    assert (report.removed_files, report.merged_files, report.freed_bytes) == (0, 0, 0)
    assert report.dead_bytes == 0
    assert report.files == len(packs(history))
    assert faults.listing(history.path) == before


def test_a_pack_nobody_needs_goes_at_once(history: History) -> None:
    new = faults.frames(*range(300, 310))
    history.add({"root": new, "data": new[:FRAME]})
    gone = packs(history)
    remove(history, *range(7))
    sizes = sum((history.path / "packs" / name).stat().st_size for name in gone)
    report = history.open().gc()
    assert report.removed_files >= 7
    assert report.freed_bytes > sizes / 2
    faults.check(history.path, history.contents)
    assert faults.strays(history.path) == []


def test_everything_goes_with_the_last_revision(history: History) -> None:
    remove(history, *range(7))
    report = history.open().gc()
    assert (report.files, report.stored_bytes, report.dead_bytes) == (0, 0, 0)
    assert packs(history) == set()
    assert list((history.path / "revisions").iterdir()) == []
    record = faults.store(history.open(), 9, {"root": faults.frames(1)})
    faults.check(history.path, {record.id: {"root": faults.frames(1)}})


def test_bases_of_live_patches_stay(history: History) -> None:
    """Only the newest revision is left: the frames its patches rest on are all there."""
    remove(history, *range(6))
    for _ in range(3):
        history.open().gc()
        faults.check(history.path, history.contents)
    assert faults.strays(history.path) == []


def test_a_dry_run_changes_nothing_and_tells_what_would_go(history: History) -> None:
    new = faults.frames(*range(300, 310))
    history.add({"root": new, "data": new[:FRAME]})
    remove(history, *range(7))
    before = faults.listing(history.path)
    would = history.open().gc(dry_run=True)
    assert faults.listing(history.path) == before
    did = history.open().gc()
    assert would.removed_files == did.removed_files > 0
    assert would.freed_bytes > 0


def test_twice_is_once(history: History) -> None:
    remove(history, 0, 2, 4)
    history.open().gc()
    before = faults.listing(history.path)
    report = history.open().gc()
    assert (report.removed_files, report.merged_files) == (0, 0)
    assert faults.listing(history.path) == before


def test_quarantine_records_of_what_is_gone_go(history: History) -> None:
    quarantine = history.open().quarantine
    kept = Bad(f"{revision_id(0)}-0", 0)
    for bad in (
        kept,
        Bad(f"{revision_id(0)}-0", 10**6),
        Bad("20250101T000000Z-0000-0", 3),
        Bad("20250101T000000Z-0000-0", WHOLE),
    ):
        assert quarantine.add(bad, "it read badly")
    history.open().gc()
    assert quarantine.bad() == {kept}


@pytest.mark.parametrize("seed", range(12))
def test_bounds_hold_after_any_history(
    directory: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "SEGMENT_BYTES_MAX", 80_000)
    monkeypatch.setattr(gc, "FILE_BYTES", 40_000)
    monkeypatch.setattr(gc, "FILES_BASE", 3)
    rng = random.Random(seed)
    history = faults.make_history(directory / "vm")
    for _ in range(14):
        disks = dict(history.newest)
        name = rng.choice(sorted(disks))
        for _ in range(rng.randrange(4)):
            number = rng.randrange(len(disks[name]) // FRAME)
            if rng.random() < 0.6:
                disks[name] = faults.patched(disks[name], number, rng.randrange(10**6))
            else:
                at = number * FRAME
                new = faults.frames(rng.randrange(5) and rng.randrange(1, 10**6))
                disks[name] = disks[name][:at] + new + disks[name][at + FRAME :]
        history.add(disks, scan=rng.random() < 0.3)
        for revision in rng.sample(sorted(history.contents)[:-1], rng.randrange(3)):
            history.open().remove([revision])
            del history.contents[revision]
        if rng.random() < 0.5:
            report = history.open().gc()
            assert report.files == len(packs(history))
            assert report.files <= 3 + report.stored_bytes // 40_000
            assert report.dead_bytes <= 0.3 * report.stored_bytes
            assert faults.strays(history.path) == []
            faults.check(history.path, history.contents)


@pytest.mark.parametrize("seed", range(12))
def test_two_copies_of_a_segment(history: History, seed: int) -> None:
    """What a crash in a merge leaves: one copy counts, is healed, and is what stays."""
    rng = random.Random(seed)
    remove(history, 2, 4)
    old = {path: path.read_bytes() for path in (history.path / "packs").iterdir()}
    history.open().gc()
    for path in rng.sample(sorted(old), rng.randrange(1, len(old))):
        path.write_bytes(old[path])
    for merged in [path for path in (history.path / "packs").iterdir() if path.name[0] == "m"]:
        merged.rename(merged.with_name(f"m-{rng.randbytes(8).hex()}.pack"))
    faults.check(history.path, history.contents)
    faults.damage(history, 2)
    history.add({**history.newest, "data": faults.patched(history.newest["data"], 0, 5)})
    faults.check(history.path, history.contents)
    report = history.open().gc()
    faults.check(history.path, history.contents)
    assert faults.strays(history.path) == []
    assert report.files == len(packs(history))
    held = [s for path in (history.path / "packs").iterdir() for s in segments_in(path)]
    assert len(held) == len(set(held))


def segments_in(path: Path) -> list[str]:
    pack = PackFile(path)
    pack.close()
    return [descriptor.name for descriptor in pack.footer.segments]


def test_packs_with_frames_that_cannot_be_read_are_not_merged(
    history: History, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Should the medium give the frames again, they are there; all else of gc is done."""
    remove(history, 0, 1)
    starts = [(path, 96, 97) for path in (history.path / "packs").iterdir()]
    before = packs(history)
    with faults.unreadable(monkeypatch, *starts):
        report = history.open().gc()
    assert (report.merged_files, report.written_files) == (0, 0)
    told = {item.message: str(item.args) for item in caplog.records}
    assert "offset 96: cannot be read" in told["packs are not merged"]
    assert packs(history) <= before
    faults.check(history.path, history.contents)
    assert history.open().gc().merged_files > 0
    faults.check(history.path, history.contents)


def test_a_pack_that_the_medium_does_not_give_goes_when_nobody_needs_it(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = faults.frames(*range(300, 310))
    history.add({"root": new, "data": new[:FRAME]})
    kept = {name for name in packs(history) if name.startswith(revision_id(7))}
    remove(history, *range(7))
    lost = [(history.path / "packs" / name, 0, 1 << 30) for name in packs(history) - kept]
    with faults.unreadable(monkeypatch, *lost):
        assert history.open().gc().removed_files == len(lost)
    faults.check(history.path, history.contents)


def test_what_a_live_frame_claims_is_never_punched(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the entry of a dead frame says that these bytes are its own: nothing checks that."""
    history = faults.make_holed(directory / "vm", monkeypatch)
    path = history.path / "packs" / f"{revision_id(0)}-0.pack"
    pack = PackFile(path)
    entries_at = pack.descriptors[f"{revision_id(0)}-0"].entries_at
    pack.close()
    with open(path, "r+b") as stream:
        stream.seek(entries_at + 5 * 24)
        live = stream.read(24)
        stream.seek(entries_at + 24)
        stream.write(live)
    monkeypatch.setattr("backyfs.store.space.free_bytes", lambda path: 0)
    assert history.open().gc().freed_bytes > 0
    faults.check(history.path, history.contents)


def test_the_copy_of_a_segment_that_is_read_is_the_one_that_stays(history: History) -> None:
    """The first by name, as for readers: there healing put its frames."""
    (path, *_) = sorted((history.path / "packs").iterdir())
    other = bytearray(path.read_bytes())
    other[96:200] = bytes(104)
    path.with_name(f"m-{'f' * 16}.pack").write_bytes(other)
    faults.check(history.path, history.contents)
    history.open().gc()
    faults.check(history.path, history.contents)
    assert (
        sum(bool(set(segments_in(path)) & {f"{revision_id(0)}-0"}) for path in _all(history)) == 1
    )


def _all(history: History) -> list[Path]:
    return list((history.path / "packs").iterdir())
