"""The units, started by systemd: what they may do is enough, and others see what they offer."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.contrib.host import CONFIG, Host, booted
from tests.mount.mounts import eventually
from tests.parts import require

IMAGE = "/srv/vms/web.img"
STORE = "/srv/backy/web"
TREE = "/mnt/backy"
JOBS = f"""
global: {{base-dir: /srv/backy}}
schedules:
  often: {{hourly: {{interval: 1s, keep: 2}}}}
jobs:
  web: {{source: {{type: file, filename: {IMAGE}}}, schedule: often}}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """With a VM's image on XFS, and one backup of it."""
    require("fuse")
    require("libnbd")
    with booted(tmp_path_factory.mktemp("host")) as found:
        found.run("sh", "-c", f"head -c 5000000 /dev/urandom >{IMAGE}; mkdir {STORE}")
        found.backyfs("-b", STORE, "init", "file", IMAGE)
        found.backyfs("-b", STORE, "backup")
        yield found


def test_the_tree_is_seen_by_all(host: Host) -> None:
    host.systemctl("start", "backyfs-mount")
    host.run("cmp", f"{TREE}/web/latest/disk.img", IMAGE)
    host.systemctl("kill", "--signal=SIGKILL", "backyfs-mount")
    assert eventually(lambda: host.systemctl("show", "-PNRestarts", "backyfs-mount") == "1")
    assert eventually(lambda: host.run("ls", TREE, check=False) == "web")
    host.systemctl("stop", "backyfs-mount")
    assert host.systemctl("show", "-PResult", "backyfs-mount") == "success"
    assert host.run("ls", TREE) == ""


def test_the_first_client_starts_the_server(host: Host) -> None:
    host.systemctl("start", "backyfs-nbd.socket")
    assert host.systemctl("is-active", "backyfs-nbd", check=False) == "inactive"
    for name in ("web/latest", "web/latest@rw"):
        host.run("nbdcopy", f"nbd://localhost:9000/{name}", "/srv/copied")
        host.run("cmp", "/srv/copied", IMAGE)
    host.systemctl("stop", "backyfs-nbd.socket", "backyfs-nbd")
    assert host.systemctl("show", "-PResult", "backyfs-nbd") == "success"


def test_backups_are_of_a_point_in_time(host: Host) -> None:
    """The clone of an image is made beside it: the unit must let the scheduler write there."""
    host.run("sh", "-c", f"cat >{CONFIG} <<'.'\n{JOBS}\n.\n")
    host.run("dd", "if=/dev/urandom", f"of={IMAGE}", "bs=64k", "count=1", "conv=notrunc")
    before = _newest(host)["id"]
    host.systemctl("start", "backyfs-scheduler")
    assert eventually(lambda: _newest(host)["id"] != before)
    host.systemctl("reload", "backyfs-scheduler")
    host.systemctl("stop", "backyfs-scheduler")
    assert host.systemctl("show", "-PResult", "backyfs-scheduler") == "success"
    assert _newest(host)["reason"] == "reflink clone"


def _newest(host: Host) -> dict[str, str]:
    records = json.loads(host.backyfs("-b", STORE, "status", "--json"))["revisions"]
    newest: dict[str, str] = records[-1]
    return newest
