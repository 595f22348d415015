"""Connecting to a real cluster, opening its images, and what is said of each thing not there."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest

from backyfs.ceph.cluster import connected
from backyfs.ceph.failure import failure
from backyfs.ceph.settings import Settings, completed
from backyfs.ceph.spec import ImageSpec, image_spec
from backyfs.cli import doctor
from backyfs.errors import BackyfsError, ConfigError, NoSpace, SourceUnavailable, UsageError
from tests.ceph.cluster import Cluster, running
from tests.parts import require

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("rbd/web01", ImageSpec("rbd", "", "web01")),
        ("rbd/tenant/web01", ImageSpec("rbd", "tenant", "web01")),
        ("a.b/vm 1.root", ImageSpec("a.b", "", "vm 1.root")),
    ],
)
def test_an_image_spec(text: str, spec: ImageSpec) -> None:
    assert image_spec(text) == spec
    assert str(spec) == text


@pytest.mark.parametrize(
    "text", ["", "web01", "/web01", "rbd/", "rbd//web01", "a/b/c/d", "rbd/web01@snap", "rbd/a\nb"]
)
def test_no_image_spec(text: str) -> None:
    with pytest.raises(UsageError, match="no RBD image"):
        image_spec(text)


def test_the_environment_completes_the_settings() -> None:
    found = completed(Settings(), {"CEPH_ARGS": "--id backup -c '/a b/c.conf' --cluster=east"})
    assert (found.client, found.conf, found.cluster) == ("backup", "/a b/c.conf", "east")
    assert completed(Settings(), {"CEPH_ARGS": "-n client.x"}).client == "x"
    assert completed(Settings(), {"CEPH_CONF": "/c", "CEPH_ARGS": "--conf"}).conf == "/c"
    assert completed(Settings(client="own"), {"CEPH_ARGS": "--id other"}).client == "own"
    assert completed(Settings(), {}) == Settings(client="admin", cluster="ceph")
    with pytest.raises(ConfigError, match="CEPH_ARGS"):
        completed(Settings(), {"CEPH_ARGS": "--id 'open"})


def test_an_image_is_opened(ceph: Cluster) -> None:
    ceph.create_image("web01", 8 * MIB)
    with connected(Settings()) as cluster:
        with cluster.image(ImageSpec("rbd", "", "web01")) as image:
            image.write(b"bytes", 3)
            image.create_snap("s")
            image.write(b"other", 3)
        with cluster.image(ImageSpec("rbd", "", "web01"), snapshot="s", read_only=True) as image:
            assert image.read(0, 8) == b"\0\0\0bytes"


def test_an_image_in_a_namespace(ceph: Cluster) -> None:
    assert ceph.rbd("namespace", "create", "rbd/tenant").returncode == 0
    assert ceph.rbd("create", "--size", "8M", "rbd/tenant/web01").returncode == 0
    with connected(Settings()) as cluster:
        with cluster.image(image_spec("rbd/tenant/web01")) as image:
            assert image.size() == 8 * MIB
        with (
            pytest.raises(SourceUnavailable, match="no RBD image rbd/web01"),
            cluster.image(image_spec("rbd/web01")),
        ):
            pass


def test_what_is_not_there_is_named(ceph: Cluster) -> None:
    ceph.create_image("web01", 8 * MIB)
    with connected(Settings()) as cluster:
        for spec, snapshot, words in [
            ("nope/web01", None, "no pool 'nope'"),
            ("rbd/nope", None, "no RBD image rbd/nope"),
            ("rbd/web01", "nope", "no RBD image rbd/web01@nope"),
        ]:
            with (
                pytest.raises(SourceUnavailable, match=words),
                cluster.image(image_spec(spec), snapshot=snapshot),
            ):
                pass


def test_an_image_in_the_trash(ceph: Cluster) -> None:
    ceph.create_image("web01", 8 * MIB)
    assert ceph.rbd("trash", "mv", "rbd/web01").returncode == 0
    with (
        connected(Settings()) as cluster,
        pytest.raises(SourceUnavailable) as caught,
        cluster.image(image_spec("rbd/web01")),
    ):
        pass
    assert "trash" in caught.value.hint


def test_no_configuration(tmp_path: Path) -> None:
    require("rbd")
    with (
        pytest.raises(ConfigError, match="no configuration of a Ceph cluster at /nowhere"),
        connected(Settings(conf="/nowhere")),
    ):
        pass


def test_no_monitor(tmp_path: Path) -> None:
    require("rbd")
    conf = tmp_path / "ceph.conf"
    conf.write_text("[global]\nmon_host = [v2:127.0.0.1:9]\nauth_client_required = none\n")
    with (
        pytest.raises(SourceUnavailable, match="did not answer in time"),
        connected(Settings(conf=str(conf), connect_s=1)),
    ):
        pass


def test_no_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rbd", None)
    with pytest.raises(SourceUnavailable) as caught, connected(Settings()):
        pass
    assert "python3-rbd" in caught.value.hint
    [finding] = doctor._rbd(Path())
    assert "then: make setup (an environment of your own: " in finding.remedy


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("ceph")
    with running(tmp_path / "ceph", cephx=True) as ceph:
        ceph.create_image("web01", 8 * MIB)
        with (
            connected(Settings(conf=str(ceph.conf), client="backyfs")) as cluster,
            cluster.image(image_spec("rbd/web01")) as image,
        ):
            assert image.size() == 8 * MIB
        with (
            pytest.raises(SourceUnavailable, match="connect"),
            connected(Settings(conf=str(ceph.conf), client="nobody")),
        ):
            pass
        monkeypatch.setenv("CEPH_ARGS", "--keyring /nonexistent")
        with (
            pytest.raises(SourceUnavailable, match=r"no keyring has a key for client\.backyfs"),
            connected(Settings(conf=str(ceph.conf), client="backyfs")),
        ):
            pass


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, NoSpace, "no space left"),
        (errno.EDQUOT, NoSpace, "no space left"),
        (errno.ETIMEDOUT, SourceUnavailable, "did not answer in time"),
        (errno.EROFS, SourceUnavailable, "holds its lock"),
        (errno.EIO, SourceUnavailable, "Input/output error"),
    ],
)
def test_exceptions_of_the_binding(number: int, kind: type[BackyfsError], words: str) -> None:
    error = failure("read it", SourceUnavailable, OSError(number, "x"))
    assert type(error) is kind
    assert words in error.message
