"""Faults on purpose: file operations that fail, kill or lose power, and what must hold afterwards.

A `History` is a repository with known content: every revision's bytes are kept beside it, so that
any test can say what each disk must read as. Directories lie in /dev/shm where there is one: the
tests make thousands of copies and syncs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import secrets
import shutil
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backyfs.errors import BackyfsError
from backyfs.extents import whole_frames
from backyfs.model import FRAME, Consistency, Extent
from backyfs.store import meter
from backyfs.store.contract import Buffer, DiskWriter
from backyfs.store.fs import SYSTEM, Fs
from backyfs.store.packs.image import PackImage
from backyfs.store.quarantine import Bad
from backyfs.store.record import Draft, Record
from backyfs.store.repository import Repository
from backyfs.store.staging import Staging

Disks = Mapping[str, bytes]
Contents = dict[str, dict[str, bytes]]
"""By revision id and disk name, the bytes that must be there."""

START = datetime(2026, 1, 1, tzinfo=UTC)
DRAFT = Draft(consistency=Consistency.CRASH)


# ---- content -----------------------------------------------------------------------------------


def frame(seed: int) -> bytes:
    """A frame of 4 KiB that does not compress and 60 KiB that does: patches pay."""
    rng = random.Random(seed)
    return rng.randbytes(4096) + bytes([seed % 251 + 1]) * (FRAME - 4096)


def frames(*seeds: int) -> bytes:
    """Frames one after the other; seed 0 is a frame of zeros."""
    return b"".join(frame(seed) if seed else bytes(FRAME) for seed in seeds)


def patched(image: bytes, frame_no: int, seed: int, length: int = 600) -> bytes:
    """`image` with some bytes within a frame changed."""
    rng = random.Random(seed)
    at = frame_no * FRAME + rng.randrange(8192, FRAME - length)
    return image[:at] + rng.randbytes(length) + image[at + length :]


def differing(old: bytes, new: bytes) -> list[Extent]:
    """A change list: the frames in which two images differ."""
    end = max(len(old), len(new))
    return [
        Extent(at, min(FRAME, end - at))
        for at in range(0, end, FRAME)
        if old[at : at + FRAME] != new[at : at + FRAME]
    ]


def lower_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments per revision, each written in several calls; merges of a handful of packs;
    no grace for strays.
    """
    monkeypatch.setattr("backyfs.store.packs.segment.WRITE_BYTES", 1)
    monkeypatch.setattr("backyfs.store.packs.segment.SEGMENT_BYTES_MAX", 9000)
    monkeypatch.setattr("backyfs.store.packs.segment.DIRTY_BYTES_MAX", 6000)
    monkeypatch.setattr("backyfs.store.packs.gc.SEGMENT_BYTES_MAX", 60000)
    monkeypatch.setattr("backyfs.store.packs.gc.FILES_BASE", 4)
    monkeypatch.setattr("backyfs.store.repository.STRAY_AGE_S", -3600.0)


# ---- a repository with known content -----------------------------------------------------------


def revision_id(number: int) -> str:
    """The id of the `number`-th revision of a history."""
    return f"{START + timedelta(hours=number):%Y%m%dT%H%M%SZ}-{number:04d}"


def write_disk(writer: DiskWriter, image: bytes, extents: Sequence[Extent]) -> None:
    """Write frames of `image` as a backup does: runs of data in batches, zeros as such."""
    for extent in whole_frames(extents, len(image)):
        for at in range(extent.offset, extent.end, 3 * FRAME):
            data = image[at : min(at + 3 * FRAME, extent.end)]
            if data.strip(b"\0"):
                writer.write(at, data)
            else:
                writer.zero(at, len(data))


def stage(staging: Staging, disks: Disks, parent: Disks | None) -> None:
    """Write all disks: those of the parent by change list, the others whole."""
    for name, image in disks.items():
        writer = staging.disk(name, len(image))
        extents = [Extent(0, len(image))] if image else []
        if parent is not None and name in parent:
            extents = differing(parent[name], image) + writer.required()
        write_disk(writer, image, extents)


