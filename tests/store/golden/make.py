"""Makes the golden stores: `python -m tests.store.golden.make DIRECTORY` (on btrfs or XFS).

Run once for each version of the format; what it made is committed and must open for ever. It
leaves `packs`, `cow` and `expected.json` (per store, revision and disk: size, digest, SHA-256) in
the directory. Random identities make every run differ in bytes, never in what is expected.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from backyfs.model import FRAME, Consistency, Extent, Partition, Trust
from backyfs.store.packs import gc
from backyfs.store.record import Draft, Record, State, Stats
from backyfs.store.repository import Repository

START = datetime(2026, 1, 1, 3, 0, 0, 123456, tzinfo=UTC)


def frame(seed: int) -> bytes:
    """A frame that takes little space in git: some random bytes, the rest one letter."""
    rng = random.Random(seed)
    body = bytearray(bytes([97 + seed % 26]) * FRAME)
    for _ in range(4):
        at = rng.randrange(FRAME - 100)
        body[at : at + 100] = rng.randbytes(100)
    return bytes(body)


def changed(image: bytes, frame_no: int, seed: int) -> bytes:
    """`image` with 200 bytes of a frame replaced."""
    at = frame_no * FRAME + 4096 * (seed % 15)
    return image[:at] + random.Random(seed).randbytes(200) + image[at + 200 :]


def contents() -> list[dict[str, bytes]]:
    """The disks of each revision: patches, chains, zeros, shrinking, growing, a new disk."""
    root = b"".join(map(frame, (1, 2, 3))) + bytes(FRAME) + frame(5) + b"the end"
    found = [{"root": root}]
    for seed in range(6):
        root = changed(root, 1, seed)  # deeper than a chain may be
        found.append({"root": root, "data.1": frame(9)})
    root = root[:FRAME] + bytes(FRAME) + root[2 * FRAME : 4 * FRAME + 1000]
    found.append({"root": root, "data.1": frame(9)})
    root = root + bytes(3 * FRAME) + frame(7)
    found.append({"root": root, "data.1": changed(frame(9), 0, 3)})
    found.append({"root": root, "data.1": changed(frame(9), 0, 3)})
    return found


DRAFT = Draft(
    consistency=Consistency.FILESYSTEM,
    reason="the guest agent froze 2 file systems · ümlaut",
    tags=("daily", "manual:before upgrade"),
    stats=Stats(read=1 << 20, changed=65536, verified=65536, seconds=1.25),
    tool="backyfs golden",
    verification="full",
    sources={"root": {"type": "file", "bookmark": {"path": "/dev/vg/web01", "generation": 7}}},
    partitions={"root": (Partition(1, 1048576, 65536, "0fc63daf", "root", "ext4"),)},
)


def back_up(repository: Repository, number: int, disks: dict[str, bytes]) -> Record:
    """Make revision `number` on top of the newest."""
    parent = next(iter(reversed(repository.revisions())), None)
    time = START + timedelta(days=number)
    revision = f"{time:%Y%m%dT%H%M%SZ}-gold"
    with (
        repository.writing() as intent,
        repository.begin(intent, parent, revision=revision, time=time) as staging,
    ):
        for name, image in disks.items():
            writer = staging.disk(name, len(image))
            for extent in [Extent(at, 1) for at in range(0, len(image), FRAME)]:
                writer.write(extent.offset, image[extent.offset : extent.offset + FRAME])
        return staging.commit(DRAFT)


def make(path: Path, store: str) -> None:
    """A repository with ten revisions made, two of them removed, some packs merged."""
    repository = Repository.create(path, store)
    records = [back_up(repository, n, disks) for n, disks in enumerate(contents())]
    repository.update_state(
        records[4].id,
        lambda state: replace(state, trust=Trust.DISTRUSTED, why="it looked odd", tags=("kept",)),
    )
    repository.update_state(
        records[5].id, lambda state: State(state.tags, Trust.VERIFIED, START + timedelta(days=30))
    )
    repository.remove([records[2].id, records[6].id])
    gc.FILES_BASE = 4  # makes it merge
    repository.gc()
    assert repository.fsck() == []
    for name in ("lock", "lock.meta"):
        (path / name).unlink(missing_ok=True)


def described(repository: Repository) -> dict[str, Any]:
    """What must be read from a repository."""
    found: dict[str, Any] = {}
    for record in repository.revisions():
        state = repository.state(record)
        disks = {}
        for name in record.disks:
            with closing(repository.open_disk(record, name)) as image:
                data = image.read(0, image.size)
                disks[name] = [image.size, image.digest, hashlib.sha256(data).hexdigest()]
        found[record.id] = {
            "seq": record.seq,
            "time": record.time.isoformat(),
            "parent": record.parent,
            "consistency": str(record.consistency),
            "reason": record.reason,
            "tags": list(state.tags),
            "trust": str(state.trust),
            "why": state.why,
            "bookmarks": {n: dict(d.source) for n, d in record.disks.items() if d.source},
            "partitions": {n: len(d.partitions) for n, d in record.disks.items()},
            "disks": disks,
        }
    return found


def main(directory: Path) -> None:
    """Make both stores in `directory`, which must exist."""
    expected = {}
    for store in ("packs", "cow"):
        make(directory / store, store)
        expected[store] = described(Repository.open(directory / store))
    text = json.dumps(expected, indent=1, ensure_ascii=False, sort_keys=True)
    (directory / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
