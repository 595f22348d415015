"""The stand-alone script restores every revision from a packs directory, without backyfs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from backyfs.model import FRAME, Consistency
from backyfs.store.record import Draft, Record
from backyfs.store.repository import Repository
from tests.images import change_blocks, make_image, resize

SCRIPT = Path(__file__).parents[2] / "contrib" / "restore_packs.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", "-I", "-c", _WITHOUT_BACKYFS, SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


# Only zstandard can be imported: neither backyfs nor blake3.
_WITHOUT_BACKYFS = f"""
import sys, runpy
sys.path += {[p for p in sys.path if p.endswith("site-packages")]!r}
sys.modules["backyfs"] = sys.modules["blake3"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def back_up(repository: Repository, image: Path, parent: Record | None) -> Record:
    data = image.read_bytes()
    with repository.writing() as intent, repository.begin(intent, parent) as staging:
        writer = staging.disk("disk", len(data))
        writer.write(0, data)
        return staging.commit(Draft(Consistency.CRASH))


@pytest.fixture
def history(tmp_path: Path) -> tuple[Repository, dict[str, bytes]]:
    """Six generations of a disk that changes, grows to an odd size and shrinks; then a merge."""
    image = make_image(tmp_path / "image", 40 * FRAME + 777, seed=1)
    repository = Repository.create(tmp_path / "vm", "packs")
    contents: dict[str, bytes] = {}
    parent: Record | None = None
    for generation, size in enumerate([40, 40, 60, 60, 30, 30]):
        resize(image, size * FRAME + 777)
        change_blocks(image, 20, seed=generation)
        parent = back_up(repository, image, parent)
        contents[parent.id] = image.read_bytes()
    return repository, contents


def test_every_revision_comes_back(
    history: tuple[Repository, dict[str, bytes]], tmp_path: Path
) -> None:
    repository, contents = history
    listed = run(repository.path).stdout.split()
    for revision, content in contents.items():
        target = tmp_path / "restored"
        run(repository.path, revision, "disk", target)
        assert target.read_bytes() == content
        assert revision in listed


def test_merged_packs_too(
    history: tuple[Repository, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repository, contents = history
    monkeypatch.setattr("backyfs.store.packs.gc.FILES_BASE", 2)
    repository.remove([repository.revisions()[1].id])
    assert repository.gc().merged_files
    assert repository.fsck() == []
    latest = repository.revisions()[-1].id
    run(repository.path, latest, "disk", tmp_path / "restored")
    assert (tmp_path / "restored").read_bytes() == contents[latest]


def test_damage_is_an_error(history: tuple[Repository, dict[str, bytes]], tmp_path: Path) -> None:
    repository, contents = history
    record = repository.layout.revisions / next(
        iter(repository.revisions()[-1].disks["disk"].files)
    )
    record.write_bytes(record.read_bytes()[:200])
    with pytest.raises(subprocess.CalledProcessError):
        run(repository.path, list(contents)[-1], "disk", tmp_path / "restored")
