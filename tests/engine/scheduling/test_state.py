"""The scheduler's own files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backyfs.engine.scheduling import state


def test_a_status_file_among_others_does_not_lead_elsewhere(tmp_path: Path) -> None:
    """In a directory of all, anybody may put a link where the unfinished file will be."""
    outside = tmp_path / "outside"
    outside.write_text("theirs\n")
    (tmp_path / f".status.{os.getpid()}.tmp").symlink_to(outside)
    with pytest.raises(OSError, match="symbolic links"):
        state.write_status(tmp_path / "status", [])
    assert outside.read_text() == "theirs\n"
    state.write_status(tmp_path / "status", [])
    assert (tmp_path / "status").read_text() == "[]\n"
