"""The settings of the source `flyingcircus`: Backy's, ours, and what is wrong with them."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from backyfs.ceph.spec import ImageSpec
from backyfs.config.quiesce import Policy
from backyfs.config.site import read_site
from backyfs.errors import ConfigError
from backyfs.source import registry
from backyfs.source.flyingcircus.agent import Agent
from backyfs.source.flyingcircus.config import OWN_KEYS, read_config

DOCUMENT = Path(__file__).parents[3] / "docs" / "flyingcircus.md"
BACKY = {"pool": "rbd.hdd", "image": "web01.root", "vm": "web01"}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONSUL_HTTP_ADDR", "CONSUL_HTTP_TOKEN_FILE", "CONSUL_CACERT"):
        monkeypatch.delenv(name, raising=False)


def test_backys_keys() -> None:
    given = {**BACKY, "consul_acl_token": "a211c244", "full-always": True}
    config = read_config(given)
    assert config.ceph.images == {"disk": ImageSpec("rbd.hdd", "", "web01.root")}
    assert config.ceph.full_always
    assert (config.vm, config.agent) == ("web01", Agent(secret="a211c244"))
    assert (config.policy, config.timeout_s) == (Policy.PREFER, 90)
    assert read_config({**BACKY, "consul_acl_token": None}).agent == Agent()


def test_all_keys() -> None:
    config = read_config(
        {
            "images": {"root": "rbd/web01.root", "data": "ssd/web01.data"},
            "vm": "web01",
            "client": "backy",
            "hypervisor-snapshot": "require",
            "consul": "https://consul.example:8501",
            "consul-token-file": "/etc/backyfs/consul-token",
            "consul-ca-file": "/etc/ssl/consul.pem",
            "consul-timeout": "2m",
        }
    )
    assert list(config.ceph.images) == ["root", "data"]
    assert config.ceph.cluster.client == "backy"
    assert config.policy is Policy.REQUIRE
    assert config.timeout_s == 120
    assert config.agent == Agent(
        *("consul.example", 8501, True, "/etc/backyfs/consul-token"),
        ca_file="/etc/ssl/consul.pem",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vm": None}, "`vm` must be a text, not None"),
        ({"vm": ""}, "`vm` must be a text, not ''"),
        ({"vm": "a\nb"}, "`vm` must be a text"),
        ({"vn": "web01"}, "unknown key 'vn'"),
        ({"consul-timeout": "soon"}, "`consul-timeout`: 'soon' is no interval"),
        ({"consul-timeout": 0}, "`consul-timeout`: 0 is no interval"),
        ({"consul-timeout": True}, "`consul-timeout` must be an interval, not True"),
        ({"consul-timeout": [1]}, "`consul-timeout` must be an interval"),
        ({"hypervisor-snapshot": "always"}, "must be require, prefer or never, not 'always'"),
        ({"hypervisor-snapshot": True}, "must be require, prefer or never, not True"),
        ({"hypervisor-snapshot": []}, "must be require, prefer or never"),
        ({"consul": "ftp://x"}, "'ftp://x' is no address of a Consul agent"),
        ({"consul": 8500}, "`consul` must be a text"),
        ({"consul-token-file": "token"}, "`consul-token-file` must be an absolute path"),
        ({"consul-ca-file": "~/ca"}, "`consul-ca-file` must be an absolute path"),
        ({"consul_acl_token": ["x"]}, "`consul_acl_token` is no token"),
        ({"consul_acl_token": 123}, "`consul_acl_token` is no token"),
        ({"consul_acl_token": "a\nb"}, "`consul_acl_token` is no token"),
        ({"consul_acl_token": "x", "consul-token-file": "/y"}, "give either `consul-token-file`"),
        ({"image": "a/b"}, "`image` must be a name without /"),
        ({"images": {}}, "give either `image` or `images`"),
        ({"full-always": "yes"}, "`full-always` must be true or false"),
    ],
)
def test_what_is_wrong_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(BACKY | changes)
    assert caught.value.message.startswith("source flyingcircus: ")
    assert message in caught.value.message
    assert "\n" not in caught.value.message
    if "consul_acl_token" in changes:
        assert str(changes["consul_acl_token"]) not in caught.value.message.replace("token", "")


def test_the_vm_must_be_named() -> None:
    with pytest.raises(ConfigError, match="source flyingcircus: the key 'vm' is missing"):
        read_config({"pool": "rbd", "image": "x"})
    with pytest.raises(ConfigError, match="unknown key 'consul-tokenfile'") as caught:
        read_config({**BACKY, "consul-tokenfile": "/x"})
    assert caught.value.hint.startswith("did you mean 'consul-token-file'? known are: pool, ")


def test_the_document_has_all_keys_and_a_right_example(tmp_path: Path) -> None:
    text = DOCUMENT.read_text()
    assert re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE) == [
        *("vm", "hypervisor-snapshot", "consul", "consul-token-file", "consul_acl_token"),
        *("consul-ca-file", "consul-timeout"),
    ]
    assert len(OWN_KEYS) == 7
    example = re.search(r"^    jobs:\n(?:    .*\n)+", text, re.MULTILINE)
    assert example
    path = tmp_path / "backy.conf"
    path.write_text(textwrap.dedent(example[0]))
    site = read_site(path, check_source=registry.make)
    assert site.jobs["web01"].job.source_type == "flyingcircus"
