"""What the scheduler makes ready in the directories of VMs."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import trio

from backyfs.config.job import Job
from backyfs.config.schedule import DAILY
from backyfs.config.site import SiteJob
from backyfs.engine.scheduling.base import Base
from backyfs.engine.scheduling.processes import Processes
from backyfs.errors import BackyfsError, ConfigError
from backyfs.store.repository import Repository
from tests.engine.test_check import revise


def test_two_vms_in_one_directory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On vfat and exFAT `Web01` leads to `web01`; the name that was made is the one listed."""
    world = Processes(Base(tmp_path), tmp_path / "backy.conf")

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


def test_a_directory_that_leads_to_itself(tmp_path: Path) -> None:
    """A wrong link of an operator; pathlib has an error of its own for it, which ended it all."""
    (tmp_path / "web01").symlink_to("web01")
    job = SiteJob("web01", Job("file", {"filename": "/web01.img"}, DAILY))
    world = Processes(Base(tmp_path), tmp_path / "backy.conf")
    assert not trio.run(world.contents, job).revisions
    with pytest.raises(BackyfsError, match="web01.*: Too many levels of symbolic links") as told:
        trio.run(world.prepare, job)
    assert told.value.exit_code == 1, "not that of a wrong configuration"


def test_revisions_whose_repository_file_was_lost(tmp_path: Path) -> None:
    """That is no VM that was never backed up."""
    repository = Repository.create(tmp_path / "web01", "packs")
    revise(repository, timedelta(hours=1))
    repository.layout.identity.unlink()
    job = SiteJob("web01", Job("file", {"filename": "/web01.img"}, DAILY))
    world = Processes(Base(tmp_path), tmp_path / "backy.conf")
    for look in (world.contents, world.prepare):
        with pytest.raises(BackyfsError, match="has revisions, but no repository.json"):
            trio.run(look, job)
