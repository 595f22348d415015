"""The bench: its generator is deterministic, and a run of every group works and leaves nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from blake3 import blake3

from bench import bars, report
from bench.command import CommandFailed, Process, command, run
from bench.footprint import FileGrowth
from bench.ledger import Ledger, Sample
from bench.mkimage import Change, Plan, change, create
from bench.mkimage import main as mkimage
from tests.mount.mounts import eventually
from tests.parts import require

PROJECT = Path(__file__).parent.parent
MIB = 1 << 20
# Other bytes would make figures taken before incomparable: change these only with the content.
IMAGE = "bcdff4af91505c4c75e7a08305e2fd066d589bdf328336662984aafacffd0f68"
CHANGED = {
    "random4k": "6f5612e977f14f3d41c0f3bb9a3c6b7637c525b61ac1d7b14c779f4fceaef130",
    "clustered": "7c1b06b6f3851ca917c1fab6e3967e7f5ecec4594c26039c3e902c801e608021",
    "append": "3f810276ae2bcc8676ee753549b319e973ae1c8d84b0ed276d6051409ceceb89",
}


def digest(image: Path) -> str:
    return blake3(image.read_bytes()).hexdigest()


# ---- the generator -----------------------------------------------------------------------------


def test_the_same_plan_makes_the_same_bytes_with_any_number_of_jobs(tmp_path: Path) -> None:
    for jobs in (1, 3):
        image = tmp_path / f"{jobs}.img"
        create(image, Plan(40 * MIB + 512, seed=3), jobs)
        assert image.stat().st_size == 40 * MIB + 512
        assert digest(image) == IMAGE


def test_hot_areas_that_are_full_get_company(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.touch()
    os.truncate(image, 200 * MIB)
    extents = change(image, Change(0.15, "clustered", seed=72))  # two areas, almost one
    assert sum(length for _, length in extents) == 30 * MIB


@pytest.mark.parametrize("pattern", ["random4k", "clustered", "append"])
def test_changes_are_deterministic_and_listed(tmp_path: Path, pattern: str) -> None:
    image = tmp_path / "disk.img"
    create(image, Plan(40 * MIB, seed=3))
    before = image.read_bytes()
    extents = change(image, Change(0.02, pattern, seed=5))
    after = image.read_bytes()
    assert digest(image) == CHANGED[pattern]
    assert extents == sorted(extents)
    assert len(after) == len(before)
    expected = bytearray(before)
    for offset, length in extents:
        expected[offset : offset + length] = after[offset : offset + length]
    assert bytes(expected) == after


def test_a_sparse_disk_holds_the_blocks_of_a_small_one(tmp_path: Path) -> None:
    small, huge = tmp_path / "small.img", tmp_path / "huge.img"
    create(small, Plan(24 * MIB))
    create(huge, Plan(1 << 40, data=24 * MIB))
    assert huge.stat().st_size == 1 << 40
    assert huge.stat().st_blocks <= small.stat().st_blocks + 64
    block, stride = 4 * MIB, (1 << 40) // 6 // (4 * MIB) * (4 * MIB)
    with small.open("rb") as ours, huge.open("rb") as theirs:
        for number in range(1, 5):
            ours.seek(number * block)
            theirs.seek(number * stride)
            assert ours.read(block) == theirs.read(block)


def test_a_sibling_shares_blocks_with_its_template(tmp_path: Path) -> None:
    first, second = tmp_path / "1.img", tmp_path / "2.img"
    create(first, Plan(48 * MIB, seed=1))
    create(second, Plan(48 * MIB, seed=2, sibling_of=1))
    ours, theirs = first.read_bytes(), second.read_bytes()
    starts = range(4 * MIB, 44 * MIB, 4 * MIB)
    equal = sum(
        ours[start : start + 4 * MIB] == theirs[start : start + 4 * MIB] for start in starts
    )
    assert 0 < equal < len(starts)


def test_the_command_line_lists_changes_as_rbd_does(tmp_path: Path) -> None:
    image, listed = tmp_path / "disk.img", tmp_path / "changes.json"
    assert mkimage(["--size", "8M", str(image)]) == 0
    assert mkimage(["--change", "0.01", "--extents", str(listed), str(image)]) == 0
    extents = json.loads(listed.read_text())
    assert len(extents) == 20
    assert all(extent["length"] == 4096 and extent["exists"] == "true" for extent in extents)


def test_a_disk_too_small_to_change_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "disk.img"
    assert mkimage(["--size", "1M", str(image)]) == 0
    assert mkimage(["--change", "0.01", str(image)]) == 1
    assert "too small" in capsys.readouterr().err


# ---- measuring ---------------------------------------------------------------------------------


def test_a_command_costs_its_own_time_and_memory() -> None:
    script = "import time; x = bytes(64 << 20); time.sleep(0.05)"
    cost = run([command(sys.executable, "-c", script)])
    assert cost.wall_s >= 0.05
    assert cost.rss_bytes >= 64 * MIB


def test_a_failed_command_says_which_and_why() -> None:
    with pytest.raises(CommandFailed, match="exit code 2.*nothing-here"):
        run([command("ls", "/nothing-here")])
    with pytest.raises(CommandFailed, match="No such file"):
        run([command("no-such-program-here")])


def test_growth_counts_new_replaced_and_grown_files(tmp_path: Path) -> None:
    kept, grown, replaced = (tmp_path / name for name in ("kept", "grown", "replaced"))
    for path in (kept, grown, replaced):
        path.write_bytes(bytes(100))
    growth = FileGrowth(tmp_path)
    with grown.open("ab") as stream:
        stream.write(bytes(7))
    (tmp_path / "temporary").write_bytes(bytes(90))
    (tmp_path / "temporary").replace(replaced)
    (tmp_path / "new").write_bytes(bytes(1000))
    assert growth.added().apparent == 7 + 90 + 1000


def test_a_bar_compares_neighbours_and_picks_generations() -> None:
    ledger = Ledger()
    for ours, floor in ((1.0, 2.0), (3.0, 4.0), (9.0, 10.0)):
        ledger.add("line", "us", Sample(wall_s=ours, rss_bytes=int(ours)))
        ledger.add("line", "floor", Sample(wall_s=floor))
    found = bars.judged(ledger, [bars.Bar("line", "us", "wall_s", 0.8, "floor")])
    assert [(v.found.value, v.found.low, v.found.high, v.holds) for v in found] == [
        (0.75, 0.5, 0.9, True)
    ]
    found = bars.judged(ledger, [bars.Bar("line", "us", "wall_s", 0.8, "floor", at=2)])
    assert not found[0].holds
    found = bars.judged(ledger, [bars.Bar("line", "us", "rss_bytes", 8)])
    assert (found[0].found.value, found[0].holds) == (9, False)
    assert bars.judged(ledger, [bars.Bar("line", "them", "wall_s", 1.0, "floor")]) == []
    assert any("MISSED" in row for row in report.bars(found))


# ---- a whole run -------------------------------------------------------------------------------

_PARTS = {
    "mount": ["fuse"],
    "listing": ["fuse"],
    "memory": ["fuse"],
    "cow": ["fuse", "fio", "xfs", "btrfs"],
    "nbd": ["xfs", "nbdkit", "libnbd", "fio"],
    "ceph": ["ceph"],
}


@pytest.mark.parametrize(
    "group", ["full", "increments", "restore", "mount", "listing", "cow", "memory", "nbd", "ceph"]
)
def test_a_small_run_measures_everything_and_leaves_nothing(tmp_path: Path, group: str) -> None:
    require("zstd")
    for part in _PARTS.get(group, []):
        require(part)
    work, result = tmp_path / "work", tmp_path / "result.json"
    work.mkdir()
    groups = ["unchanged", "random4k", "clustered"] if group == "increments" else [group]
    only = [argument for name in groups for argument in ("--only", name)]
    size = ("--size", "16M", "--rounds", "1", "--generations", "2", "--no-peers")
    places = ("--work", str(work), "--images", str(work), "--json", str(result))
    done = subprocess.run(
        [sys.executable, "-m", "bench", *size, *places, *only],
        cwd=PROJECT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(work.iterdir()) == []
    assert "bars hold" in done.stdout
    found = json.loads(result.read_text())
    assert found["failures"] == []
    assert found["bars"]


def test_a_run_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    places = ("--work", str(work), "--images", str(work), "--json", str(tmp_path / "result.json"))
    arguments = ("--only", "full", "--size", "16M", "--rounds", "1000", "--no-peers", *places)
    with subprocess.Popen(
        [sys.executable, "-m", "bench", *arguments],
        cwd=PROJECT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert eventually(lambda: any(work.rglob("full")))
        process.terminate()
        process.wait(timeout=60)
    assert process.returncode == 143
    assert list(work.iterdir()) == []


def test_a_servers_processor_time_is_that_of_its_children_too() -> None:
    program = (
        "import os, time\n"
        "parent = os.getpid()\n"
        "if os.fork(): time.sleep(60)\n"
        "while os.getppid() == parent: pass\n"
    )
    process = Process(command(sys.executable, "-c", program))
    try:
        deadline = time.monotonic() + 30
        while process.cpu_s < 0.3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.cpu_s >= 0.3
    finally:
        process.kill()
        process.finish(check=False)
