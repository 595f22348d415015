"""Restoring to RBD images of a real cluster: new, existing, cloned, in use, full, gone."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backyfs.ceph.settings import Settings
from backyfs.errors import BackyfsError, Corrupt, NoSpace, TargetError
from backyfs.model import FRAME
from backyfs.restore.delta import DeltaReport, candidates, update
from backyfs.restore.difference import differences
from backyfs.restore.diffstream import Names, write
from backyfs.restore.place import opened, overwrites
from backyfs.restore.regular import HEAD_BYTES
from backyfs.restore.target import Rewritable
from backyfs.restore.transfer import restore
from tests.ceph.cluster import PATIENCE_S, Cluster, running
from tests.parts import require
from tests.restore.memory import MemoryImage, images, made

MIB = 1 << 20
OBJECT = 4 * MIB
GARBAGE = random.Random(9).randbytes(6 * MIB + 100)
with_one_cluster = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def to(
    where: str,
    image: MemoryImage,
    *,
    force: bool = False,
    ceph: Settings | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    with opened(where, image.size, store=Path("/nowhere"), force=force, ceph=ceph) as target:
        restore(image, target, advance=advance)


def brought(
    where: str, image: MemoryImage, advance: Callable[[int], None] = lambda count: None
) -> DeltaReport:
    with opened(where, image.size, store=Path("/nowhere"), keep=True) as target:
        assert isinstance(target, Rewritable)
        return update(image, target, candidates(image, target), advance=advance)


def test_an_image_of_nothing(ceph: Cluster) -> None:
    for _ in range(2):
        assert not overwrites("rbd:rbd/nothing", 0)
        to("rbd:rbd/nothing", made(0, []))
    assert brought("rbd:rbd/nothing", made(0, [])).compared == 0
    assert content_of(ceph, "nothing") == b""


def test_a_namespace_that_is_missing_is_named(ceph: Cluster) -> None:
    with pytest.raises(TargetError, match="no namespace 'nowhere' in the pool 'rbd'"):
        to("rbd:rbd/nowhere/x", made(MIB, [0]))


def content_of(ceph: Cluster, name: str, snapshot: str | None = None) -> bytes:
    """All bytes of an image."""
    with ceph.image(name, snapshot) as image:
        content: bytes = image.read(0, image.size())
        return content


def names(ceph: Cluster) -> list[str]:
    return ceph.rbd("ls").stdout.decode().split()


def objects(ceph: Cluster, name: str) -> set[int]:
    """Numbers of the image's objects that there are."""
    with ceph.image(name) as image, ceph.connected() as rados, rados.open_ioctx("rbd") as ioctx:
        prefix = f"{image.block_name_prefix()}."
        keys = [found.key for found in ioctx.list_objects()]
    return {int(key.removeprefix(prefix), 16) for key in keys if key.startswith(prefix)}


def filled(ceph: Cluster, name: str, content: bytes, **options: int) -> None:
    """An image that holds `content`."""
    ceph.create_image(name, len(content), **options)
    with ceph.image(name) as image:
        if content:
            image.write(content, 0)


# ---- new images --------------------------------------------------------------------------------


@with_one_cluster
@given(image=images())
def test_a_new_image_is_the_disk(image: MemoryImage, ceph: Cluster) -> None:
    ceph.empty("rbd")
    to("rbd:rbd/new", image)
    assert content_of(ceph, "new") == image.content
    assert objects(ceph, "new") == {e.offset // OBJECT for e in image.filled} | {
        (e.end - 1) // OBJECT for e in image.filled
    }
    assert names(ceph) == ["new"]


def test_a_new_image_in_a_namespace(ceph: Cluster) -> None:
    assert ceph.rbd("namespace", "create", "rbd/tenant").returncode == 0
    image = made(OBJECT, [3])
    to("rbd:rbd/tenant/new", image)
    done = ceph.rbd("export", "--no-progress", "rbd/tenant/new", "-")
    assert done.stdout == image.content


