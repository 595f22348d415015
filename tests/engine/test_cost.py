"""Cost follows data, not size: a sparse image of 1 TiB, in reads and memory; in time, as far as
the time-out of a test goes (all of it would take hours).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from backyfs.model import FRAME
from backyfs.store.repository import Repository
from tests.images import sparse_image

MIB = 1 << 20
RSS_MAX = 256 * MIB

PROGRAM = """
import json, os, re, sys
from pathlib import Path
if cores := int(sys.argv[3]):
    os.sched_getaffinity = lambda pid: set(range(cores))
import trio
from backyfs.engine.backup import back_up
from backyfs.engine.verification import verify
from backyfs.source.file import FileSource
from backyfs.store.repository import Repository

repository = Repository.open(Path(sys.argv[1]))
source = FileSource({"disk": sys.argv[2]})
record = trio.run(back_up, repository, source)
trio.run(verify, repository, [record])
# Not ru_maxrss: that counts what this process was before exec, the test's own process.
status = Path("/proc/self/status").read_text()
rss = int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024
print(json.dumps({"rss": rss, "read": record.stats.read}))
"""


def back_up_outside(repository: Repository, image: Path, cores: int = 0) -> dict[str, int]:
    """Back up and verify in a process of its own (as on so many cores); what it took."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(repository.path), str(image), str(cores)],
        check=True,
        capture_output=True,
        timeout=100,
    )
    result: dict[str, int] = json.loads(done.stdout)
    return result


def test_a_sparse_tebibyte(packs: Repository, tmp_path: Path) -> None:
    pieces = {n << 30: bytes([1 + n % 255]) * 65536 for n in range(0, 1024, 2)}
    image = sparse_image(tmp_path / "sparse.img", 1 << 40, pieces)
    first = back_up_outside(packs, image)
    assert first["read"] == len(pieces) * 65536
    assert first["rss"] < RSS_MAX
    second = back_up_outside(packs, image)
    assert second["rss"] < RSS_MAX
    assert second["read"] == len(pieces) * 65536
    old, new = packs.revisions()
    assert new.stats.changed == 0
    assert new.stats.stored < 65536
    assert old.disks["disk"].digest == new.disks["disk"].digest


def test_many_cores(packs: Repository, tmp_path: Path) -> None:
    """Memory does not follow the number of cores."""
    image = tmp_path / "disk.img"
    image.write_bytes(random.Random(1).randbytes(MIB) * 300)
    assert back_up_outside(packs, image, cores=64)["rss"] < RSS_MAX / 2


def test_much_that_compresses_to_nothing(packs: Repository, tmp_path: Path) -> None:
    """Small frames that wait to be written keep no large blocks of memory apart."""
    image = tmp_path / "disk.img"
    with image.open("wb") as stream:
        for number in range(1, 16384):
            stream.write(number.to_bytes(8, "little").ljust(FRAME, b"\0"))
    assert back_up_outside(packs, image)["rss"] < RSS_MAX / 4
