"""The stand-alone script restores every revision from a packs directory, without backyfs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from backyfs.model import FRAME, Consistency
from backyfs.store.record import Draft, Record, sealed
from backyfs.store.repository import Repository
from tests.images import change_blocks, make_image, resize

SCRIPT = Path(__file__).parents[2] / "contrib" / "restore_packs.py"


def run(
    *arguments: object, check: bool = True, without: str = "backyfs blake3"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", "-I", "-c", _WITHOUT, without, *map(str, (SCRIPT, *arguments))]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=check)


def checked(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Where blake3 is there, too; may fail."""
    return run(*arguments, check=False, without="backyfs")


# Some packages cannot be imported.
_WITHOUT = f"""
import sys, runpy
sys.path += {[p for p in sys.path if p.endswith("site-packages")]!r}
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split()))
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
        told = run(repository.path, revision, "disk", target).stderr
        assert told == "nothing was checked: the blake3 package is missing\n"
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


def test_all_is_checked_where_blake3_is(
    history: tuple[Repository, dict[str, bytes]], tmp_path: Path
) -> None:
    repository, contents = history
    for revision, content in contents.items():
        target = tmp_path / "restored"
        done = checked(repository.path, revision, "disk", target)
        assert (done.returncode, done.stderr) == (0, "")
        assert target.read_bytes() == content


def test_the_digest_of_many_groups(tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", 10, seed=1)
    repository = Repository.create(tmp_path / "vm", "packs")
    for frames in (1023, 1024, 2049):
        resize(image, frames * FRAME)
        record = back_up(repository, image, None)
        done = checked(repository.path, record.id, "disk", tmp_path / "restored")
        assert (done.returncode, done.stderr) == (0, "")


def test_it_is_short() -> None:
    """Whoever has nothing else must be able to read it."""
    assert len(SCRIPT.read_text().splitlines()) < 120


@pytest.mark.parametrize("more", [-FRAME, -1, 1, FRAME])
def test_a_record_that_is_not_the_disk_s(
    history: tuple[Repository, dict[str, bytes]], tmp_path: Path, more: int
) -> None:
    """One digit of the size: the image would be cut, or longer, without a word."""
    repository, contents = history
    revision = list(contents)[-1]
    path = repository.layout.revisions / f"{revision}.json"
    value = json.loads(path.read_text())
    value["disks"][0]["size"] += more
    path.write_text(json.dumps(value))
    done = checked(repository.path, revision, "disk", tmp_path / "restored")
    assert done.returncode == 1
    assert done.stderr.startswith("restore_packs: ")


def test_what_nobody_knows_yet_is_refused(
    history: tuple[Repository, dict[str, bytes]], tmp_path: Path
) -> None:
    repository, contents = history
    value = json.loads((repository.path / "repository.json").read_text())
    del value["blake3"]
    value["features"]["incompat"] = ["dedup"]
    (repository.path / "repository.json").write_bytes(sealed(value))
    done = run(repository.path, list(contents)[-1], "disk", tmp_path / "restored", check=False)
    assert done.returncode == 1
    assert "dedup" in done.stderr
    assert not (tmp_path / "restored").exists()


def test_a_directory_of_no_vm_is_an_error(tmp_path: Path) -> None:
    done = run(tmp_path / "none", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("restore_packs: FileNotFoundError")
    assert f"{tmp_path}/none" in done.stderr


def test_without_zstandard_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, check=False, without="zstandard")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("restore_packs: ")
    assert "zstandard" in line


def test_a_size_that_is_no_frame_s_is_an_error(
    history: tuple[Repository, dict[str, bytes]], tmp_path: Path
) -> None:
    """What a frame says of its length is asked for before it is decoded."""
    repository, contents = history
    for path in repository.layout.packs.iterdir():
        with open(path, "r+b") as stream:
            stream.seek(100)  # behind the magic of the first frame: a size of eight bytes
            stream.write(b"\xe0" + (1 << 45).to_bytes(8, "little"))
    done = run(repository.path, next(iter(contents)), "disk", tmp_path / "restored", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("restore_packs: ")
    assert "Traceback" not in done.stderr
