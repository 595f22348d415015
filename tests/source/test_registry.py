"""Sources by type: the built-in one, plug-ins, and what is neither."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from backyfs.errors import ConfigError
from backyfs.source.file import FileSource
from backyfs.source.registry import make, types


@pytest.fixture
def plug_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installed distribution with a good plug-in, three bad ones, and one that claims `file`."""
    info = tmp_path / "someplugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: someplugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[backyfs.sources]\n"
        "tape = someplugin:Tape\n"
        "broken = somebrokenplugin:Tape\n"
        "missing = nosuchplugin:Tape\n"
        "absent = someplugin:Nothing\n"
        "file = someplugin:Tape\n"
    )
    (tmp_path / "someplugin.py").write_text(
        "class Tape:\n"
        "    type = 'tape'\n"
        "    def __init__(self, settings):\n"
        "        self.settings = settings\n"
    )
    (tmp_path / "somebrokenplugin.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_built_in_source(tmp_path: Path) -> None:
    source = make("file", {"filename": str(tmp_path / "a")})
    assert isinstance(source, FileSource)
    assert source.type == "file"
    assert "file" in types()


def test_a_plug_in_gets_its_settings(plug_ins: Path) -> None:
    source = make("tape", {"drive": "/dev/st0"})
    assert source.type == "tape"
    assert source.settings == {"drive": "/dev/st0"}  # type: ignore[attr-defined]
    assert {"tape", "file"} <= set(types())


def test_no_plug_in_takes_the_place_of_a_built_in_source(plug_ins: Path) -> None:
    assert isinstance(make("file", {"filename": "/a"}), FileSource)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("broken", "division by zero"),
        ("missing", "No module named 'nosuchplugin'"),
        ("absent", "has no attribute 'Nothing'"),
    ],
)
def test_a_plug_in_that_cannot_be_loaded(plug_ins: Path, kind: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"source type '{kind}': its plug-in .*{reason}"):
        make(kind, {})


def test_an_unknown_type_is_met_with_a_suggestion(plug_ins: Path) -> None:
    with pytest.raises(ConfigError, match="unknown source type 'flie'") as caught:
        make("flie", {})
    assert caught.value.hint.startswith(
        "did you mean 'file'? known are: absent, broken, ceph-rbd, file, flyingcircus,"
    )
    with pytest.raises(ConfigError, match="unknown source type 'xyzzy'") as caught:
        make("xyzzy", {})
    assert caught.value.hint.startswith("known are: ")


def test_plug_ins_are_not_looked_for_when_a_built_in_source_is_named() -> None:
    code = (
        "import sys; from backyfs.source.registry import make; make('file', {'filename': '/a'});"
        "sys.exit(bool({'importlib.metadata', 'yaml', 'trio', 'blake3'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