def store(
    repository: Repository,
    number: int,
    disks: Disks,
    parent: Disks | None = None,
    *,
    time: datetime | None = None,
) -> Record:
    """Make revision `number`. With `parent` (its content) only what differs is handed over."""
    with repository.writing() as intent:
        base = next(iter(reversed(repository.revisions())), None)
        begun = repository.begin(
            intent,
            base,
            revision=revision_id(number),
            time=time or START + timedelta(hours=number),
        )
        with begun as staging:
            stage(staging, disks, parent if base is not None else None)
            staging.seal()
            return staging.commit(DRAFT)


def content(repository: Repository, record: Record) -> dict[str, bytes]:
    """All bytes of all disks of a revision."""
    found = {}
    for name in record.disks:
        with closing(repository.open_disk(record, name)) as image:
            found[name] = image.read(0, image.size)
    return found


@dataclass
class History:
    """A repository's path and the bytes each of its revisions must have."""

    path: Path
    contents: Contents = field(default_factory=dict)

    def open(self, fs: Fs = SYSTEM) -> Repository:
        """The repository, with fresh caches."""
        return Repository.open(self.path, fs=fs)

    @property
    def newest(self) -> dict[str, bytes]:
        """The bytes of the newest revision."""
        return next(iter(reversed(self.contents.values())))

    def add(self, disks: Disks, *, scan: bool = False) -> Record:
        """Make the next revision."""
        number = int(max(self.contents)[-4:]) + 1 if self.contents else 0
        parent = self.newest if self.contents and not scan else None
        record = store(self.open(), number, disks, parent)
        self.contents[record.id] = dict(disks)
        return record

    def copy(self, where: Path) -> History:
        """The same repository in another place."""
        shutil.copytree(self.path, where)
        return History(where, {key: dict(value) for key, value in self.contents.items()})


def make_history(path: Path) -> History:
    """Seven revisions of two disks with all that can happen to a frame.

    Plain frames, patches, chains of patches, zeroes, shrinking, growing, an unchanged disk, sizes
    that are no multiple of a frame.
    """
    Repository.create(path, "packs")
    history = History(path)
    root = frames(1, 2, 3, 4, 0, 6, 7, 8) + b"tail of the disk"
    data = frames(21, 22)
    history.add({"root": root, "data": data})
    root = patched(patched(root, 1, 101), 2, 102)
    history.add({"root": root, "data": data})
    root, data = patched(patched(root, 1, 103), 6, 104), patched(data, 0, 105)
    history.add({"root": root, "data": data})
    root = root[: 3 * FRAME] + bytes(FRAME) + root[4 * FRAME : 6 * FRAME + 1000]
    history.add({"root": root, "data": data})
    root = root + bytes(2 * FRAME) + frames(31, 32)
    history.add({"root": root, "data": data})
    history.add({"root": root, "data": data})
    root, data = patched(patched(root, 1, 106), 5, 107), data + b"more"
    history.add({"root": root, "data": data})
    return history


def make_holed(path: Path, monkeypatch: pytest.MonkeyPatch) -> History:
    """A history whose packs hold dead frames of several blocks, too few to be merged."""
    monkeypatch.setattr("backyfs.store.packs.segment.SEGMENT_BYTES_MAX", 1 << 30)
    monkeypatch.setattr("backyfs.store.packs.gc.FILES_BASE", 1000)
    Repository.create(path, "packs")
    history = History(path)
    rng = random.Random(1)
    image = rng.randbytes(16 * FRAME)
    history.add({"disk": image})
    image = image[:FRAME] + bytes(3 * FRAME) + image[4 * FRAME :]
    history.add({"disk": image})
    image = image[: 8 * FRAME] + rng.randbytes(4 * FRAME) + image[12 * FRAME :]
    history.add({"disk": image})
    image = image[: 9 * FRAME] + rng.randbytes(FRAME) + image[10 * FRAME :]
    history.add({"disk": image})
    for number in (0, 2):
        history.open().remove([revision_id(number)])
        del history.contents[revision_id(number)]
    return history


def next_disks(history: History, seed: int = 900) -> dict[str, bytes]:
    """What the VM's disks look like at the next backup: patches, new frames, zeros, growth."""
    disks = dict(history.newest)
    name = "root" if "root" in disks else next(iter(disks))
    image = patched(disks[name], 1, seed)
    image = patched(image, 2, seed + 1)
    disks[name] = image[: 5 * FRAME] + frames(seed + 2) + image[6 * FRAME :] + frames(seed + 3)
    return disks


