"""What is freed between blocks that stay goes back to the system when it is asked for."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import re
from pathlib import Path
from backyfs.allocator import give_back, keep_few_heaps, keep_freed_blocks

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

keep_few_heaps()
keep_freed_blocks()
blocks = [bytes([n % 255 + 1]) * (40_000 + n % 7 * 1000) for n in range(4000)]
blocks = blocks[::40]
before = resident()
give_back()
print(before, resident())
"""


def test_memory_between_blocks_is_given_back() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    before, after = map(int, run.stdout.split())
    assert before > 100  # MiB: all that was freed is still there
    assert after < 50
