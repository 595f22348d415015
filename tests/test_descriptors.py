"""The limit of open files is raised as far as it may be, and never lowered."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from backyfs import descriptors
soft, hard, most = (int(word) for word in sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
descriptors.allow(most or None)
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "most", "after"),
    [
        (100, 1000, 500, 500),
        (100, 300, 500, 300),
        (400, 1000, 300, 400),
        (100, 1000, 0, 1000),
        (1000, 1000, 0, 1000),
    ],
)
def test_the_limit_after(soft: int, hard: int, most: int, after: int) -> None:
    arguments = [str(number) for number in (soft, hard, most)]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [str(after), str(hard)]
