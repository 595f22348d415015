"""What the scheduler makes ready in the directories of VMs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from backyfs.config.job import Job
from backyfs.config.schedule import DAILY
from backyfs.config.site import SiteJob
from backyfs.engine.scheduling.processes import Processes
from backyfs.errors import ConfigError


def test_two_vms_in_one_directory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On vfat and exFAT `Web01` leads to `web01`; the name that was made is the one listed."""
    world = Processes(tmp_path, tmp_path / "backy.conf")

    def prepare(name: str) -> None:
        trio.run(world.prepare, SiteJob(name, Job("file", {"filename": f"/{name}.img"}, DAILY)))

    prepare("web01")
    before = (tmp_path / "web01" / "config").read_text()
    (tmp_path / "Web01").symlink_to("web01")
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [n for n in listed(path) if n != "Web01"])
    with pytest.raises(ConfigError, match="Web01 is the directory of another VM"):
        prepare("Web01")
    prepare("web01")
    assert (tmp_path / "web01" / "config").read_text() == before
