"""The keys of a source `ceph-rbd`, in a job and from `init`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backyfs.ceph.settings import Settings
from backyfs.ceph.spec import ImageSpec
from backyfs.config.job import read_job
from backyfs.errors import ConfigError
from backyfs.source.ceph.config import read_config
from tests.ceph.cluster import Cluster
from tests.cli.program import backyfs, refused


def test_a_section_of_backy() -> None:
    config = read_config({"pool": "rbd.hdd", "image": "test01.root", "full-always": True})
    assert config.images == {"disk": ImageSpec("rbd.hdd", "", "test01.root")}
    assert config.full_always
    assert config.cluster == Settings()


def test_several_images() -> None:
    images = {"root": "web01", "data": "ssd/web01-data", "log": "hdd/tenant/web01-log"}
    config = read_config({"pool": "rbd", "namespace": "prod", "images": images})
    assert list(map(str, config.images.values())) == [
        "rbd/prod/web01",
        "ssd/web01-data",
        "hdd/tenant/web01-log",
    ]


def test_the_cluster() -> None:
    config = read_config(
        {
            "pool": "rbd",
            "image": "web01",
            "conf": "/etc/ceph/east.conf",
            "client": "client.backyfs",
            "cluster": "east",
            "connect-timeout": "10s",
            "monitor-timeout": 90,
            "osd-timeout": "5m",
        }
    )
    assert config.cluster == Settings("/etc/ceph/east.conf", "backyfs", "east", 10, 90, 300)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "either `image` or `images`"),
        ({"image": "a"}, "'pool' is missing"),
        ({"pool": "rbd"}, "either `image` or `images`"),
        ({"pool": "rbd", "image": "a", "images": {"a": "b"}}, "either `image` or `images`"),
        ({"pool": "rbd", "image": "rbd/a"}, "without /"),
        ({"pool": "rbd", "image": "a@b"}, "`image`: 'rbd/a@b' is no RBD image"),
        ({"pool": "rbd", "image": 5}, "must be a text"),
        ({"pool": "rbd", "image": ""}, "must be a text"),
        ({"pool": ["rbd"], "image": "a"}, "`pool` must be a text"),
        ({"pool": "rbd", "images": {}}, "must map names"),
        ({"pool": "rbd", "images": ["a"]}, "must map names"),
        ({"pool": "rbd", "images": {"-": "a"}}, "'-' is no disk name"),
        ({"pool": "rbd", "images": {"a": 5}}, "`images.a` must be the name of an image"),
        ({"images": {"a": "b"}}, "`images.a`: 'b' is no RBD image"),
        ({"pool": "rbd", "images": {"a": "x", "b": "rbd/x"}}, "same image"),
        ({"pool": "rbd", "image": "a", "full-always": "yes"}, "true or false"),
        ({"pool": "rbd", "image": "a", "osd-timeout": "never"}, "`osd-timeout`: 'never' is no"),
        ({"pool": "rbd", "image": "a", "osd-timeout": 0}, "`osd-timeout`: 0 is no interval"),
        ({"pool": "rbd", "image": "a", "osd-timeout": None}, "must be an interval"),
    ],
)
def test_what_makes_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(settings)
    assert words in caught.value.message
    assert caught.value.message.startswith("source ceph-rbd: ")


@pytest.mark.parametrize(
    ("key", "close"), [("id", "client"), ("pol", "pool"), ("osd-timeot", "osd-timeout")]
)
def test_an_unknown_key_is_met_with_a_suggestion(key: str, close: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key {key!r}") as caught:
        read_config({"pool": "rbd", "image": "a", key: "x"})
    assert caught.value.hint.startswith(f"did you mean {close!r}? ")


def test_it_is_checked_with_the_configuration_of_all_jobs(tmp_path: Path) -> None:
    path = tmp_path / "backy.conf"
    path.write_text("jobs: {web01: {source: {type: ceph-rbd, pool: rbd, imgae: web01}}}\n")
    assert "unknown key 'imgae'" in refused("-c", path, "check-config", code=2)


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["rbd/web01"], {"pool": "rbd", "image": "web01"}),
        (["root=rbd/web01", "data=rbd/log"], {"images": {"root": "rbd/web01", "data": "rbd/log"}}),
    ],
)
def test_init(ceph: Cluster, tmp_path: Path, words: list[str], settings: dict[str, Any]) -> None:
    for name in ("web01", "log"):
        ceph.create_image(name, 1 << 20)
    vm = tmp_path / "vm"
    done = backyfs("-b", vm, "init", "ceph-rbd", *words)
    assert ("2 disks" if len(words) > 1 else "1 disk") in done.out
    assert read_job(vm / "config").settings == settings
    backyfs("-b", vm, "backup")


def test_init_of_what_is_not_there(ceph: Cluster, tmp_path: Path) -> None:
    vm = tmp_path / "vm"
    assert "no RBD image rbd/nope" in refused("-b", vm, "init", "ceph-rbd", "rbd/nope", code=13)
    assert "no RBD image" in refused("-b", vm, "init", "ceph-rbd", "nope", code=2)
    assert not vm.exists()
