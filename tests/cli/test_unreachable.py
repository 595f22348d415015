"""One VM whose directory cannot be looked into (a dead network file system): others go on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backyfs.nbd.protocol.constants import Option
from tests.cli.conftest import Vm
from tests.cli.program import backyfs, refused
from tests.engine.scheduling.daemons import Site, eventually
from tests.mount.mounts import mounted
from tests.nbd.running import running
from tests.nbd.wire import connected


def unreachable(path: Path) -> None:
    """Whoever looks there is told that something is wrong, not that nothing is there."""
    path.symlink_to("x" * 300)
    with pytest.raises(OSError, match="too long"):
        os.stat(path)


@pytest.fixture
def base(vm: Vm) -> Path:
    found = vm.directory.parent
    unreachable(found / "dead")
    return found


def test_listings_name_it(vm: Vm, base: Path) -> None:
    (dead, web01) = backyfs("-b", base, "status", "--json", code=1).json["vms"]
    assert (dead["vm"], web01["vm"]) == ("dead", vm.directory.name)
    assert "too long" in dead["error"]
    done = backyfs("-b", base, "usage", code=1)
    assert vm.directory.name in done.out
    assert "dead: " in done.err


def test_check_judges_the_others(vm: Vm, base: Path, tmp_path: Path) -> None:
    config = tmp_path / "backy.conf"
    source = f"source: {{type: file, filename: {vm.image}}}"
    config.write_text(
        f"global: {{base-dir: {base}}}\n"
        f"jobs:\n  {vm.directory.name}: {{{source}}}\n  dead: {{{source}}}\n"
    )
    done = backyfs("-c", config, "check", "--json", "--metrics", tmp_path / "m.prom", code=2)
    kinds = {(finding["job"], finding["kind"]) for finding in done.json["findings"]}
    assert ("dead", "repository") in kinds
    assert {job["job"] for job in done.json["jobs"]} == {"dead", vm.directory.name}
    metrics = tmp_path / "m.prom"
    assert metrics.stat().st_mode & 0o777 == 0o644
    backyfs("-b", base, "-c", config, "check", "--ignore", "frozen", code=2)


def test_check_does_not_look_where_it_was_not_asked_to(vm: Vm, tmp_path: Path) -> None:
    config = tmp_path / "backy.conf"
    config.write_text(f"global: {{base-dir: {vm.directory.parent}}}\njobs: {{}}\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    unreachable(elsewhere / "repository.json")
    done = backyfs("-b", elsewhere, "-c", config, "check", code=None)
    assert not done.out.startswith("UNKNOWN")


def test_the_mount_shows_the_others(vm: Vm, base: Path, tmp_path: Path) -> None:
    with mounted(base, tmp_path / "mnt") as mount:
        assert sorted(os.listdir(mount.path)) == ["dead", vm.directory.name]
        assert "latest" in os.listdir(mount.path / vm.directory.name)
        with pytest.raises(OSError, match=r"Input/output error|too long"):
            os.listdir(mount.path / "dead")


def test_nbd_lists_the_others(vm: Vm, base: Path) -> None:
    with running(base) as server, connected(server.address) as client:
        client.hello()
        listed = client.ask(Option.LIST)[1]
        assert any(vm.directory.name.encode() in data for _, data in listed)


def test_the_scheduler_backs_up_the_others(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.add("web01")
    site.vms["dead"] = site.vms["web01"]
    unreachable(site.base / "dead")
    site.write("2s")
    with site.scheduler():
        eventually(lambda: site.count("web01") > 1)
        eventually(lambda: site.status().get("dead", {}).get("failures", 0) >= 1)
        assert "too long" in site.status()["dead"]["last_reason"]
    assert "too long" in refused("-b", site.base / "dead", "status", code=1)