@contextlib.contextmanager
def scratch(fallback: Path) -> Iterator[Path]:
    """A directory in memory if there is such a place, else in `fallback`; removed at the end."""
    memory = Path("/dev/shm")
    base = memory if os.access(memory, os.W_OK) else fallback
    where = base / f"backyfs-test-{secrets.token_hex(8)}"
    where.mkdir()
    try:
        yield where
    finally:
        shutil.rmtree(where)


# ---- faults ------------------------------------------------------------------------------------


class Counting(Fs):
    """Counts operations; at number `n` it does `strike(name)`. Safe from many threads."""

    def __init__(self, n: int = 0) -> None:
        self.n, self.count = n, 0
        self._mutex = threading.Lock()

    def due(self) -> bool:
        """Whether this operation is the one; counts it."""
        with self._mutex:
            self.count += 1
            return self.count == self.n

    def call(self, name: str) -> None:
        """Before each operation."""
        if self.due():
            self.strike(name)

    def strike(self, name: str) -> None:
        """What happens at operation `n`."""

    @property
    def fired(self) -> bool:
        """Whether operation `n` was reached."""
        return bool(self.n) and self.count >= self.n


class Torn(Counting):
    """Strikes in the middle of a write: half of the data is written before."""

    def write(self, fd: int, data: Buffer, path: object = "the store") -> None:
        if self.count + 1 == self.n and len(data) > 1:
            os.write(fd, memoryview(data)[: len(data) // 2])
        super().write(fd, data, path)

    def pwrite(self, fd: int, data: Buffer, offset: int, path: object = "the store") -> None:
        if self.count + 1 == self.n and len(data) > 1:
            os.pwrite(fd, memoryview(data)[: len(data) // 2], offset)
        super().pwrite(fd, data, offset, path)

    def writev(self, fd: int, pieces: Sequence[Buffer], path: object = "the store") -> None:
        if self.count + 1 == self.n:
            data = b"".join(pieces)
            os.write(fd, data[: len(data) // 2])
        super().writev(fd, pieces, path)


class KillAt(Torn):
    """Ends the process with SIGKILL at operation `n`."""

    def strike(self, name: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class FailAt(Torn):
    """Operation `n` fails with `code`; with `for_good` so does every one after it."""

    def __init__(self, n: int, code: int = errno.EIO, *, for_good: bool = False) -> None:
        super().__init__(n)
        self._code, self._for_good = code, for_good

    def due(self) -> bool:
        return super().due() or (self._for_good and bool(self.n) and self.count > self.n)

    def strike(self, name: str) -> None:
        raise OSError(self._code, os.strerror(self._code))


@contextlib.contextmanager
def unreadable(monkeypatch: pytest.MonkeyPatch, *places: tuple[Path, int, int]) -> Iterator[None]:
    """While entered, the medium does not give these parts (from, to) of files."""
    pread = os.pread

    def failing(fd: int, length: int, offset: int) -> bytes:
        name = os.readlink(f"/proc/self/fd/{fd}")
        if any(str(p) == name and offset < end and offset + length > at for p, at, end in places):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, length, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", failing)
        yield


Operation = Callable[[Fs], object]


class Child:
    """`operation` in a child process, to begin when told; dies at its n-th file operation.

    Forked when made: before the threads of a test, whose locks it would inherit.
    """

    def __init__(self, operation: Operation, n: int = 0) -> None:
        wait, self._go = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the child only ever ends
            self.pid = os.fork()
        if self.pid == 0:
            os.close(self._go)
            os.read(wait, 1)
            _run_and_exit(operation, n)
        os.close(wait)

    def run(self) -> bool:
        """Let it go; whether it was killed. Any other failure is an error."""
        os.close(self._go)
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return True
        assert os.WEXITSTATUS(status) == 0, "the child failed: see above"
        return False


def _run_and_exit(operation: Operation, n: int) -> None:
    code = 1
    try:
        operation(KillAt(n))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def killed(operation: Operation, n: int) -> bool:
    """Run `operation` in a child that dies at its n-th file operation; whether it died."""
    return Child(operation, n).run()


# ---- what must hold ----------------------------------------------------------------------------


def listing(path: Path) -> dict[str, bytes]:
    """Every file below `path` with its bytes, except what locks are taken on, and the meter."""
    return {
        str(found.relative_to(path)): found.read_bytes()
        for found in path.rglob("*")
        if found.is_file()
        and found.name not in ("lock", "lock.meta")
        and found.parent != path / meter.DIRECTORY
    }


def check(
    path: Path,
    certain: Mapping[str, Disks],
    possible: Mapping[str, Disks] | None = None,
) -> set[str]:
    """The store is sound, has all `certain` revisions and else only `possible` ones, byte for byte.

    Returns the ids of the revisions that are there.
    """
    possible = possible or {}
    repository = Repository.open(path)
    assert repository.fsck() == []
    assert repository.unreadable() == {}
    assert repository.damage() == {}
    listed = {record.id: record for record in repository.revisions()}
    assert certain.keys() <= listed.keys() <= certain.keys() | possible.keys()
    for revision, record in listed.items():
        expected = certain[revision] if revision in certain else possible[revision]
        assert content(repository, record) == expected, revision
    return set(listed)


def strays(path: Path) -> list[str]:
    """Files nobody needs: unfinished ones, packs and maps no record reaches, foreign states."""
    repository = Repository.open(path)
    records = repository.revisions()
    named = {file for record in records for file in repository.format_files(record)}
    named |= {repository.layout.record(record.id) for record in records}
    named |= {repository.layout.state(record.id) for record in records}
    found = [file for file in repository.layout.revisions.iterdir() if file not in named]
    found += [file for file in path.rglob("*.tmp") if file not in found]
    if repository.layout.quarantine.is_dir():
        found += list(repository.layout.quarantine.iterdir())
    if repository.store == "packs":
        kept = {path / "packs" / name for name in needed_packs(repository)}
        found += [file for file in repository.layout.packs.iterdir() if file not in kept]
    return sorted(str(file.relative_to(path)) for file in found)


def needed_packs(repository: Repository) -> set[str]:
    """Names of the pack files that hold a frame some revision needs."""
    needed: set[str] = set()
    for record in repository.revisions():
        for name in record.disks:
            with closing(repository.open_disk(record, name)) as image:
                assert isinstance(image, PackImage)
                for number in range(image.map.frames):
                    for place in chain(image, number):
                        pack = image._library.segment(place.unit).pack
                        needed.add(pack.path.name)
    return needed


def chain(image: object, number: int) -> list[Bad]:
    """The stored frames frame `number` of a packs image is made of, itself first."""
    assert isinstance(image, PackImage)
    here = image.locate(number)
    return [] if here is None else [here, *image._library.chain(here)]


def damage(history: History, frame_no: int, disk: str = "root") -> Bad:
    """Damage the stored frame of the newest revision at this place; returns what it is."""
    repository = history.open()
    image = repository.open_disk(repository.revisions()[-1], disk)
    assert isinstance(image, PackImage)
    place = chain(image, frame_no)[0]
    home = image._library.segment(place.unit)
    offset, size, *_ = home.entry(place.number)
    with open(home.pack.path, "r+b") as stream:
        stream.seek(offset + size // 2)
        byte = stream.read(1)[0]
        stream.seek(offset + size // 2)
        stream.write(bytes([byte ^ 0x10]))
    assert image.check(frame_no, 1) == [frame_no]
    image.close()
    return place


def goes_on(path: Path, contents: Mapping[str, Disks]) -> None:
    """The next backup and gc work, leave no stray, and lose nothing."""
    history = History(path, {key: dict(value) for key, value in sorted(contents.items())})
    disks = next_disks(history)
    record = store(history.open(), 500, disks, history.newest)
    history.contents[record.id] = disks
    history.open().gc()
    check(path, history.contents)
    assert strays(path) == []


@contextlib.contextmanager
def expected_failure() -> Iterator[None]:
    """An operation may fail, but only with an error an operator understands."""
    try:
        yield
    except (BackyfsError, OSError) as exc:
        assert str(exc)
