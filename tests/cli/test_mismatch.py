"""A change list that leaves something out, from the command line: exit code, evidence, recovery."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from backyfs.config.site import read_site
from backyfs.engine.scheduling.base import Base
from backyfs.engine.scheduling.processes import Processes
from backyfs.engine.scheduling.world import Command, Kind
from tests import images
from tests.cli.program import Done, backyfs, refused
from tests.cli.test_check import held_to_the_guidelines

FRAME = 65536


@dataclass
class Site:
    """A VM whose image can be cloned, so that its snapshots are frozen."""

    directory: Path
    image: Path
    nothing: Path

    def on(self, *arguments: str | Path, code: int = 0) -> Done:
        return backyfs("-b", self.directory, *arguments, code=code)

    def lie(self) -> None:
        """Change the image, of which the list says nothing."""
        images.change_range(self.image, 5 * FRAME, 4096, seed=1)


@pytest.fixture
def site(btrfs_dir: Path) -> Site:
    image = images.random_image(btrfs_dir / "web01.img", 10 * FRAME + 700)
    directory = btrfs_dir / "srv" / "web01"
    backyfs("-b", directory, "init", "--store", "packs", "file", image)
    nothing = btrfs_dir / "changes.json"
    nothing.write_text(json.dumps([]))
    made = Site(directory, image, nothing)
    made.on("backup", "daily")
    return made


def test_a_lie_is_told_and_put_right(site: Site) -> None:
    honest = site.on("backup", "--changes", site.nothing, "daily")
    assert "crash, verified by sample; daily" in honest.out
    site.lie()
    done = site.on("backup", "--changes", site.nothing, "daily", code=12)
    revision = done.out.partition(":")[0]
    report = site.directory / "reports" / f"{revision}.json"
    first, hint = done.err.splitlines()
    assert first.startswith(
        f"backyfs: web01: {revision} is distrusted: 1 of 11 sampled frames differ from the source;"
    )
    assert str(report) in hint

    value = json.loads(report.read_text())
    assert (value["revision"], value["frames"][0]["offset"]) == (revision, 5 * FRAME)
    source = report.with_name(f"{revision}.disk.{5 * FRAME}.source").read_bytes()
    assert source == site.image.read_bytes()[5 * FRAME : 6 * FRAME]

    status = site.on("status").out
    assert f"report about {revision}: 1 of 11 sampled frames differ: {report}" in status
    value = site.on("status", "--json").json
    assert [r["trust"] for r in value["revisions"]] == ["trusted", "distrusted", "distrusted"]
    assert value["revisions"][-1]["wrong_frames"] == 1
    assert value["reports"][0]["revision"] == revision
    base = backyfs("-b", site.directory.parent, "status", "--json").json["vms"][0]
    assert base["reports"] == [revision]
    assert "1 reports" in backyfs("-b", site.directory.parent, "status").out

    checked = site.on("check", "--ignore", "disk", code=1)
    assert "found to differ from the source" in held_to_the_guidelines(checked) + checked.out
    assert " reports=1;0;;0" in checked.out
    best = site.on("find", "--json", "-r", "last(not(trust:distrusted))").json
    assert best["id"] == value["revisions"][0]["id"]
    assert "stays distrusted" in site.on("verify", "-r", revision).err

    whole = site.on("backup", "--changes", site.nothing, "daily", "--json").json
    assert (whole["trust"], whole["verification"], whole["believed"]) == ("trusted", "full", 0)
    restored = site.directory.parent / "restored"
    site.on("restore", "-r", "latest", restored)
    assert restored.read_bytes() == site.image.read_bytes()
    assert "trusted" in site.on("distrust", "--lift", "-r", revision).out
    assert site.on("status", "--json").json["revisions"][2]["trust"] == "trusted"


def test_it_can_be_left_out(site: Site) -> None:
    config = site.directory / "config"
    config.write_text(config.read_text() + "sample-share: 0%\n")
    site.lie()
    assert "verified where read" in site.on("backup", "--changes", site.nothing, "daily").out
    config.write_text(config.read_text().replace("0%", "100%"))
    quick = site.on("backup", "--no-verify", "--changes", site.nothing, "daily")
    assert "not verified" in quick.out
    assert "differ" in refused("-b", site.directory, "-q", *_lying(site), code=12)


def _lying(site: Site) -> list[str]:
    return ["backup", "--changes", str(site.nothing), "daily"]


async def test_the_scheduler_takes_it_for_a_failure(site: Site) -> None:
    """And has the reason, though nobody looks at stdout."""
    path = site.directory.parent.parent / "backy.conf"
    path.write_text(
        f"global: {{base-dir: {site.directory.parent}}}\n"
        f"jobs: {{web01: {{source: {{type: file, filename: {site.image}}}}}}}\n"
    )
    world = Processes(Base(site.directory.parent), path)
    site.lie()
    command = Command(
        Kind.BACKUP, read_site(path).jobs["web01"], ("--changes", str(site.nothing), "daily")
    )
    outcome = await world.run(command)
    assert outcome.code == 12
    assert "is distrusted: 1 of 11 sampled frames differ from the source" in outcome.reason
    contents = await world.contents(command.job)
    assert [(r.good, r.relied) for r in contents.revisions] == [(True, True), (False, False)]
    assert contents.quarantined == 1
