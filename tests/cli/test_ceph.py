"""Restores into a real Ceph cluster from the command line, by us and by Ceph's own program."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import images
from tests.ceph.cluster import PATIENCE_S, Cluster
from tests.cli.conftest import Vm
from tests.cli.program import PROGRAM, backyfs, refused
from tests.mount.mounts import mounted
from tests.restore.test_rbd import content_of, filled, names, objects

MIB = 1 << 20
OBJECT = 4 * MIB
SPARSE = 20 * MIB + 700  # a multiple of neither objects nor sectors


@pytest.fixture
def sparse(tmp_path: Path) -> tuple[Path, bytes]:
    """A repository of a disk with more holes than data, and the disk."""
    pieces = {0: b"head", 9 * MIB: random.Random(1).randbytes(70_000), SPARSE - 5: b"tail."}
    image = images.sparse_image(tmp_path / "sparse.img", SPARSE, pieces)
    directory = tmp_path / "srv" / "sparse"
    backyfs("-b", directory, "init", "file", image)
    backyfs("-b", directory, "backup")
    return directory, image.read_bytes()


def piped(*commands: list[str | Path], code: int = 0) -> None:
    """Run programs as a pipe; the last has to end with `code`."""
    first, last = commands
    with subprocess.Popen(first, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as source:
        done = subprocess.run(last, stdin=source.stdout, capture_output=True, timeout=PATIENCE_S)
        assert done.returncode == code, done.stderr
        assert source.stdout is not None
        source.stdout.close()
        assert source.wait(PATIENCE_S) == 0 or code


def spoil(vm: Vm) -> None:
    """Damage the end of what the first revision stores."""
    pack = max((vm.directory / "packs").iterdir(), key=lambda path: path.stat().st_size)
    pack.chmod(0o640)
    with open(pack, "r+b") as stream:
        stream.seek(pack.stat().st_size * 3 // 4)
        stream.write(bytes(5000))


# ---- all ways into a cluster -------------------------------------------------------------------


def test_a_disk_gets_into_ceph_in_each_way(
    sparse: tuple[Path, bytes], ceph: Cluster, tmp_path: Path
) -> None:
    directory, content = sparse
    said = backyfs("-b", directory, "restore", "rbd:rbd/native").out
    assert said.endswith("\n")
    assert "/disk: restored 20.0 MiB" in said
    piped([PROGRAM, "-b", directory, "restore", "-"], ["rbd", "import", "-", "rbd/stdin"])
    with mounted(directory.parent, tmp_path / "mnt") as mount:
        done = ceph.rbd("import", str(mount.path / "sparse/latest/disk.img"), "rbd/file")
        assert done.returncode == 0, done.stderr
    for name in ("native", "stdin", "file"):
        assert content_of(ceph, name) == content
        assert objects(ceph, name) == {0, 2, 5}, name
    assert names(ceph) == ["file", "native", "stdin"]


def test_only_the_shell_tells_that_a_pipe_into_rbd_import_broke(vm: Vm, ceph: Cluster) -> None:
    spoil(vm)
    script = f"{PROGRAM} -b {vm.directory} restore -r first - | rbd import - rbd/short"
    for option, code in (("+o", 0), ("-o", 12)):
        done = subprocess.run(
            ["bash", option, "pipefail", "-c", script], capture_output=True, timeout=PATIENCE_S
        )
        assert done.returncode == code, done.stderr
        assert len(content_of(ceph, "short")) < len(vm.contents[0])
        assert ceph.rbd("rm", "short").returncode == 0
    assert "damaged" in refused("-b", vm.directory, "restore", "-r", "first", "rbd:rbd/x", code=12)
    assert names(ceph) == []


def test_existing_images_are_overwritten_if_that_is_wanted(vm: Vm, ceph: Cluster) -> None:
    newest = vm.contents[-1]
    filled(ceph, "web01", vm.contents[0])
    at = ("-b", vm.directory, "restore")
    line = refused(*at, "rbd:rbd/web01", code=2)
    assert line.startswith(f"Overwrite rbd:rbd/web01 with {vm.ids[-1]}/disk (3.0 MiB)? Not without")
    assert content_of(ceph, "web01") == vm.contents[0]
    would = f"would restore {vm.ids[-1]}/disk (3.0 MiB) to rbd:rbd/web01, over existing data\n"
    assert backyfs(*at, "-n", "rbd:rbd/web01").out == would
    done = backyfs(*at, "--delta", "--force", "--json", "rbd:rbd/web01").json
    assert content_of(ceph, "web01") == newest
    assert 0 < done["written"] + done["zeroed"] < done["compared"] <= len(newest)
    assert "0 bytes changed" in backyfs(*at, "--delta", "-f", "rbd:rbd/web01").out
    backyfs(*at, "-r", "first", "--force", "rbd:rbd/web01")
    assert content_of(ceph, "web01") == vm.contents[0]
    backyfs(*at, "--delta", "rbd:rbd/new")  # nothing to compare with: all of it
    assert content_of(ceph, "new") == newest


@pytest.mark.parametrize("kind", ["type: ceph-rbd", "type: flyingcircus, vm: web01"])
def test_the_cluster_of_the_source_is_the_default(
    kind: str, vm: Vm, ceph: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CEPH_CONF")
    (vm.directory / "config").write_text(
        f"source: {{{kind}, pool: rbd, image: web01, conf: {ceph.conf}}}\n"
    )
    at = ("-b", vm.directory, "restore")
    backyfs(*at, "rbd:rbd/web01")
    assert content_of(ceph, "web01") == vm.contents[-1]
    assert "/nowhere" in refused(*at, "rbd:rbd/x", code=2, CEPH_CONF="/nowhere")
    (vm.directory / "config").unlink()
    assert "/etc/ceph/ceph.conf" in refused(*at, "rbd:rbd/x", code=2)


def test_what_cannot_be_restored_to(vm: Vm, ceph: Cluster) -> None:
    at = ("-b", vm.directory, "restore")
    assert "'nope'" in refused(*at, "rbd:nope/x", code=1)
    assert "no RBD image" in refused(*at, "rbd:web01", code=2)
    assert "compare" in refused(*at, "--delta", "-", code=2)
    assert "configuration" in refused(*at, "rbd:rbd/x", code=2, CEPH_CONF="/nowhere")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_restore_leaves_no_image(
    tmp_path: Path, ceph: Cluster, number: signal.Signals
) -> None:
    image = images.random_image(tmp_path / "big.img", 96 * MIB)
    directory = tmp_path / "srv" / "big"
    backyfs("-b", directory, "init", "file", image)
    backyfs("-b", directory, "backup", "--no-verify")
    import rbd

    with ceph.connected() as rados, rados.open_ioctx("rbd") as ioctx:
        process = subprocess.Popen([PROGRAM, "-b", directory, "restore", "rbd:rbd/big"])
        deadline = time.monotonic() + PATIENCE_S
        while not (found := rbd.RBD().list(ioctx)) and process.poll() is None:
            assert time.monotonic() < deadline
        assert found != ["big"]
        os.kill(process.pid, number)
        assert process.wait(PATIENCE_S) == 128 + number
        assert rbd.RBD().list(ioctx) == []


# ---- export-diff -------------------------------------------------------------------------------


def export_diff(vm: Path, *arguments: str | Path, image: str, code: int = 0) -> None:
    piped(
        [PROGRAM, "-b", vm, "export-diff", *arguments],
        ["rbd", "import-diff", "-", image],
        code=code,
    )


def test_an_image_goes_from_revision_to_revision(vm: Vm, ceph: Cluster) -> None:
    first, second, third = vm.contents
    ceph.create_image("web01", 1)
    export_diff(vm.directory, "first", image="rbd/web01")
    assert content_of(ceph, "web01") == first
    export_diff(vm.directory, "first", "latest", image="rbd/web01")
    assert content_of(ceph, "web01") == third
    with ceph.image("web01") as image:
        snapshots = [snapshot["name"] for snapshot in image.list_snaps()]
    uuid = backyfs("-b", vm.directory, "status", "--json").json["uuid"]
    assert snapshots == [f"backy-{uuid[:8]}-{revision}" for revision in (vm.ids[0], vm.ids[2])]
    assert content_of(ceph, "web01", snapshots[0]) == first
    # backwards, to one whose snapshot is there already, and to one under another name
    export_diff(vm.directory, "latest", "first", "--to-snap", "", image="rbd/web01")
    assert content_of(ceph, "web01") == first
    export_diff(vm.directory, "0", "1", "--to-snap", "mine", image="rbd/web01")
    with ceph.image("web01") as image:
        assert [s["name"] for s in image.list_snaps()][2:] == ["mine"]
    assert content_of(ceph, "web01") != second  # no check of Ceph's: it was not as REV1 is


def test_an_image_that_lacks_the_snapshot_is_not_touched(vm: Vm, ceph: Cluster) -> None:
    filled(ceph, "web01", vm.contents[0])
    export_diff(vm.directory, "first", "latest", image="rbd/web01", code=22)
    assert content_of(ceph, "web01") == vm.contents[0]
    export_diff(vm.directory, "first", "latest", "--from-snap", "", image="rbd/web01")
    assert content_of(ceph, "web01") == vm.contents[2]


def test_a_stream_into_a_file(vm: Vm, ceph: Cluster, tmp_path: Path) -> None:
    target = tmp_path / "diff"
    done = backyfs("-b", vm.directory, "export-diff", "latest", "-o", target, "--json").json
    assert target.stat().st_size == done["length"] > done["data"] > 0
    refused("-b", vm.directory, "export-diff", "latest", "-o", target, code=2)
    ceph.create_image("web01", 1)
    assert ceph.rbd("import-diff", str(target), "rbd/web01").returncode == 0
    assert content_of(ceph, "web01") == vm.contents[2]


def test_wrong_use_of_export_diff(vm: Vm) -> None:
    at = ("-b", vm.directory, "export-diff")
    assert "one or two revisions" in refused(*at, code=2)
    assert "one or two revisions" in refused(*at, "0", "1", "2", code=2)
    refused(*at, "0", "9", code=11)
    refused(*at, "--disk", "nope", "0", "1", code=11)
    ours, theirs = os.openpty()
    try:
        done = subprocess.run(
            [PROGRAM, *at, "0"], stdout=theirs, stderr=subprocess.PIPE, timeout=PATIENCE_S
        )
        assert done.returncode == 2
        assert b"terminal" in done.stderr
    finally:
        os.close(ours)
        os.close(theirs)


def test_damage_is_found_before_the_first_byte_or_leaves_no_end(vm: Vm, ceph: Cluster) -> None:
    spoil(vm)
    command: list[str | Path] = [PROGRAM, "-b", vm.directory, "export-diff", "first"]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S)
    assert done.returncode == 12
    assert not done.stdout.endswith(b"e")
    for file in (vm.directory / "revisions").glob(f"{vm.ids[0]}.disk*"):
        file.unlink()
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (12, b"")
