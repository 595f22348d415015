"""A repository with a little history that tests may copy and spoil."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import images
from tests.cli.program import backyfs

SIZE = 3 * 1024 * 1024 + 700


@dataclass(frozen=True)
class Vm:
    """A VM's directory, its source image, and copies of the image as each revision has it."""

    directory: Path
    image: Path
    contents: list[bytes] = field(repr=False)

    @property
    def ids(self) -> list[str]:
        """Revision ids, oldest first."""
        return [
            r["id"] for r in backyfs("-b", self.directory, "status", "--json").json["revisions"]
        ]


@pytest.fixture(scope="session")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Vm:
    base = tmp_path_factory.mktemp("template")
    image = images.make_image(base / "web01.img", SIZE, seed=5)
    directory = base / "srv" / "web01"
    backyfs("-b", directory, "init", "file", image)
    contents = []
    for seed, tags in enumerate([["daily", "weekly"], ["manual:before upgrade"], ["daily"]]):
        images.change_blocks(image, 3, seed)
        backyfs("-b", directory, "backup", *tags)
        contents.append(image.read_bytes())
    return Vm(directory, image, contents)


@pytest.fixture
def vm(_template: Vm, tmp_path: Path) -> Vm:
    """A VM web01 of the test's own, with three revisions, in tmp_path/srv."""
    directory = tmp_path / "srv" / "web01"
    shutil.copytree(_template.directory, directory)
    image = Path(shutil.copy(_template.image, tmp_path / "web01.img"))
    config = directory / "config"
    config.write_text(config.read_text().replace(str(_template.image), str(image)))
    return Vm(directory, image, _template.contents)
