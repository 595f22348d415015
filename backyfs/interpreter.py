"""Starting modules of this program in an interpreter of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def running(module: str) -> list[str]:
    """The command that runs a module.

    -P: not with what lies in the current directory, which may be anybody's.
    """
    return [sys.executable, "-P", "-m", module]


def environment() -> dict[str, str]:
    """Ours, with this package importable wherever the process starts."""
    path = os.environ.get("PYTHONPATH", "")
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, path)))}