def test_a_new_image_has_the_defaults_of_the_cluster(
    ceph: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CEPH_ARGS", "--rbd-default-order=20 --rbd-default-features=1")
    to("rbd:rbd/new", made(OBJECT, [3]))
    info = json.loads(ceph.rbd("info", "--format=json", "new").stdout)
    assert (info["object_size"], info["features"]) == (MIB, ["layering"])


def test_until_it_is_complete_a_new_image_has_another_name(ceph: Cluster) -> None:
    seen: list[list[str]] = []
    to("rbd:rbd/new", made(8 * MIB, range(128)), advance=lambda count: seen.append(names(ceph)))
    assert seen
    for found in seen:
        (name,) = found
        assert name.startswith("new.")
        assert name.endswith(".partial")


@pytest.mark.parametrize("error", [KeyboardInterrupt, Corrupt])
def test_a_failed_restore_leaves_no_new_image(ceph: Cluster, error: type[BaseException]) -> None:
    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    image = made(20 * MIB, range(320), [200] if error is Corrupt else [])
    with pytest.raises(error):
        to(
            "rbd:rbd/new",
            image,
            advance=interrupt if error is KeyboardInterrupt else lambda c: None,
        )
    assert names(ceph) == []


def test_a_name_that_was_taken_meanwhile(ceph: Cluster) -> None:
    def take(count: int) -> None:
        with contextlib.suppress(Exception):
            ceph.create_image("new", MIB)

    with pytest.raises(
        TargetError, match="cannot name the restored image rbd:rbd/new: File exists"
    ):
        to("rbd:rbd/new", made(MIB, [0]), advance=take)
    assert names(ceph) == ["new"]


# ---- existing images ---------------------------------------------------------------------------


@with_one_cluster
@given(image=images())
def test_an_existing_image_becomes_the_disk(image: MemoryImage, ceph: Cluster) -> None:
    ceph.empty("rbd")
    filled(ceph, "old", GARBAGE)
    with ceph.image("old") as before:
        before.create_snap("kept")
    to("rbd:rbd/old", image)
    assert content_of(ceph, "old") == image.content
    assert content_of(ceph, "old", "kept") == GARBAGE


def test_holes_free_objects(ceph: Cluster) -> None:
    filled(ceph, "old", random.Random(1).randbytes(5 * OBJECT))
    to("rbd:rbd/old", made(5 * OBJECT, [0, 64, 320 - 1]))
    assert objects(ceph, "old") == {0, 1, 4}


@pytest.mark.parametrize("features", [61, 1])
@pytest.mark.parametrize("delta", [False, True])
def test_holes_hide_what_a_parent_has(ceph: Cluster, features: int, delta: bool) -> None:
    import rbd

    filled(ceph, "parent", random.Random(1).randbytes(3 * OBJECT))
    with ceph.connected() as rados, rados.open_ioctx("rbd") as ioctx:
        with rbd.Image(ioctx, "parent") as parent:
            parent.create_snap("base")
            parent.protect_snap("base")
        rbd.RBD().clone(ioctx, "parent", "base", ioctx, "child", features=features)
    image = made(3 * OBJECT - 5000, [1, 2, 70])
    if delta:
        brought("rbd:rbd/child", image)
        again = brought("rbd:rbd/child", image)
        assert (again.written, again.zeroed) == (0, 0)
    else:
        to("rbd:rbd/child", image)
    assert content_of(ceph, "child") == image.content


def test_a_failed_restore_leaves_no_head(ceph: Cluster) -> None:
    filled(ceph, "old", GARBAGE)
    with pytest.raises(Corrupt):
        to("rbd:rbd/old", made(6 * MIB, range(96), [90]))
    assert content_of(ceph, "old")[:HEAD_BYTES] == bytes(HEAD_BYTES)


def test_what_a_restore_takes_away(ceph: Cluster) -> None:
    assert not overwrites("rbd:rbd/none", MIB)
    ceph.create_image("empty", 8 * MIB)
    assert not overwrites("rbd:rbd/empty", 8 * MIB)
    assert overwrites("rbd:rbd/empty", MIB)  # its size
    filled(ceph, "full", GARBAGE)
    assert overwrites("rbd:rbd/full", len(GARBAGE))
    ceph.create_image("plain", MIB, features=1)
    assert overwrites("rbd:rbd/plain", MIB)  # who knows


# ---- only what differs -------------------------------------------------------------------------


@with_one_cluster
@given(image=images(), data=st.data())
def test_a_delta_makes_an_image_the_disk(
    image: MemoryImage, data: st.DataObject, ceph: Cluster
) -> None:
    ceph.empty("rbd")
    size = data.draw(st.just(image.size) | st.integers(0, 6 * MIB), "size")
    content = image.content[:size].ljust(size, b"\0")
    filled(ceph, "old", content, features=data.draw(st.sampled_from([61, 1]), "features"))
    with ceph.image("old") as old:
        for at in data.draw(st.lists(st.integers(0, max(0, size - 1)), max_size=4), "changes"):
            length = min(data.draw(st.sampled_from([1, 4096, 200_000, OBJECT])), size - at)
            what = data.draw(st.sampled_from(["data", "zeros", "snapshot"]))
            if what == "data":
                old.write(random.Random(at).randbytes(length), at)
            elif what == "zeros":
                old.write_zeroes(at, length)
            else:
                old.create_snap(f"s{at}{length}{len(list(old.list_snaps()))}")
    brought("rbd:rbd/old", image)
    assert content_of(ceph, "old") == image.content
    again = brought("rbd:rbd/old", image)
    assert (again.written, again.zeroed) == (0, 0)


def test_a_delta_looks_at_what_either_holds(ceph: Cluster) -> None:
    ceph.create_image("old", 1 << 40)
    with ceph.image("old") as old:
        old.resize(10 * OBJECT)
        old.write(b"x", 7 * OBJECT)
    report = brought("rbd:rbd/old", made(10 * OBJECT, [5 * 64]))
    assert report.compared == 2 * FRAME
    assert objects(ceph, "old") <= {0, 5, 7}


def test_an_interrupted_delta_goes_on(ceph: Cluster) -> None:
    image = made(64 * MIB, range(1024))
    ceph.create_image("old", image.size)
    done: list[int] = []

    def interrupt(count: int) -> None:
        done.append(count)
        if sum(done) >= 40 * MIB:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        brought("rbd:rbd/old", image, advance=interrupt)
    assert content_of(ceph, "old")[:HEAD_BYTES] == bytes(HEAD_BYTES)
    assert brought("rbd:rbd/old", image).written <= 24 * MIB
    assert content_of(ceph, "old") == image.content


# ---- streams for rbd import-diff ---------------------------------------------------------------


@with_one_cluster
@given(history=st.lists(images(), min_size=2, max_size=3))
def test_ceph_makes_an_image_out_of_streams(
    history: list[MemoryImage], ceph: Cluster, tmp_path: Path
) -> None:
    ceph.empty("rbd")
    ceph.create_image("disk", 1)
    old, path = None, tmp_path / "stream"
    for number, new in enumerate(history):
        snapshots = Names(f"s{number - 1}" if old else "", f"s{number}")
        with opened(str(path), 0, store=Path("/nowhere")) as target:
            write(new, differences(old, new), snapshots, target)
        done = ceph.rbd("import-diff", "--no-progress", str(path), "rbd/disk")
        assert done.returncode == 0, done.stderr
        assert content_of(ceph, "disk") == new.content
        old = new


# ---- in use, full, gone, forbidden -------------------------------------------------------------

_USER = """
import rados, rbd, sys, time
cluster = rados.Rados(conffile="")
cluster.connect()
ioctx = cluster.open_ioctx("rbd")
image = rbd.Image(ioctx, sys.argv[1])
if sys.argv[2] == "lock":
    image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
print("open", flush=True)
sys.stdin.read()
image.close()
"""


@contextlib.contextmanager
def used(name: str, how: str) -> Iterator[subprocess.Popen[str]]:
    """The image is open in another process while entered."""
    with subprocess.Popen(
        [sys.executable, "-c", _USER, name, how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        try:
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.communicate(timeout=PATIENCE_S)


@pytest.mark.parametrize("features", [61, 1])
def test_an_image_in_use_is_refused_unless_forced(ceph: Cluster, features: int) -> None:
    filled(ceph, "old", GARBAGE, features=features)
    image = made(6 * MIB, [1, 90])
    with used("old", "open"):
        with pytest.raises(TargetError, match=r"rbd:rbd/old is in use by a client at 127\.0\.0\.1"):
            to("rbd:rbd/old", image)
        assert content_of(ceph, "old") == GARBAGE
        to("rbd:rbd/old", image, force=True)
        assert content_of(ceph, "old") == image.content
    to("rbd:rbd/old", image)


def test_an_image_locked_by_another_client_is_refused_even_if_forced(ceph: Cluster) -> None:
    filled(ceph, "old", GARBAGE)
    with used("old", "lock"):
        with pytest.raises(TargetError, match="is in use"):
            to("rbd:rbd/old", made(MIB, [0]))
        with pytest.raises(TargetError, match="rbd:rbd/old is locked by another client"):
            to("rbd:rbd/old", made(MIB, [0]), force=True)
        assert content_of(ceph, "old") == GARBAGE


@pytest.mark.parametrize("keep", [False, True])
def test_nobody_else_writes_meanwhile(ceph: Cluster, keep: bool) -> None:
    import rbd

    filled(ceph, "old", GARBAGE)
    with (
        opened("rbd:rbd/old", len(GARBAGE), store=Path("/nowhere"), keep=keep),
        ceph.image("old") as other,
        pytest.raises(rbd.ReadOnlyImage),
    ):
        other.write(b"x", 0)


def test_what_is_not_there_is_named(ceph: Cluster, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no pool 'nope'"):
        to("rbd:nope/x", made(MIB, [0]))
    with pytest.raises(BackyfsError, match="no RBD image") as caught:
        to("rbd:x", made(MIB, [0]))
    assert caught.value.exit_code == 2


@pytest.fixture
def own_ceph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster for tests that take it down; with keys and caps as in production."""
    require("ceph")
    with running(tmp_path / "ceph", cephx=True) as cluster:
        monkeypatch.setenv("CEPH_CONF", str(cluster.conf))
        monkeypatch.setenv("CEPH_ARGS", "--id backyfs")
        yield cluster


def told(cluster: Cluster, command: str, **arguments: object) -> Any:
    """What the monitor answers."""
    with cluster.connected() as rados:
        request = json.dumps({"prefix": command, "format": "json", **arguments})
        code, out, error = rados.mon_command(request, b"")
        assert code == 0, error
        return json.loads(out) if out.strip() else None


def await_(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _is_full(cluster: Cluster) -> bool:
    return "full" in told(cluster, "osd dump")["pools"][0]["flags_names"].split(",")


def test_clusters_that_cannot_take_it(own_ceph: Cluster) -> None:
    # One cluster for all of these: a start costs two seconds.
    image = made(16 * MIB, range(256))
    for name in ("old", "other"):
        to(f"rbd:rbd/{name}", image)  # by the caps that the manual asks for
    told(
        own_ceph,
        "auth get-or-create",
        entity="client.r",
        caps=["mon", "profile rbd", "osd", "profile rbd-read-only"],
    )
    key = own_ceph.directory / "keyring"
    with open(key, "a") as stream:
        stream.write(
            f"[client.r]\n\tkey = {told(own_ceph, 'auth get-key', entity='client.r')['key']}\n"
        )
    for where in ("rbd:rbd/new", "rbd:rbd/old"):
        with pytest.raises(TargetError, match="Operation not permitted|not permitted") as caught:
            to(where, image, ceph=Settings(client="r"))
        assert "profile rbd" in caught.value.hint

    quick = Settings(connect_s=2, monitor_s=2, osd_s=1)

    def hang(count: int) -> None:
        own_ceph.signal("osd", signal.SIGSTOP)

    try:
        for where in ("rbd:rbd/new", "rbd:rbd/old"):
            started = time.monotonic()
            with pytest.raises(TargetError, match=f"{where}.*did not answer in time"):
                to(where, made(64 * MIB, range(1024)), ceph=quick, advance=hang)
            assert time.monotonic() - started < PATIENCE_S
            own_ceph.signal("osd", signal.SIGCONT)
    finally:
        own_ceph.signal("osd", signal.SIGCONT)

    for name, ratio in (("nearfull", 0.001), ("backfillfull", 0.0015), ("full", 0.002)):
        told(own_ceph, f"osd set-{name}-ratio", ratio=ratio)
    await_(lambda: _is_full(own_ceph))
    for where in ("rbd:rbd/new", "rbd:rbd/other"):
        with pytest.raises(NoSpace, match=f"{where}.*no space left in the cluster"):
            to(where, made(64 * MIB, range(1024)))
    assert sorted(name.partition(".")[0] for name in names(own_ceph)) == ["new", "old", "other"]

    own_ceph.stop()
    with pytest.raises(TargetError, match="did not answer in time"):
        to("rbd:rbd/new", image, ceph=quick)
